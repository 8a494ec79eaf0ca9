"""Launch configurations: rules of thumb and tuned files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ostro.kernels.gpu import tiles
from ostro.kernels.gpu.tiles import Tile, block_rows, tile

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("num_pairs", "num_experts", "expected"),
    [
        (4, 128, 16),
        (64, 128, 16),
        (11 * 128, 128, 16),
        (12 * 128, 128, 32),
        (2_048, 128, 32),
        (64 * 128, 128, 128),
        (10_000, 128, 128),
    ],
)
def test_block_rows_hold_half_more_than_an_experts_share(
    num_pairs: int, num_experts: int, expected: int
) -> None:
    assert block_rows(num_pairs, num_experts) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_step_of_inputs_is_128_bytes_for_any_number_of_rows(dtype: torch.dtype) -> None:
    for rows in (16, 32, 64, 128):
        assert tile("gate_up", dtype, rows, CPU).block_in * dtype.itemsize == 128


def test_tuned_file_names_operation_dtype_and_rows(tmp_path: Path) -> None:
    entry = {
        "block_out": 64,
        "block_in": 64,
        "num_warps": 4,
        "num_stages": 5,
        "programs_per_processor": 2,
    }
    path = tmp_path / "some_gpu.json"
    path.write_text(json.dumps({"down": {"bfloat16": {"16": entry}}}))
    assert tiles.read_tuned(path) == {("down", "bfloat16", 16): Tile(block_rows=16, **entry)}
    path.write_text(json.dumps({"down": {"bfloat16": {"16": {"block_out": 64}}}}))
    with pytest.raises(ValueError, match=r"some_gpu.json: down.bfloat16.16"):
        tiles.read_tuned(path)


def test_tuned_file_has_switches_beside_its_tiles(tmp_path: Path) -> None:
    path = tmp_path / "some_gpu.json"
    path.write_text("{}")
    assert tiles.read_switches(path) == {"dependent_launch": False}
    path.write_text(json.dumps({"dependent_launch": True}))
    assert tiles.read_switches(path) == {"dependent_launch": True}
    assert tiles.read_tuned(path) == {}
    path.write_text(json.dumps({"dependent_launch": "yes"}))
    with pytest.raises(ValueError, match=r"some_gpu.json: dependent_launch is 'yes'"):
        tiles.read_switches(path)


def test_every_tuned_file_reads() -> None:
    for path in tiles._TUNED.glob("*.json"):
        assert tiles.read_tuned(path)


@pytest.mark.parametrize("operation", ["gate_up", "down"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_programs_of_a_processor_fit_its_shared_memory(operation: str, dtype: torch.dtype) -> None:
    for rows in (16, 32, 64, 128):
        cut = tile(operation, dtype, rows, CPU)
        boxes = rows + cut.block_out * (2 if operation == "gate_up" else 1)
        step_bytes = boxes * cut.block_in * dtype.itemsize
        assert step_bytes * cut.num_stages * cut.programs_per_processor <= 232_448


def test_device_names_make_file_names() -> None:
    assert tiles.device_slug("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"
