"""Launch configurations: measured ones where a file has them, else rules of thumb.

`kernels/tuned/<device>.json` holds what a sweep found for one kind of GPU:

    {"gate_up": {"bfloat16": {"16": {"block_out": 64, "num_warps": 4, ...}}}}

by operation, dtype of the weights (NVFP4 is float4_e2m1fn_x2) and rows of a tile; beside them
switches, which are false where a file has none: {"dependent_launch": true}. Nothing is tuned while
serving.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import triton

FP4 = torch.float4_e2m1fn_x2  # NVFP4 among the dtypes of weights
_TUNED = Path(__file__).parent.parent / "tuned"
SWITCHES = ("dependent_launch",)
_MIN_ROWS, _MAX_ROWS = 16, 128
BLACKWELL = 100  # architectures from here on
_NUM_PROCESSORS_ELSEWHERE = 132  # of an H200, where kernels are only compiled
_NUM_PROCESSORS_INTERPRETED = 3  # few, so that programs take more than one tile


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How one grouped matrix product is cut and launched.

    Attributes:
        block_rows: Rows of one expert that a tile covers.
        block_out: Outputs that it covers; the weight stands on the side where 64 fill a tensor
            core, so that 16 rows are enough.
        block_in: Inputs per step; of NVFP4, whose steps are blocks of 128, inputs per product. Sums
            of a row run in the same order in every batch, as products take a few inputs at a time
            and in order.
        num_warps: Per program.
        num_stages: Steps whose loads are under way.
        programs_per_processor: Persistent programs on each multiprocessor.
    """

    block_rows: int
    block_out: int
    block_in: int
    num_warps: int
    num_stages: int
    programs_per_processor: int


# By operation, dtype of the weights and rows.
TunedTiles = dict[tuple[str, str, int], Tile]


def block_rows(num_pairs: int, num_experts: int) -> int:
    """Rows of a tile for about evenly spread pairs: room for half more than an expert's share.

    With the share alone half of the experts need a second tile, which reads their weights again:
    1.23 times as long for 16 pairs an expert on an H200.

    Example:
        64 pairs over 128 experts give 16, 2048 give 32, 10,000 give 128.
    """
    share = max(1, num_pairs // num_experts)
    return min(max(_MIN_ROWS, 1 << (share + share // 2 - 1).bit_length()), _MAX_ROWS)


def tile(operation: str, dtype: torch.dtype, rows: int, device: torch.device) -> Tile:
    """The tile of an operation for weights of `dtype` and tiles of `rows` rows.

    Raises:
        ValueError: The device's file has an entry that is not a tile.
    """
    if device.type == "cuda":
        tuned = _tuned(device_slug(torch.cuda.get_device_name(device)))
        found = tuned.get((operation, str(dtype).removeprefix("torch."), rows))
        if found is not None:
            return found
    return _usual(operation, dtype, rows, device)


@functools.cache
def is_switched_on(switch: str, device: torch.device) -> bool:
    """Whether the device's file says that a switch, one of `SWITCHES`, is on.

    Raises:
        ValueError: It says something else than true or false.
    """
    if device.type != "cuda":
        return False
    path = _TUNED / f"{device_slug(torch.cuda.get_device_name(device))}.json"
    return path.exists() and read_switches(path)[switch]


def read_switches(path: Path) -> dict[str, bool]:
    """All switches as a file has them.

    Raises:
        ValueError: One is neither true nor false.
    """
    tree = json.loads(path.read_text())
    switches = {name: tree.get(name, False) for name in SWITCHES}
    for name, value in switches.items():
        if value not in (True, False):
            raise ValueError(f"{path}: {name} is {value!r}; must be true or false")
    return switches


def architecture(device: torch.device) -> int:
    """Of the GPU that a kernel is compiled for, such as 90; the interpreter passes for a Hopper."""
    if device.type == "cpu":
        return 90
    found: int = triton.runtime.driver.active.get_current_target().arch
    return found


def num_programs(tile_: Tile, device: torch.device) -> int:
    """Persistent programs that fill the device."""
    return num_processors(device) * tile_.programs_per_processor


def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; few in the interpreter, so that programs take turns."""
    if device.type == "cuda":
        count: int = torch.cuda.get_device_properties(device).multi_processor_count
        return count
    if device.type == "cpu":
        return _NUM_PROCESSORS_INTERPRETED
    return _NUM_PROCESSORS_ELSEWHERE


_FP8_ON_HOPPER = {
    "gate_up": {16: (64, 4, 5, 2), 32: (128, 8, 3, 2), 64: (256, 8, 3, 1), 128: (64, 4, 3, 2)},
    "down": {16: (64, 4, 4, 4), 32: (128, 8, 3, 3), 64: (128, 8, 3, 2), 128: (128, 4, 3, 2)},
}


# No sweep has run yet. What the registers hold: those of a thread have a step's weights in bf16
# beside the sums, and hide its latency with other programs.
_FP4_ON_HOPPER = {
    "gate_up": {16: (64, 4, 4, 3), 32: (64, 4, 4, 3), 64: (64, 4, 3, 2), 128: (128, 8, 3, 1)},
    "down": {16: (128, 4, 4, 3), 32: (128, 4, 4, 3), 64: (128, 8, 3, 2), 128: (128, 8, 3, 1)},
    # One matrix has few tiles: they are small, and each hides its latency alone.
    "linear": {16: (64, 4, 6, 2), 32: (64, 4, 5, 2), 64: (64, 4, 4, 2), 128: (128, 8, 3, 1)},
}
_FP4_ON_BLACKWELL = {
    "gate_up": {16: (128, 4, 4, 3), 32: (128, 4, 4, 2), 64: (128, 4, 3, 2), 128: (128, 8, 3, 1)},
    "down": {16: (128, 4, 4, 3), 32: (128, 4, 4, 3), 64: (128, 4, 3, 2), 128: (128, 8, 3, 1)},
    "linear": {16: (64, 4, 5, 2), 32: (64, 4, 5, 2), 64: (64, 4, 4, 2), 128: (128, 8, 3, 1)},
}


def _usual(operation: str, dtype: torch.dtype, rows: int, device: torch.device) -> Tile:
    """What was fastest on an H100 (bf16) and an H200; on Blackwell no sweep has run yet."""
    is_hopper = architecture(device) < BLACKWELL
    find = _usual_on_hopper if is_hopper else _usual_on_blackwell
    block_out, num_warps, num_stages, programs = find(operation, dtype, rows)
    block_in = 128 // dtype.itemsize  # the widest box of shared memory without conflicts
    if dtype == FP4 and is_hopper and operation == "gate_up" and rows == _MAX_ROWS:
        block_in = 64  # beside the sums, registers hold the weights of no more
    return Tile(
        block_rows=rows,
        block_out=block_out,
        block_in=block_in,
        num_warps=num_warps,
        num_stages=num_stages,
        programs_per_processor=programs,
    )


def _usual_on_hopper(operation: str, dtype: torch.dtype, rows: int) -> tuple[int, int, int, int]:
    """Outputs, warps, stages, programs: few rows wait for memory and want programs side by side."""
    if dtype == FP4:
        return _FP4_ON_HOPPER[operation][rows]
    if dtype.itemsize == 1:
        return _FP8_ON_HOPPER[operation][rows]
    if operation == "gate_up":
        return (64, 4, 3, 2) if rows <= 16 else (128, 8, 3, 1)
    if rows <= 16:
        return 64, 4, 3, 4
    return 128, 8 if rows <= 64 else 4, 3, 2


def _usual_on_blackwell(operation: str, dtype: torch.dtype, rows: int) -> tuple[int, int, int, int]:
    if dtype == FP4:
        return _FP4_ON_BLACKWELL[operation][rows]
    if rows <= 16:
        return 64, 4, 4, 3
    return 128, 8, 4 if rows <= 32 else 3, 1


def device_slug(device_name: str) -> str:
    """A GPU's name as the name of its file."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")


@functools.cache
def _tuned(slug: str) -> TunedTiles:
    path = _TUNED / f"{slug}.json"
    return read_tuned(path) if path.exists() else {}


def read_tuned(path: Path) -> TunedTiles:
    """The tiles of a file.

    Raises:
        ValueError: It has an entry that is not a tile.
    """
    names = {field.name for field in fields(Tile)} - {"block_rows"}
    found: TunedTiles = {}
    tree = json.loads(path.read_text())
    for operation in tree.keys() - SWITCHES:
        by_dtype = tree[operation]
        for dtype, by_rows in by_dtype.items():
            for rows, entry in by_rows.items():
                if set(entry) != names:
                    raise ValueError(
                        f"{path}: {operation}.{dtype}.{rows} has {sorted(entry)}; "
                        f"a tile has {sorted(names)}"
                    )
                found[operation, dtype, int(rows)] = Tile(block_rows=int(rows), **entry)
    return found
