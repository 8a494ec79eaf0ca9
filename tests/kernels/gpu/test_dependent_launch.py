"""Launches that start before the kernel ahead has ended: when they are, and what they may do."""

from __future__ import annotations

import pytest
import torch
from compile_gate import before_the_wait

from ostro.kernels.gpu import dependent_launch as pdl
from ostro.kernels.gpu.dependent_launch import dependent_launch, pdl_options

# Nobody writes weights, so these read them while the kernel ahead still runs.
LOADS_WEIGHTS_EARLY = {
    "_fp8_linear_kernel",
    "_project_queries_kernel",
    "_latent_queries_kernel",
    "_expand_values_kernel",
    "_join_values_kernel",
    "_partial_logits_kernel",
}
# By module of launches: what a layer of one request starts, and what others start besides.
OF_ONE_REQUEST = {
    "linear_launches": ("fp8_linear_1", "fp8_linear_1_rounded"),
    "decode_launches": ("project_queries", "latent_queries", "attend_latents", "join_values"),
    "expert_launches": ("combine_norm_of_pairs", "gate_few", "experts_fp8_1_shared"),
}
OF_MORE = {
    "linear_launches": ("fp8_linear_2", "nvfp4_linear_16"),
    "decode_launches": (
        "project_queries_2_fp8",
        "mla_prologue",
        "attend_latents_fp8",
        "expand_values",
    ),
    "expert_launches": (
        "combine_norm",
        "combine_norm_of_sum",
        "rms_norm",
        "quantize_fp8",
        "gate",
        "experts_fp8_16",
        "experts_bf16_1",
        "experts_nvfp4_16",
    ),
}


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(pdl, "architecture", lambda _: 90)
    return torch.device("meta")


def test_launches_are_dependent_only_where_it_is_switched_on(hopper: torch.device) -> None:
    assert pdl_options(hopper) == {}
    with dependent_launch(True):
        assert pdl_options(hopper) == {"PDL": True, "launch_pdl": True}
        with dependent_launch(False):
            assert pdl_options(hopper) == {}
    assert pdl_options(hopper) == {}


def test_neither_an_older_gpu_nor_the_interpreter_knows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pdl, "architecture", lambda _: 80)
    with dependent_launch(True):
        assert pdl_options(torch.device("meta")) == {}
        assert pdl_options(torch.device("cpu")) == {}


def _assert_in_order(module: str, names: tuple[str, ...]) -> None:
    for kernels in before_the_wait(module, names).values():
        for kernel, accesses in kernels.items():
            assert accesses is not None, f"{kernel} does not wait once and let the next start"
            if kernel in LOADS_WEIGHTS_EARLY:
                accesses = [access for access in accesses if not access.startswith("LD")]
            assert accesses == [], f"{kernel} does not wait for what the kernel ahead writes"


@pytest.mark.parametrize("module", OF_ONE_REQUEST)
def test_kernels_touch_nothing_but_weights_before_they_wait(module: str) -> None:
    _assert_in_order(module, OF_ONE_REQUEST[module])


@pytest.mark.slow
@pytest.mark.parametrize("module", OF_MORE)
def test_kernels_of_more_rows_touch_nothing_but_weights_before_they_wait(module: str) -> None:
    _assert_in_order(module, OF_MORE[module])
