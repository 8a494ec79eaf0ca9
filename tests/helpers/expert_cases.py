"""Rows, their experts and weights of those, also in FP8 and NVFP4, for tests of the expert MLP."""

from __future__ import annotations

import torch

from ostro.kernels.fp8_experts import Fp8Experts
from ostro.kernels.fp8_linear import Fp8Weight
from ostro.kernels.nvfp4_experts import Nvfp4Experts, Nvfp4Stack, new_nvfp4_stack
from ostro.kernels.nvfp4_linear import Nvfp4Weight, pack_nvfp4

Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_routed(
    num_rows: int, num_experts: int, hidden: int, absent: float, dtype: torch.dtype
) -> Routed:
    """rows_RD, expert_RK (four, about a share of `absent` -1), weight_RK; NaN where none is."""
    generator = torch.Generator().manual_seed(num_rows)
    scores = torch.rand(num_rows, max(num_experts, 4), generator=generator)
    expert_RK = scores.argsort(dim=1)[:, :4]
    expert_RK[torch.rand(num_rows, 4, generator=generator) < absent] = -1
    expert_RK[expert_RK >= num_experts] = -1
    rows_RD = torch.randn(num_rows, hidden, generator=generator).to(dtype)
    weight_RK = torch.rand(num_rows, 4, generator=generator)
    weight_RK[expert_RK < 0] = torch.nan
    return rows_RD, expert_RK, weight_RK


def make_weights(
    num_experts: int, hidden: int, inner: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up_EHD and down_EDF that keep rows at about unit size."""
    generator = torch.Generator().manual_seed(num_experts)
    gate_up = torch.randn(num_experts, 2 * inner, hidden, generator=generator) / hidden**0.5
    down = torch.randn(num_experts, hidden, inner, generator=generator) / inner**0.5
    return gate_up.to(dtype), down.to(dtype)


def make_fp8_experts(num_experts: int, hidden: int, inner: int, device: str = "cpu") -> Fp8Experts:
    """Experts whose four scales all differ."""
    gate_up_EHD, down_EDF = make_weights(num_experts, hidden, inner, torch.float32)
    step_E = torch.arange(num_experts) / num_experts
    gate_up_scale_E, down_scale_E = 0.01 + step_E / 100, 0.02 - step_E / 100
    return Fp8Experts(
        gate_up_EHD=_to_fp8(gate_up_EHD, gate_up_scale_E).to(device),
        gate_up_scale_E=gate_up_scale_E.to(device),
        gate_up_input_scale_E=(0.01 + step_E / 50).to(device),
        down_EDF=_to_fp8(down_EDF, down_scale_E).to(device),
        down_scale_E=down_scale_E.to(device),
        down_input_scale_E=(0.02 + step_E / 50).to(device),
    )


def make_nvfp4_experts(
    num_experts: int, hidden: int, inner: int, device: str = "cpu"
) -> tuple[Nvfp4Experts, torch.Tensor, torch.Tensor]:
    """Experts of random codes and scales and different units; gate_up_EHD, down_EDF in float32."""
    gate_up, gate_up_EHD = _nvfp4_stack(num_experts, 2 * inner, hidden)
    down, down_EDF = _nvfp4_stack(num_experts, hidden, inner)
    step_E = torch.arange(num_experts) / num_experts
    gate_unit_E, up_unit_E = 0.3 + step_E / 10, 0.4 - step_E / 10
    down_unit_E = 0.2 + step_E / 10
    units_EH = torch.stack((gate_unit_E, up_unit_E), 1).repeat_interleave(inner, 1)
    experts = Nvfp4Experts(
        gate_up=_nvfp4_to(gate_up, device),
        gate_unit_E=gate_unit_E.to(device),
        up_unit_E=up_unit_E.to(device),
        down=_nvfp4_to(down, device),
        down_unit_E=down_unit_E.to(device),
    )
    gate_up_EHD = gate_up_EHD * units_EH[:, :, None]
    down_EDF = down_EDF * down_unit_E[:, None, None]
    return experts, gate_up_EHD.to(device), down_EDF.to(device)


def _nvfp4_stack(num_experts: int, outputs: int, inputs: int) -> tuple[Nvfp4Stack, torch.Tensor]:
    generator = torch.Generator().manual_seed(outputs)
    stack = new_nvfp4_stack(num_experts, outputs, inputs, "cpu")
    values = []
    for words_BOW, scales_BOS in zip(stack.words_EBOW, stack.scales_EBOS, strict=True):
        codes_OP, scale_OG = make_nvfp4(outputs, inputs, generator)
        for place, packed in zip(
            (words_BOW, scales_BOS), pack_nvfp4(codes_OP, scale_OG), strict=True
        ):
            place.copy_(packed)
        values.append(nvfp4_values(codes_OP, scale_OG))
    return stack, torch.stack(values)


def make_nvfp4_weight(
    outputs: int, inputs: int, device: str = "cpu"
) -> tuple[Nvfp4Weight, torch.Tensor]:
    """A weight of random codes and scales and a unit for each output; its values in float32."""
    codes_OP, scale_OG = make_nvfp4(outputs, inputs, torch.Generator().manual_seed(outputs))
    words_BOW, scales_BOS = pack_nvfp4(codes_OP, scale_OG)
    unit_O = 0.3 + torch.arange(outputs) / outputs
    weight = Nvfp4Weight(
        words_BOW=words_BOW.to(device),
        scales_BOS=scales_BOS.to(device),
        unit_O=unit_O.to(device),
        num_inputs=inputs,
    )
    return weight, (nvfp4_values(codes_OP, scale_OG) * unit_O[:, None]).to(device)


def make_nvfp4(
    outputs: int, inputs: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """codes_OP and scale_OG that keep rows at a few times unit size; some scales are odd ones."""
    codes_OP = torch.randint(256, (outputs, inputs // 2), generator=generator).to(torch.uint8)
    scale_OG = torch.rand(outputs, inputs // 16, generator=generator) + 0.1
    odd = torch.tensor([0.0, 2.0**-9, 7 * 2.0**-9, -0.5])
    scale_OG = 2 * scale_OG / inputs**0.5
    scale_OG.view(-1)[: len(odd)] = odd[: scale_OG.numel()]
    return codes_OP, scale_OG.to(torch.float8_e4m3fn)


def nvfp4_values(codes_OP: torch.Tensor, scale_OG: torch.Tensor) -> torch.Tensor:
    """Codes times scales in float32, by a table of all codes."""
    magnitude = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    code = torch.stack((codes_OP & 15, codes_OP >> 4), dim=-1).flatten(1).long()
    return torch.cat((magnitude, -magnitude))[code] * scale_OG.float().repeat_interleave(16, 1)


def _nvfp4_to(stack: Nvfp4Stack, device: str) -> Nvfp4Stack:
    return Nvfp4Stack(
        words_EBOW=stack.words_EBOW.to(device),
        scales_EBOS=stack.scales_EBOS.to(device),
        num_inputs=stack.num_inputs,
    )


def make_fp8_weight(outputs: int, inputs: int, device: str = "cpu") -> Fp8Weight:
    """A weight that keeps rows at about unit size."""
    generator = torch.Generator().manual_seed(outputs)
    weight_OI = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    scale = torch.tensor(0.003)
    return Fp8Weight(
        values_OI=_to_fp8(weight_OI[None], scale[None])[0].to(device),
        scale=scale.to(device),
        input_scale=torch.tensor(0.02, device=device),
    )


def _to_fp8(weight_EOI: torch.Tensor, scale_E: torch.Tensor) -> torch.Tensor:
    return (weight_EOI / scale_E[:, None, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
