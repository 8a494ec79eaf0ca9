"""The benchmark from end to end in tiny sizes, with a clock that stands still."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_sizes import tiny_sizes

from ostro.kernels.bench import (
    attention_cases,
    linear_cases,
    report,
    run,
    small_cases,
    sweep,
    sweep_attention,
    sweep_linear,
)
from ostro.kernels.bench import trials as trials_module
from ostro.kernels.bench.expert_layers import FP8, make_layer
from ostro.kernels.bench.measure import Ceilings, Launch
from ostro.kernels.bench.report import measure_kernels
from ostro.kernels.bench.sizes import Sizes
from ostro.kernels.gpu.tiles import FP4, read_tuned
from ostro.kernels.latent_cache import FP8_ROWS


def once_us(launches: Sequence[Launch], rounds: int = 7) -> float:
    launches[0]()
    return 10.0


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch, triton_device: str) -> Sizes:
    """Tiny, where nothing is compiled beforehand and every launch takes 10 us."""
    ceilings = Ceilings(copy_bytes_s=1e12, read_bytes_s=1e12, flops_s={"bf16": 1e15, "fp8": 1e15})
    monkeypatch.setattr(report, "measure_ceilings", lambda: ceilings)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "some GPU")
    for module in (run, trials_module):
        monkeypatch.setattr(module, "replay_us", once_us)
    for module in (sweep, sweep_attention, sweep_linear):
        monkeypatch.setattr(module, "compile_all", lambda _: None)
    for module in (attention_cases, linear_cases, small_cases, sweep_linear):
        monkeypatch.setattr(module, "num_variants", lambda *_: 2)
    return tiny_sizes(triton_device)


def test_results_come_as_lines_and_as_json(
    sizes: Sizes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts = {"small": partial(small_cases.cases, sizes, [3])}
    monkeypatch.setattr(report, "PARTS", parts)
    lines: list[str] = []
    found = measure_kernels(["small"], [], lines.append, json_path=tmp_path / "told.json")
    assert found.is_right()
    assert len(lines) == 1 + len(found.results)
    assert all(len(line) <= 130 for line in lines)
    told = json.loads((tmp_path / "told.json").read_text())
    assert [row["us"] for row in told["results"]] == [10.0] * len(found.results)


def test_a_part_that_fails_does_not_hide_the_next(
    sizes: Sizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> object:
        raise torch.OutOfMemoryError("80 GiB")

    parts = {"broken": broken, "small": partial(small_cases.cases, sizes, [1])}
    monkeypatch.setattr(report, "PARTS", parts)
    found = measure_kernels(list(parts), [], lambda _: None)
    assert found.failures == {"broken": "OutOfMemoryError: 80 GiB"}
    assert found.results
    assert not found.is_right()


def test_a_case_that_fails_has_no_time_in_json(
    sizes: Sizes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(_: Sequence[Launch]) -> float:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(run, "replay_us", broken)
    monkeypatch.setattr(report, "PARTS", {"small": partial(small_cases.cases, sizes, [3])})
    measure_kernels(["small"], [], lambda _: None, json_path=tmp_path / "told.json")
    told = json.loads((tmp_path / "told.json").read_text(), parse_constant=pytest.fail)
    assert {row["us"] for row in told["results"]} == {None}


def test_sweeps_find_tiles_for_the_file(
    sizes: Sizes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    layer = make_layer(FP8, sizes)
    monkeypatch.setattr(sweep, "TOKENS_OF_ROWS", {16: 2, 32: 2})
    few = sweep.variants("gate_up", FP8, 16, torch.device(sizes.device))[:2]
    monkeypatch.setattr(sweep, "variants", lambda *_: few)
    few_linear = sweep_linear.variants("linear", FP4, 16, torch.device(sizes.device))[:2]
    monkeypatch.setattr(sweep_linear, "variants", lambda *_: few_linear)
    monkeypatch.setattr(sweep_linear, "TOKENS_OF_ROWS", {16: 2})
    cuts = sweep_attention.decode_cuts(torch.bfloat16)[:2]
    monkeypatch.setattr(sweep_attention, "decode_cuts", lambda _: cuts)
    with_fp8_cache = replace(sizes, cache_dtype=FP8_ROWS)
    monkeypatch.setattr(sweep_attention, "_CHUNK_KEYS", (128,))
    sweeps = {
        "tiles": lambda _: sweep.sweep_tiles(layer, [16]),
        "rows": lambda found: sweep.sweep_rows(layer, report.best_tiles(found.trials), [4]),
        "linear": lambda _: sweep_linear.sweep_linear(sizes),
        "decode": lambda _: sweep_attention.sweep_decode(sizes, [(2, 20), (1, 30)]),
        "decode_fp8": lambda _: sweep_attention.sweep_decode(with_fp8_cache, [(2, 20)]),
        "prefill": lambda _: sweep_attention.sweep_prefill(sizes, [(5, 3)]),
    }
    monkeypatch.setattr(report, "SWEEPS", sweeps)
    lines: list[str] = []
    path = tmp_path / "some_gpu.json"
    found = measure_kernels([], list(sweeps), lines.append, tuned_path=path)
    assert found.failures == {}
    assert {trial.failure for trial in found.trials} == {""}
    tuned = read_tuned(path)
    assert set(tuned) == {
        ("gate_up", "float8_e4m3fn", 16),
        ("down", "float8_e4m3fn", 16),
        ("linear", "float4_e2m1fn_x2", 16),
    }
    assert tuned["gate_up", "float8_e4m3fn", 16] in few
    assert tuned["linear", "float4_e2m1fn_x2", 16] in few_linear
    assert len(lines) == 1 + 2 + 2 + 1 + len(cuts) + len(cuts) + 1
