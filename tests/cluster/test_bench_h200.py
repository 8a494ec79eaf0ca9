"""`ostro bench h200` without a GPU: what it refuses, its floors, and how its figures print."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from ostro.cluster import bench_whole_model
from ostro.cluster.bench import app
from ostro.cluster.bench_command_h200 import (
    cache_tokens,
    parse_precision,
    parse_sizes,
    to_table,
)
from ostro.cluster.bench_whole_model import (
    StepFigure,
    decode_floor_ms,
    mistral_small_4,
    prefill_floor_ms,
)
from ostro.configs.quantization import WeightFormat
from ostro.kernels.bench import ceilings as ceilings_module
from ostro.kernels.bench.measure import Ceilings
from ostro.kernels.latent_cache import FP8_ROWS

CEILINGS = Ceilings(
    copy_bytes_s=4.0e12, read_bytes_s=4.3e12, flops_s={"bf16": 790e12, "fp8": 1580e12}
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_h200_says_that_it_needs_a_gpu() -> None:
    result = CliRunner().invoke(app, ["h200"])
    assert result.exit_code == 1
    assert "CUDA device" in result.output


class _Model:
    """Stands for the whole model, which no CPU holds."""

    def __init__(self, *_: Any, **__: Any) -> None: ...


_FIGURE = StepFigure(
    kind="decode",
    num_requests=1,
    num_tokens=1,
    context=1024,
    graph_ms=4.0,
    step_ms=4.2,
    floor_ms=1.4,
    experts_hit=4.0,
    pdl_ms=math.nan,
)


def _measure_until_memory_ends(*_: Any, **__: Any) -> Iterator[StepFigure]:
    yield _FIGURE
    raise torch.OutOfMemoryError("80 GiB")


def _measure_all(*_: Any, **__: Any) -> Iterator[StepFigure]:
    yield _FIGURE


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings_module, "gpu_name", lambda: "some GPU")
    monkeypatch.setattr(ceilings_module, "measure_ceilings", lambda: CEILINGS)
    monkeypatch.setattr(bench_whole_model, "WholeModel", _Model)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("measure", "code"), [(_measure_all, 0), (_measure_until_memory_ends, 1)], ids=["all", "part"]
)
def test_h200_tells_what_was_measured_even_where_memory_ends(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    measure: Callable[..., Iterator[StepFigure]],
    code: int,
) -> None:
    monkeypatch.setattr(bench_whole_model, "measure", measure)
    result = CliRunner().invoke(app, ["h200", "--json", str(tmp_path / "told.json")])
    assert result.exit_code == code
    assert "4.00 ms" in result.stdout
    assert ("some GPU does not hold the next size" in result.stderr) == bool(code)
    told = json.loads((tmp_path / "told.json").read_text(), parse_constant=pytest.fail)
    assert [(row["graph_ms"], row["pdl_ms"]) for row in told["figures"]] == [(4.0, None)]


@pytest.mark.parametrize("text", ["8", "8x", "x8", "0x8", "8x0", "axb", "8x8x8"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="8x1024"):
        parse_sizes(text, "--decode")


def test_sizes_are_pairs() -> None:
    assert parse_sizes("1x1024,8x64", "--decode") == [(1, 1024), (8, 64)]
    assert parse_sizes("", "--decode") == []


def test_cache_holds_the_largest_step_on_pages_of_its_own() -> None:
    assert cache_tokens([(2, 100), (1, 64)], [(10, 150)]) == 2 * 164
    assert cache_tokens([], [(10, 150)]) == 214


def test_floors_are_those_of_the_real_model() -> None:
    config = mistral_small_4()
    assert decode_floor_ms(config, 1, 1024, 4.0, CEILINGS) == pytest.approx(1.55, abs=0.02)
    assert decode_floor_ms(config, 128, 1024, 125.8, CEILINGS) == pytest.approx(28.0, abs=0.2)
    assert prefill_floor_ms(config, 8192, 8192, CEILINGS) == pytest.approx(82.5, abs=1.0)


def test_floors_of_nvfp4_are_those_of_its_bytes_and_of_bf16_products() -> None:
    config, nvfp4 = mistral_small_4(), WeightFormat.NVFP4
    fp8_ms = decode_floor_ms(config, 128, 1024, 125.8, CEILINGS)
    found_ms = decode_floor_ms(config, 128, 1024, 125.8, CEILINGS, precision=nvfp4)
    expert_values, attention_values = 126.8 * 3 * 4096 * 2048, 28_049_408
    saved_bytes = 36 * (expert_values * 7 / 16 - attention_values)
    assert fp8_ms - found_ms == pytest.approx(saved_bytes / 4.3e12 * 1e3, rel=1e-3)
    fp8_ms = prefill_floor_ms(config, 8192, 8192, CEILINGS)
    found_ms = prefill_floor_ms(config, 8192, 8192, CEILINGS, nvfp4)
    values = 5 * 3 * 4096 * 2048 + attention_values
    more_s = 36 * 2 * 8192 * values * (1 / 790e12 - 1 / 1580e12)
    assert found_ms - fp8_ms == pytest.approx(more_s * 1e3, rel=1e-3)


def test_precision_is_one_that_fits_a_gpu() -> None:
    assert parse_precision("nvfp4") is WeightFormat.NVFP4
    with pytest.raises(typer.BadParameter, match="fp8 or nvfp4"):
        parse_precision("bf16")


def test_floor_of_long_contexts_falls_with_fp8_rows() -> None:
    config = mistral_small_4()
    plain = decode_floor_ms(config, 1, 262_144, 4.0, CEILINGS)
    fp8 = decode_floor_ms(config, 1, 262_144, 4.0, CEILINGS, cache_dtype=FP8_ROWS)
    saved_bytes = 262_144 * 36 * (640 - 384)
    assert plain - fp8 == pytest.approx(saved_bytes / CEILINGS.read_bytes_s * 1e3)


def test_floor_of_a_small_prefill_chunk_is_the_bytes_of_its_weights() -> None:
    config = mistral_small_4()
    weights_ms = 117e9 / CEILINGS.read_bytes_s * 1e3
    assert prefill_floor_ms(config, 512, 512, CEILINGS) == pytest.approx(weights_ms, rel=0.02)


def test_table_has_a_row_a_step() -> None:
    figure = StepFigure(
        kind="decode",
        num_requests=32,
        num_tokens=32,
        context=1024,
        graph_ms=20.0,
        step_ms=25.0,
        floor_ms=15.0,
        experts_hit=82.3,
    )
    console = Console(width=120, record=True)
    console.print(to_table("H200", [figure]))
    text = console.export_text()
    for shown in ("decode 32", "1,024", "20.00 ms", "25.00 ms", "75%", "1,280"):
        assert shown in text
    assert "PDL" not in text


def test_table_sets_dependent_launches_beside_the_others() -> None:
    decode = StepFigure(
        kind="decode",
        num_requests=1,
        num_tokens=1,
        context=1024,
        graph_ms=4.0,
        step_ms=4.2,
        floor_ms=1.4,
        experts_hit=4.0,
        pdl_ms=3.0,
    )
    console = Console(width=160, record=True)
    wrong, prefill = replace(decode, pdl_ms=math.nan), replace(decode, kind="prefill", pdl_ms=None)
    console.print(to_table("H200", [decode, wrong, prefill]))
    text = console.export_text()
    assert "PDL" in text
    assert text.count("other logits") == 1
    assert text.count("3.00 ms (0.75)") == 1
