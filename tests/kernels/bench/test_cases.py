"""Cases of the benchmark in tiny sizes: every kernel passes its own check, and all launches run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from tiny_sizes import tiny_sizes

from ostro.kernels.bench import (
    attention_cases,
    expert_cases,
    few_row_cases,
    linear_cases,
    prefill_cases,
    sampling_cases,
    small_cases,
)
from ostro.kernels.bench.expert_layers import FP8, make_layer
from ostro.kernels.bench.measure import Case
from ostro.kernels.bench.sizes import Sizes
from ostro.kernels.gpu.tiles import FP4
from ostro.kernels.latent_cache import FP8_ROWS


def _with_fp8_cache(sizes: Sizes) -> Sizes:
    return replace(sizes, cache_dtype=FP8_ROWS)


PARTS: dict[str, Callable[[Sizes], Iterator[Case]]] = {
    "experts_fp8": lambda sizes: expert_cases.cases(make_layer(FP8, sizes), [1, 5]),
    "experts_nvfp4": lambda sizes: expert_cases.cases(make_layer(FP4, sizes), [5]),
    "experts_bf16": lambda sizes: expert_cases.cases(make_layer(torch.bfloat16, sizes), [32]),
    "attention": lambda sizes: attention_cases.cases(sizes, [(3, 40)], [3], with_ragged=False),
    "attention_fp8": lambda sizes: attention_cases.cases(
        _with_fp8_cache(sizes), [(3, 40)], [3], with_ragged=False
    ),
    "prefill": lambda sizes: prefill_cases.cases(sizes, [(60, 0), (20, 33)]),
    "prefill_fp8": lambda sizes: prefill_cases.cases(_with_fp8_cache(sizes), [(20, 33)]),
    "linear": lambda sizes: linear_cases.cases(sizes, [5]),
    "few_rows": lambda sizes: few_row_cases.cases(sizes, 600),
    "few_rows_fp8": lambda sizes: few_row_cases.cases(_with_fp8_cache(sizes), 600),
    "small": lambda sizes: small_cases.cases(sizes, [5]),
    "sampling": lambda sizes: sampling_cases.cases(sizes, [3]),
}


@pytest.fixture
def few_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (attention_cases, few_row_cases, linear_cases, small_cases, sampling_cases):
        monkeypatch.setattr(module, "num_variants", lambda *_: 2)


@pytest.mark.usefixtures("few_variants")
@pytest.mark.parametrize("part", PARTS)
def test_every_case_is_right_and_runs(part: str, triton_device: str) -> None:
    torch.manual_seed(0)
    names = set()
    for case in PARTS[part](tiny_sizes(triton_device)):
        assert case.error() <= case.tolerance, case.operation
        for launch in case.launches[-2:]:
            launch()
        for name in {"sorted", "apart"} & set(case.others):
            case.others[name][-1]()
        assert case.bytes_moved > 0, case.operation
        assert (case.operation, case.size) not in names
        names.add((case.operation, case.size))
    assert names
