"""From what a sweep timed to the file of tiles that the launchers read; see `kernels.gpu.tiles`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ostro.kernels.gpu.tiles import Tile, TunedTiles, read_tuned


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One configuration of a kernel, timed.

    Attributes:
        operation: What runs.
        dtype: Of its weights or its cache: "bfloat16".
        size: Of its inputs: "B=32".
        cut: How it was launched, by the names of the configuration's fields.
        us: Median time of a launch; None if it failed.
        failure: What went wrong, "" if nothing did.
    """

    operation: str
    dtype: str
    size: str
    cut: dict[str, int]
    us: float | None
    failure: str = ""

    def label(self) -> str:
        """The configuration in few letters: "64 128 w4 s3 p2"."""
        short = {"num_warps": "w", "num_stages": "s", "programs_per_processor": "p"}
        return " ".join(f"{short.get(name, '')}{value}" for name, value in self.cut.items())


def by_time(trials: Iterable[Trial]) -> list[list[Trial]]:
    """Trials that ran, the fastest first, in groups of one operation, dtype and size."""
    groups: dict[tuple[str, str, str], list[Trial]] = {}
    for trial in trials:
        group = groups.setdefault((trial.operation, trial.dtype, trial.size), [])
        if trial.us is not None:
            group.append(trial)
    return [sorted(group, key=lambda trial: trial.us or 0.0) for group in groups.values() if group]


def best_tiles(trials: Iterable[Trial]) -> TunedTiles:
    """The fastest tile of each operation, dtype and number of rows; other kernels' are left out."""
    return {
        (group[0].operation, group[0].dtype, group[0].cut["block_rows"]): Tile(**group[0].cut)
        for group in by_time(trials)
        if group[0].operation in ("gate_up", "down")
    }


def write_tuned(path: Path, tiles: TunedTiles) -> None:
    """Write tiles in the form of `kernels/tuned`; what the file has for other keys stays."""
    known = read_tuned(path) if path.exists() else {}
    tree: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
    for (operation, dtype, rows), tile in sorted({**known, **tiles}.items()):
        entry = asdict(tile)
        del entry["block_rows"]
        tree.setdefault(operation, {}).setdefault(dtype, {})[str(rows)] = entry
    path.write_text(json.dumps(tree, indent=1) + "\n")
