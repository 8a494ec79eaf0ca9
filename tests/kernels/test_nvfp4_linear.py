"""NVFP4 linear layers: what packing keeps, what units mean, and the dispatch of `linear`."""

from __future__ import annotations

import pytest
import torch
from expert_cases import make_fp8_weight, make_nvfp4, make_nvfp4_weight, nvfp4_values

from ostro.kernels.grouped_gemm import mlp
from ostro.kernels.linear import is_packed, join_linear, linear, pack_linear
from ostro.kernels.nvfp4_linear import (
    Nvfp4Weight,
    nvfp4_linear,
    nvfp4_linear_reference,
    nvfp4_weight_values,
    pack_nvfp4,
    unpack_nvfp4,
)

E4M3 = torch.float8_e4m3fn
FINITE_SCALES = torch.tensor([b for b in range(256) if b & 127 != 127], dtype=torch.uint8)


def test_pack_nvfp4_worked_example() -> None:
    codes_OP = torch.zeros(1, 8, dtype=torch.uint8)
    codes_OP[0, 0] = 2
    words_BOW, scales_BOS = pack_nvfp4(codes_OP, torch.ones(1, 1).to(E4M3))
    assert words_BOW.flatten().tolist() == [0x80] + [0] * 15
    assert scales_BOS.flatten().tolist() == [0x50, 0]


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 16), (3, 112), (5, 128), (7, 400)])
def test_packing_keeps_every_value(outputs: int, inputs: int) -> None:
    codes_OP, scale_OG = make_nvfp4(outputs, inputs, torch.Generator().manual_seed(1))
    words_BOW, scales_BOS = pack_nvfp4(codes_OP, scale_OG)
    found = unpack_nvfp4(words_BOW, scales_BOS, inputs)
    assert torch.equal(found, nvfp4_values(codes_OP, scale_OG))


def test_packing_keeps_every_code_with_every_scale() -> None:
    scale_OG = FINITE_SCALES.view(E4M3)[:, None]
    codes_OP = torch.tensor([[2 * i | (2 * i + 1) << 4 for i in range(8)]], dtype=torch.uint8)
    codes_OP = codes_OP.repeat(len(scale_OG), 1)
    found = unpack_nvfp4(*pack_nvfp4(codes_OP, scale_OG), 16)
    assert torch.equal(found, nvfp4_values(codes_OP, scale_OG))


def test_nvfp4_linear_worked_example() -> None:
    codes_OP = torch.zeros(1, 8, dtype=torch.uint8)
    codes_OP[0, 0] = 2 | 7 << 4
    words_BOW, scales_BOS = pack_nvfp4(codes_OP, torch.tensor([[0.5]]).to(E4M3))
    weight = Nvfp4Weight(
        words_BOW=words_BOW, scales_BOS=scales_BOS, unit_O=torch.tensor([2.0]), num_inputs=16
    )
    assert nvfp4_linear(torch.ones(1, 16), weight).tolist() == [[7.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 9])
def test_nvfp4_linear_is_the_product_with_the_dequantised_weight(
    num_rows: int, dtype: torch.dtype
) -> None:
    weight, values_OI = make_nvfp4_weight(40, 272)
    assert torch.equal(nvfp4_weight_values(weight), values_OI)
    x_TI = torch.randn(num_rows, 272, generator=torch.Generator().manual_seed(1)).to(dtype)
    found_TO = nvfp4_linear(x_TI, weight)
    assert found_TO.dtype == dtype
    torch.testing.assert_close(found_TO, (x_TI.float() @ values_OI.T).to(dtype))


def test_linear_and_mlp_take_an_nvfp4_weight() -> None:
    (gate_up, _), (down, _) = make_nvfp4_weight(64, 48), make_nvfp4_weight(48, 32)
    x_TD = torch.randn(5, 48, generator=torch.Generator().manual_seed(2))
    assert torch.equal(linear(x_TD, gate_up), nvfp4_linear_reference(x_TD, gate_up))
    gate_TF, up_TF = nvfp4_linear_reference(x_TD, gate_up).chunk(2, dim=1)
    hidden_TF = torch.nn.functional.silu(gate_TF) * up_TF
    assert torch.equal(mlp(x_TD, gate_up, down), nvfp4_linear_reference(hidden_TF, down))


def test_an_nvfp4_weight_is_never_packed_for_the_cpu() -> None:
    weight, _ = make_nvfp4_weight(512, 256)
    assert pack_linear(weight) is weight
    assert not is_packed(weight)


def test_join_linear_keeps_units_that_differ() -> None:
    (first, first_OI), (second, second_OI) = make_nvfp4_weight(40, 208), make_nvfp4_weight(7, 208)
    second = Nvfp4Weight(
        words_BOW=second.words_BOW,
        scales_BOS=second.scales_BOS,
        unit_O=second.unit_O * 3,
        num_inputs=208,
    )
    joined = join_linear(first, second)
    assert isinstance(joined, Nvfp4Weight)
    assert joined.words_BOW.shape[:2] == (2, 47)
    expected_OI = torch.cat((first_OI, second_OI * 3))
    torch.testing.assert_close(nvfp4_weight_values(joined), expected_OI)


def test_join_linear_keeps_formats_apart() -> None:
    weight, _ = make_nvfp4_weight(16, 16)
    for other in (torch.ones(16, 16), make_fp8_weight(16, 16)):
        assert join_linear(weight, other) is None
        assert join_linear(other, weight) is None
