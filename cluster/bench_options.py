"""Options that several commands of `ostro bench` share, and how their lists are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from ostro.cluster.model_paths import resolve_model

_Number = TypeVar("_Number", int, float)


def in_a_folder(path: Path | None) -> Path | None:
    """Refuse before anything is measured what could not be written after it."""
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{path.parent}: no such folder")
    return path


Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        dir_okay=False,
        writable=True,
        callback=in_a_folder,
        help="Write the figures here as JSON.",
    ),
]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds; medians are reported.")]


def _checkpoint(path: Path) -> Path:
    return resolve_model(str(path))


Checkpoint = Annotated[
    Path,
    typer.Option(
        "--model",
        metavar="PATH",
        callback=_checkpoint,
        help="Checkpoint directory, or 'embedded'.",
    ),
]
# In numbers: help texts are shown by rich, to which the "A" of "split:A:E" is an emoji.
LAYOUTS = "single, colocated:2 (shards) or split:1:2 (attention and expert shards), for example"


def parse_counts(text: str, option: str) -> list[int]:
    """Whole numbers of at least 1 from "1,16"; nothing from "".

    Raises:
        typer.BadParameter: It is something else.
    """
    numbers = _split(text, option, int)
    if any(number < 1 for number in numbers):
        raise typer.BadParameter(f"{text!r}: must be at least 1", param_hint=option)
    return numbers


def parse_rates(text: str, option: str) -> list[float]:
    """Positive numbers from "0.5,4"; nothing from "".

    Raises:
        typer.BadParameter: It is something else.
    """
    numbers = _split(text, option, float)
    if any(not 0 < number < float("inf") for number in numbers):
        raise typer.BadParameter(f"{text!r}: must be greater than 0", param_hint=option)
    return numbers


def parse_range(text: str, option: str) -> tuple[int, int]:
    """(first, end) from "first:end".

    Raises:
        typer.BadParameter: It is something else.
    """
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise typer.BadParameter(
            f"{text!r}: must be FIRST:END, such as 1000:32000", param_hint=option
        )
    return int(first), int(end)


def _split(text: str, option: str, kind: Callable[[str], _Number]) -> list[_Number]:
    try:
        return [kind(part) for part in text.split(",") if text]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}: must be numbers, separated by commas", param_hint=option
        ) from None
