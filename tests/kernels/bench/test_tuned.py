"""Sweeps without a GPU: what is worth trying, the best of trials, and the file that holds them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ostro.kernels.bench.report import trials_line
from ostro.kernels.bench.sweep import TOKENS_OF_ROWS, variants
from ostro.kernels.bench.sweep_attention import decode_cuts, prefill_tiles
from ostro.kernels.bench.trials import MAX_SHARED_BYTES, Trial, by_time
from ostro.kernels.bench.tuned import LINEAR, TILED, best_tiles, write_tuned
from ostro.kernels.gpu.mla_decode import decode_cut
from ostro.kernels.gpu.mla_prefill import prefill_tile
from ostro.kernels.gpu.tiles import FP4, Tile, read_switches, read_tuned, tile
from ostro.kernels.latent_cache import FP8_ROWS


def make_trial(operation: str, rows: int, num_stages: int, us: float | None) -> Trial:
    cut = {
        "block_rows": rows,
        "block_out": 64,
        "block_in": 128,
        "num_warps": 4,
        "num_stages": num_stages,
        "programs_per_processor": 2,
    }
    return Trial(operation=operation, dtype="float8_e4m3fn", size=f"rows={rows}", cut=cut, us=us)


TRIALS = [
    make_trial("gate_up", 16, 3, 482.0),
    make_trial("gate_up", 16, 4, None),
    make_trial("gate_up", 16, 5, 476.0),
    make_trial("gate_up", 32, 3, 807.0),
    make_trial("down by rows", 16, 3, 1.0),
]


def test_best_tiles_are_the_fastest_that_ran() -> None:
    best = best_tiles(TRIALS)
    assert {key: tile.num_stages for key, tile in best.items()} == {
        ("gate_up", "float8_e4m3fn", 16): 5,
        ("gate_up", "float8_e4m3fn", 32): 3,
    }


def test_written_tiles_are_read_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "some_gpu.json"
    best = best_tiles(TRIALS)
    write_tuned(path, best)
    assert read_tuned(path) == best


def test_writing_keeps_what_the_file_has_for_others(tmp_path: Path) -> None:
    path = tmp_path / "some_gpu.json"
    write_tuned(path, best_tiles(TRIALS))
    later = best_tiles([make_trial("down", 16, 3, 240.0), make_trial("gate_up", 16, 6, 470.0)])
    write_tuned(path, later)
    assert read_tuned(path) == {**best_tiles(TRIALS), **later}


def test_writing_keeps_switches(tmp_path: Path) -> None:
    path = tmp_path / "some_gpu.json"
    path.write_text('{"dependent_launch": true}')
    write_tuned(path, best_tiles(TRIALS))
    assert read_switches(path) == {"dependent_launch": True}
    assert read_tuned(path) == best_tiles(TRIALS)


def test_trials_that_failed_are_in_no_group() -> None:
    assert [[trial.us for trial in group] for group in by_time(TRIALS)] == [
        [476.0, 482.0],
        [807.0],
        [1.0],
    ]


def test_trials_make_a_short_line() -> None:
    assert trials_line(TRIALS[:3]) == (
        "gate_up float8_e4m3fn rows=16:  476.0 us 16 64 128 w4 s5 p2 | 482.0 us 16 64 128 w4 s3 p2"
        "  1 failed"
    )


@pytest.mark.parametrize("operation", TILED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, FP4], ids=str)
@pytest.mark.parametrize("rows", TOKENS_OF_ROWS)
def test_what_is_usual_is_among_what_is_tried(
    operation: str, dtype: torch.dtype, rows: int
) -> None:
    cpu = torch.device("cpu")
    assert tile(operation, dtype, rows, cpu) in variants(operation, dtype, rows, cpu)


@pytest.mark.parametrize("rows", TOKENS_OF_ROWS)
def test_what_is_usual_of_linear_layers_is_among_what_is_tried(rows: int) -> None:
    cpu = torch.device("cpu")
    assert tile(LINEAR, FP4, rows, cpu) in variants(LINEAR, FP4, rows, cpu)


def test_usual_launches_of_attention_are_among_what_is_tried() -> None:
    assert {cut.num_warps for cut in decode_cuts(torch.bfloat16)} == {4, 8}
    usual = decode_cut(FP8_ROWS, torch.device("cpu"))
    assert usual in decode_cuts(FP8_ROWS)
    for num_queries in (128, 8192):
        assert prefill_tile(num_queries, torch.bfloat16) in prefill_tiles()


def test_what_is_tried_fits_shared_memory() -> None:
    for operation in TILED:
        for cut in variants(operation, torch.bfloat16, 128, torch.device("cpu")):
            assert isinstance(cut, Tile)
            boxes = cut.block_rows + cut.block_out * (2 if operation == "gate_up" else 1)
            shared = boxes * 128 * cut.num_stages * cut.programs_per_processor
            assert shared <= MAX_SHARED_BYTES
