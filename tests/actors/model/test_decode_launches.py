"""What one layer of a decode step launches on a GPU, counted without one.

At one request a step is bound by its launches, so one more shows here.
"""

from __future__ import annotations

import pytest
from recorded_launches import DEPENDENT, decode_launches, head_launches, launches_of_layer

from ostro.configs.quantization import WeightFormat
from ostro.kernels.gpu.dependent_launch import dependent_launch

ATTEND_FEW = ["_latent_queries_kernel", "_attend_kernel", "_join_values_kernel"]
ATTEND = ["_latent_queries_kernel", "_attend_kernel", "_join_kernel", "_expand_values_kernel"]
EXPERTS_OF_FEW = ["_gate_up_few_kernel", "_down_few_kernel"]
EXPERTS = [
    "_expert_schedule_kernel",
    "_permute_kernel",
    "_gate_up_kernel",
    "_down_kernel",
]


@pytest.mark.parametrize("num_requests", [1, 2])
def test_a_layer_of_few_requests_launches_so_much(num_requests: int) -> None:
    assert launches_of_layer(num_requests, WeightFormat.FP8) == [
        "_fp8_linear_kernel",
        "_project_queries_kernel",
        *ATTEND_FEW,
        "_fp8_linear_kernel",
        "_combine_kernel",
        "_partial_logits_kernel",
        "_gate_kernel",
        *EXPERTS_OF_FEW,
        "_combine_kernel",
    ]


@pytest.mark.parametrize(
    ("num_requests", "logits"), [(8, "_partial_logits_kernel"), (64, "torch.mm")]
)
def test_a_layer_of_more_requests_launches_so_much(num_requests: int, logits: str) -> None:
    assert launches_of_layer(num_requests, WeightFormat.FP8) == [
        "_quantize_fp8_kernel",
        "torch._scaled_mm",
        "_mla_prologue_kernel",
        "torch._scaled_mm",
        *ATTEND,
        "_quantize_fp8_kernel",
        "torch._scaled_mm",
        "_combine_kernel",
        logits,
        "_gate_kernel",
        *EXPERTS,
        "_combine_kernel",
    ]


def test_two_scales_before_attention_cost_one_launch() -> None:
    joined, apart = (
        launches_of_layer(1, WeightFormat.FP8, is_joined=is_joined) for is_joined in (True, False)
    )
    assert len(apart) == len(joined) + 1


def test_what_stands_around_the_layers_is_little() -> None:
    step = decode_launches(1, WeightFormat.FP8, num_layers=2)
    layer = launches_of_layer(1, WeightFormat.FP8)
    assert len(step) - 2 * len(layer) == 16


def test_a_pass_of_a_draft_head_launches_so_much() -> None:
    """All on the device, or it could be no graph; the second of its layers comes last."""
    launches = head_launches(1)
    assert launches[:3] == ["torch.embedding", "torch.cat", "_fp8_linear_kernel"]
    assert launches[-12:] == [
        "_fp8_linear_kernel",
        "_project_queries_kernel",
        *ATTEND_FEW,
        "_fp8_linear_kernel",
        "_combine_kernel",
        "_fp8_linear_kernel",
        "torch.silu",
        "torch.mul_",
        "_fp8_linear_kernel",
        "_combine_kernel",
    ]
    assert len(launches) == 3 + 11 + 2 * 12


def test_a_layer_of_nvfp4_experts_launches_so_much() -> None:
    layer = launches_of_layer(1, WeightFormat.NVFP4)
    assert layer[-5:-1] == [
        "_expert_schedule_kernel",
        "_permute_kernel",
        "_gate_up_nvfp4_kernel",
        "_down_nvfp4_kernel",
    ]
    assert len(layer) == 15


@pytest.mark.parametrize("num_requests", [1, 8, 64])
@pytest.mark.parametrize("precision", [WeightFormat.FP8, WeightFormat.NVFP4])
def test_every_kernel_of_a_layer_may_start_before_the_one_ahead_has_ended(
    num_requests: int, precision: WeightFormat
) -> None:
    usual = launches_of_layer(num_requests, precision)
    with dependent_launch(True):
        layer = launches_of_layer(num_requests, precision)
    of_triton = [name for name in layer if not name.startswith("torch.")]
    assert all(name.endswith(DEPENDENT) for name in of_triton), of_triton
    assert [name.removesuffix(DEPENDENT) for name in layer] == usual
