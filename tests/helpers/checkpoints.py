"""Tiny random checkpoints for tests: real files in the Hugging Face layout, made in a moment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ostro.actors.model.random_checkpoint import TINY, write_random_checkpoint
from ostro.cluster.tekken import write_tekken


def make_tiny_checkpoint(
    directory: Path, *, with_tokenizer: bool = False, seed: int = 0, **dims: Any
) -> Path:
    """Write a checkpoint of a few hundred thousand values and return its directory.

    Args:
        directory: Made if it is not there.
        with_tokenizer: Whether a `tekken.json` of the same vocabulary is written too.
        seed: Another seed gives other weights.
        dims: Fields of `RandomModel` that differ from `TINY`: num_layers=3, num_experts=16 (four
            are chosen per token), vocab_size=1024 (64 of them special slots), dtype="float32",
            max_positions=1048576 and so on; `hidden` is short for hidden_size=64.
    """
    if "hidden" in dims:
        dims["hidden_size"] = dims.pop("hidden")
    model = replace(TINY, **dims)
    write_random_checkpoint(directory, model, seed)
    if with_tokenizer:
        max_image_size = model.vision.image_size if model.vision else 224
        write_tekken(directory / "tekken.json", model.vocab_size, max_image_size=max_image_size)
    return directory
