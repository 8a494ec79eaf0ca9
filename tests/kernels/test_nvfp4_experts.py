"""The NVFP4 expert MLP: rows through experts of codes, scales and units."""

from __future__ import annotations

import pytest
import torch
from expert_cases import make_nvfp4_experts, make_routed

from ostro.kernels.grouped_gemm import expert_mlp_reference
from ostro.kernels.nvfp4_experts import (
    Nvfp4Experts,
    Nvfp4Stack,
    expert_mlp_nvfp4,
    new_nvfp4_stack,
)
from ostro.kernels.nvfp4_linear import pack_nvfp4

E4M3 = torch.float8_e4m3fn


def test_a_packed_matrix_takes_the_bytes_of_its_codes_and_scales() -> None:
    stack = new_nvfp4_stack(3, 40, 256, "cpu")
    assert stack.words_EBOW.nbytes == 3 * 40 * 256 // 2
    assert stack.scales_EBOS.nbytes == 3 * 40 * 256 // 16


def test_expert_mlp_nvfp4_worked_example() -> None:
    def one(code: int) -> Nvfp4Stack:
        codes_OP = torch.zeros(1, 8, dtype=torch.uint8)
        codes_OP[0, 0] = code
        words_BOW, scales_BOS = pack_nvfp4(codes_OP, torch.ones(1, 1).to(E4M3))
        return Nvfp4Stack(words_EBOW=words_BOW[None], scales_EBOS=scales_BOS[None], num_inputs=16)

    gate, up = one(2), one(4)
    experts = Nvfp4Experts(
        gate_up=Nvfp4Stack(
            words_EBOW=torch.cat((gate.words_EBOW, up.words_EBOW), 2),
            scales_EBOS=torch.cat((gate.scales_EBOS, up.scales_EBOS), 2),
            num_inputs=16,
        ),
        gate_unit_E=torch.tensor([1.0]),
        up_unit_E=torch.tensor([2.0]),
        down=Nvfp4Stack(words_EBOW=one(5).words_EBOW, scales_EBOS=one(5).scales_EBOS, num_inputs=1),
        down_unit_E=torch.tensor([0.5]),
    )
    rows_RD = torch.zeros(1, 16)
    rows_RD[0, 0] = 1.0
    out_RD = expert_mlp_nvfp4(rows_RD, torch.tensor([[0]]), torch.tensor([[0.5]]), experts)
    # gate 1, up 2 * 2, down 3 * 0.5, weight 0.5
    torch.testing.assert_close(out_RD[0], torch.tensor(0.7310586 * 4 * 1.5 * 0.5).expand(16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_rows", "absent"), [(0, 0.0), (1, 1.0), (20, 0.4)])
def test_expert_mlp_nvfp4_is_the_mlp_of_the_dequantised_weights(
    num_rows: int, absent: float, dtype: torch.dtype
) -> None:
    experts, gate_up, down = make_nvfp4_experts(5, 48, 80)
    rows_RD, expert_RK, weight_RK = make_routed(num_rows, 5, 48, absent, dtype)
    counts = torch.zeros(6, dtype=torch.int64)
    out_RD = expert_mlp_nvfp4(rows_RD, expert_RK, weight_RK, experts, counts=counts)
    assert out_RD.dtype == dtype
    expected_RD = expert_mlp_reference(rows_RD.float(), expert_RK, weight_RK, gate_up, down)
    torch.testing.assert_close(out_RD, expected_RD.to(dtype), rtol=2e-2, atol=1e-4)
    assert torch.equal(counts, torch.bincount(expert_RK.flatten() + 1, minlength=6))
