"""Figures of a benchmark: samples of one quantity, their median and spread, and how they print."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from rich.table import Table

STAGE_UNIT = "ms/step"


@dataclass(frozen=True, slots=True)
class Figure:
    """Samples of one quantity.

    Attributes:
        subject: What was measured, for example "ostro split:1:2".
        quantity: What of it, for example "decode B=8".
        unit: Of the samples.
        samples: One per round, in order.
    """

    subject: str
    quantity: str
    unit: str
    samples: tuple[float, ...]

    def median(self) -> float:
        """The middle sample."""
        return statistics.median(self.samples)

    def spread(self) -> float:
        """Half the range of the samples over the median."""
        middle = self.median()
        return (max(self.samples) - min(self.samples)) / 2 / abs(middle) if middle else 0.0


def to_table(
    title: str,
    figures: Sequence[Figure],
    *,
    anchor: str | None,
    anchor_of: Mapping[str, str] | None = None,
) -> Table:
    """One row a figure, quantities in the order in which they first come.

    Args:
        title: Of the table.
        figures: What to show.
        anchor: Heads the last column: the ratio to the anchor's same quantity; None leaves it out.
        anchor_of: The anchor of each subject that has one of its own; without it `anchor` is the
            subject that all are compared with.
    """
    table = Table(title=title)
    ratio = [f"ratio to {anchor}"] if anchor is not None else []
    for name in ("quantity", "subject", "median", "spread", *ratio):
        table.add_column(name, justify="left" if name in ("quantity", "subject") else "right")
    medians = {(figure.subject, figure.quantity): figure.median() for figure in figures}
    order = {quantity: place for place, (_, quantity) in enumerate(reversed(medians))}
    for figure in sorted(figures, key=lambda figure: -order[figure.quantity]):
        own = anchor if anchor_of is None else anchor_of.get(figure.subject)
        base = medians.get((own, figure.quantity)) if own is not None else None
        cells = (f"{figure.median():.4g} {figure.unit}", f"+-{figure.spread():.0%}")
        ratios = [f"{figure.median() / base:.2f}" if base else ""] * len(ratio)
        table.add_row(figure.quantity, figure.subject, *cells, *ratios)
    return table


def write_json(path: Path, figures: Sequence[Figure], **context: object) -> None:
    """The figures with the machine that they were measured on."""
    machine = {
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }
    body = {"machine": machine, **context, "figures": [asdict(figure) for figure in figures]}
    path.write_text(json.dumps(body, indent=2) + "\n")
