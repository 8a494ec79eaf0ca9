"""The expert MLP with NVFP4 weights and activations of the model's dtype.

    W[o, i] = code[o, i] * scale[o, i / 16] * unit;   y = x W^T

Codes are e2m1 (0, .5, 1, 1.5, 2, 3, 4, 6 and a sign), scales e4m3 for each 16 inputs of a row,
units float32 for a matrix: 0.5625 bytes a weight. A kernel makes bf16 of them on its way to the
tensor cores: code * scale has six significant bits, so that bf16 holds it exactly.

`pack_nvfp4` alone knows how both stand in memory. Inputs are cut into blocks of 128, filled up with
zeros. The block of an output is 16 words of 8 codes and 2 words of 4 scales:

    word w has inputs 32 f + 2 w + l in field f = 0..3 of half l = 0..1
    scale word w has in byte f the scale of inputs [32 f + 16 w, 32 f + 16 w + 16)

A field shifted to the left by 3 f shows its code in both halves at once, as bits of a bf16: sign
15, exponent and mantissa 8 to 6, its value times 2^-126. The bits of field 3 are those that the
others leave free. A scale has lost its sign bit, which is never set, to a fifth bit of exponent:
then none is subnormal, and a shift and a sum make it a bf16 too.

Shape legend: R rows, K experts per row, D hidden, F expert hidden, E local experts, O outputs,
I inputs, B blocks of inputs, W words of codes (16), S words of scales (2), G = I / 16 groups,
P = I / 2 bytes of codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ostro.kernels.grouped_gemm import swiglu

BLOCK_INPUTS = 128
WORDS, SCALE_WORDS = 16, 2  # of a block of an output
GROUP = 16  # inputs that share a scale
_FIELDS = 4
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BYTES_AROUND_ONE = 0x48, 0x58  # of scales from 0.5 to below 2
_SMALLEST_SCALE_EXPONENT = -9  # of a subnormal e4m3; stored as exponent 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Nvfp4Stack:
    """A matrix of each local expert, as `pack_nvfp4` orders it.

    Attributes:
        words_EBOW: int32 codes.
        scales_EBOS: int32 scales.
        num_inputs: I, which need not fill the last block.
    """

    words_EBOW: torch.Tensor
    scales_EBOS: torch.Tensor
    num_inputs: int

    def num_outputs(self) -> int:
        """O."""
        return self.words_EBOW.shape[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Nvfp4Experts:
    """The experts of one layer in NVFP4.

    Attributes:
        gate_up: Gate rows [0, F), up rows [F, 2F) of each expert.
        gate_unit_E: float32 unit of the gate rows.
        up_unit_E: Likewise of the up rows.
        down: Second matrix of each expert.
        down_unit_E: Its unit.
    """

    gate_up: Nvfp4Stack
    gate_unit_E: torch.Tensor
    up_unit_E: torch.Tensor
    down: Nvfp4Stack
    down_unit_E: torch.Tensor


def num_blocks(num_inputs: int) -> int:
    """B of so many inputs."""
    return -(-num_inputs // BLOCK_INPUTS)


def new_nvfp4_stack(
    num_experts: int, num_outputs: int, num_inputs: int, device: torch.device | str
) -> Nvfp4Stack:
    """Memory for a stack, not filled."""
    shape = num_experts, num_blocks(num_inputs), num_outputs
    return Nvfp4Stack(
        words_EBOW=torch.empty(*shape, WORDS, dtype=torch.int32, device=device),
        scales_EBOS=torch.empty(*shape, SCALE_WORDS, dtype=torch.int32, device=device),
        num_inputs=num_inputs,
    )


def random_nvfp4_stack(
    num_experts: int, num_outputs: int, num_inputs: int, device: torch.device | str
) -> tuple[Nvfp4Stack, float]:
    """A stack of random codes and of scales around 1, for benchmarks, and how large its values are.

    That is their root mean square; inputs fill blocks.
    """
    stack = new_nvfp4_stack(num_experts, num_outputs, num_inputs, device)
    stack.words_EBOW.random_(-(2**31), 2**31)
    stack.scales_EBOS.view(torch.uint8).random_(*_BYTES_AROUND_ONE)
    sample = unpack_nvfp4(stack.words_EBOW[0, :1], stack.scales_EBOS[0, :1], BLOCK_INPUTS)
    return stack, float(sample.square().mean().sqrt())


def pack_nvfp4(codes_OP: torch.Tensor, scale_OG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in the order in which kernels read it; no value changes.

    Args:
        codes_OP: uint8, two codes a byte, the even input in the low half.
        scale_OG: e4m3, finite.

    Returns:
        words_BOW and scales_BOS, int32; a group of scale 0 has codes 0, and the sign of a negative
        scale stands in its codes.

    Example:
        code 1.0 for input 0 alone, with scale 1, gives word 0x80 and scale word 0x50.
    """
    num_outputs, num_inputs = len(codes_OP), 2 * codes_OP.shape[1]
    blocks = num_blocks(num_inputs)
    scale_OG1 = scale_OG.float()[:, :, None]
    code = torch.stack((codes_OP & 15, codes_OP >> 4), dim=-1).view(num_outputs, -1, GROUP)
    code = torch.where(scale_OG1 == 0, 0, code.int() ^ (8 * (scale_OG1 < 0).int()))
    code = _padded(code.flatten(1), blocks * BLOCK_INPUTS)
    code = code.view(num_outputs, blocks, _FIELDS, WORDS * 2)
    table = _lane_bits(code.device)
    first = 16 * torch.arange(_FIELDS, device=code.device, dtype=torch.int32)[:, None]
    lanes = table.index_select(0, (code + first).flatten()).view(code.shape)
    words_OBW = lanes.sum(2, dtype=torch.int16).view(torch.int32)  # fields share no bit
    byte_OG = _padded(_scale_bytes(scale_OG), blocks * BLOCK_INPUTS // GROUP)
    byte = byte_OG.view(num_outputs, blocks, _FIELDS, SCALE_WORDS).transpose(2, 3)
    scales_OBS = byte.contiguous().view(torch.int32).squeeze(-1)
    return words_OBW.transpose(0, 1).contiguous(), scales_OBS.transpose(0, 1).contiguous()


def unpack_nvfp4(
    words_BOW: torch.Tensor, scales_BOS: torch.Tensor, num_inputs: int
) -> torch.Tensor:
    """Codes times scales, float32 [O, I]: what `pack_nvfp4` was made of."""
    lane = words_BOW.transpose(0, 1).contiguous().view(torch.int16).int()  # [O, B, 32]
    fields = [lane, lane << 3, lane << 6, _gathered(lane)]
    bits = torch.stack(fields, dim=2)
    code = ((bits >> 12) & 8) | ((bits >> 6) & 7)
    magnitude = torch.tensor(_MAGNITUDES, device=lane.device)
    values = torch.cat((magnitude, -magnitude))[code].flatten(1)
    byte = scales_BOS.transpose(0, 1).contiguous().view(torch.uint8).int()
    byte = byte.unflatten(-1, (SCALE_WORDS, _FIELDS)).transpose(2, 3).flatten(1)  # [O, groups]
    exponent = (byte >> 3) + _SMALLEST_SCALE_EXPONENT - 1
    scale = torch.ldexp(1 + (byte & 7) / 8, exponent).repeat_interleave(GROUP, dim=1)
    return (values * scale)[:, :num_inputs]


def expert_mlp_nvfp4(
    rows_RD: torch.Tensor,
    expert_RK: torch.Tensor,
    weight_RK: torch.Tensor,
    experts: Nvfp4Experts,
    *,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run every row through its local experts and add up the weighted results.

    Args:
        rows_RD: Hidden states; on a GPU they are multiplied in bf16.
        expert_RK: int64 local expert ids, different ones in a row, -1 where the k-th is not here.
        weight_RK: float32 gate weights.
        experts: Of this shard and layer.
        counts: int64 [1 + E] on the same device, to which is added how many pairs have no local
            expert, then how many each expert has.

    Returns:
        out_RD in the dtype of `rows_RD`; zeros for a row without a local expert.

    Raises:
        ValueError: On a GPU, D or F does not fill 16-byte steps of bf16.

    Example:
        as `expert_mlp` of the values that codes, scales and units multiply to.
    """
    if counts is None:
        counts = expert_RK.new_zeros(1 + len(experts.down_unit_E))
    if rows_RD.is_cuda:
        from ostro.kernels.gpu.expert_mlp import expert_mlp_nvfp4_triton

        return expert_mlp_nvfp4_triton(rows_RD, expert_RK, weight_RK, experts, counts)
    counts += torch.bincount(expert_RK.flatten() + 1, minlength=len(counts))
    return expert_mlp_nvfp4_reference(rows_RD, expert_RK, weight_RK, experts)


def expert_mlp_nvfp4_reference(
    rows_RD: torch.Tensor, expert_RK: torch.Tensor, weight_RK: torch.Tensor, experts: Nvfp4Experts
) -> torch.Tensor:
    """Meaning of `expert_mlp_nvfp4`, expert by expert; sums in float32."""
    out_RD = torch.zeros(rows_RD.shape, device=rows_RD.device)
    for e in expert_RK[expert_RK >= 0].unique().tolist():
        row, k = (expert_RK == e).nonzero(as_tuple=True)
        hidden = swiglu(rows_RD[row].float() @ gate_up_values(experts, e).T)
        y = hidden @ down_values(experts, e).T
        out_RD[row] += weight_RK[row, k][:, None] * y
    return out_RD.to(rows_RD.dtype)


def gate_up_values(experts: Nvfp4Experts, expert: int) -> torch.Tensor:
    """Gate and up rows of one expert in float32, [2F, D]."""
    gate, up = _values(experts.gate_up, expert).chunk(2)
    return torch.cat((gate * experts.gate_unit_E[expert], up * experts.up_unit_E[expert]))


def down_values(experts: Nvfp4Experts, expert: int) -> torch.Tensor:
    """The second matrix of one expert in float32, [D, F]."""
    return _values(experts.down, expert) * experts.down_unit_E[expert]


def _values(stack: Nvfp4Stack, expert: int) -> torch.Tensor:
    return unpack_nvfp4(stack.words_EBOW[expert], stack.scales_EBOS[expert], stack.num_inputs)


def _padded(rows: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))


def _lane_bits(device: torch.device) -> torch.Tensor:
    """Bits of each code in each field of a half word, int16 [4 * 16], by 16 f + code."""
    table = []
    for field in range(_FIELDS):
        for code in range(16):
            bits = (code & 8) << 12 | (code & 7) << 6
            table.append(_scattered(bits) if field == _FIELDS - 1 else bits >> 3 * field)
    return torch.tensor(table, dtype=torch.int32, device=device).to(torch.int16)


def _scattered(bits: int) -> int:
    """Bits 15, 8, 7 and 6 of a code in the bits that the fields 0 to 2 leave free."""
    return (bits & 0x8000) >> 1 | (bits & 0x0180) << 3 | (bits & 0x0040) << 7


def _gathered(lane: torch.Tensor) -> torch.Tensor:
    """What `_scattered` has scattered; other bits are other fields'."""
    return (lane << 1) & 0x8000 | (lane >> 3) & 0x0180 | (lane >> 7) & 0x0040


def _scale_bytes(scale_OG: torch.Tensor) -> torch.Tensor:
    """Magnitudes with five bits of exponent and three of mantissa, uint8; 0 stays 0."""
    mantissa, exponent = torch.frexp(scale_OG.float().abs())  # mantissas in [0.5, 1)
    byte = (exponent - _SMALLEST_SCALE_EXPONENT) * 8 + (mantissa * 16).int() - 8
    return torch.where(mantissa == 0, 0, byte).to(torch.uint8)
