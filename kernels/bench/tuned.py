"""From what a sweep timed to the file of tiles that the launchers read; see `kernels.gpu.tiles`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ostro.kernels.bench.trials import Trial, by_time
from ostro.kernels.gpu.tiles import Tile, TunedTiles, read_switches, read_tuned

TILED = ("gate_up", "down")  # grouped products, whose tiles are read from files
LINEAR = "linear"  # likewise a product with one NVFP4 matrix


def best_tiles(trials: Sequence[Trial]) -> TunedTiles:
    """The fastest tile of each operation, dtype and number of rows; other kernels' are left out."""
    return {
        (best.operation, best.dtype, best.cut["block_rows"]): Tile(**best.cut)
        for best, *_ in by_time([trial for trial in trials if trial.operation in (*TILED, LINEAR)])
    }


def write_tuned(path: Path, tiles: TunedTiles) -> None:
    """Write tiles in the form of `kernels/tuned`; what the file has for other keys stays."""
    known = read_tuned(path) if path.exists() else {}
    switches = read_switches(path) if path.exists() else {}
    tree: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
    for (operation, dtype, rows), tile in sorted({**known, **tiles}.items()):
        entry = asdict(tile)
        del entry["block_rows"]
        tree.setdefault(operation, {}).setdefault(dtype, {})[str(rows)] = entry
    switched_on = {name: True for name, is_on in switches.items() if is_on}
    path.write_text(json.dumps({**switched_on, **tree}, indent=1) + "\n")
