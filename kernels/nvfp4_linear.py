"""Linear layers whose weight is NVFP4, and the order in which kernels read such a weight.

    W[o, i] = code[o, i] * scale[o, i / 16] * unit[o];   y = x W^T

Codes are e2m1 (0, .5, 1, 1.5, 2, 3, 4, 6 and a sign), scales e4m3 for each 16 inputs of a row,
units float32: 0.5625 bytes a weight. A unit is a whole matrix' own, and every output has it, so
that matrices of different units can be one. Inputs keep their dtype: the scales that checkpoints
have for them are for kernels that round inputs to four bits too. On a GPU a kernel makes bf16 of a
weight on its way to the tensor cores: code * scale has six significant bits, so that bf16 holds it
exactly.

`pack_nvfp4` alone knows how both stand in memory. Inputs are cut into blocks of 128, filled up with
zeros. The block of an output is 16 words of 8 codes and 2 words of 4 scales:

    word w has inputs 32 f + 2 w + l in field f = 0..3 of half l = 0..1
    scale word w has in byte f the scale of inputs [32 f + 16 w, 32 f + 16 w + 16)

A field shifted to the left by 3 f shows its code in both halves at once, as bits of a bf16: sign
15, exponent and mantissa 8 to 6, its value times 2^-126. The bits of field 3 are those that the
others leave free. A scale has lost its sign bit, which is never set, to a fifth bit of exponent:
then none is subnormal, and a shift and a sum make it a bf16 too.

Shape legend: T rows, O outputs, I inputs, B blocks of inputs, W words of codes (16), S words of
scales (2), G = I / 16 groups, P = I / 2 bytes of codes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

BLOCK_INPUTS = 128
WORDS, SCALE_WORDS = 16, 2  # of a block of an output
GROUP = 16  # inputs that share a scale
_FIELDS = 4
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SMALLEST_SCALE_EXPONENT = -9  # of a subnormal e4m3; stored as exponent 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Nvfp4Weight:
    """The weight of one linear layer in NVFP4, as `pack_nvfp4` orders it.

    Attributes:
        words_BOW: int32 codes.
        scales_BOS: int32 scales.
        unit_O: float32 unit of each output.
        num_inputs: I, which need not fill the last block.
    """

    words_BOW: torch.Tensor
    scales_BOS: torch.Tensor
    unit_O: torch.Tensor
    num_inputs: int


def nvfp4_linear(x_TI: torch.Tensor, weight: Nvfp4Weight) -> torch.Tensor:
    """Multiply rows by an NVFP4 weight: x W^T, [T, O] in the dtype of `x_TI`.

    On a GPU rows are multiplied in bf16, and a row's result does not depend on the rows beside it.

    Example:
        codes 1 and 6 of scale 0.5 and unit 2 are a weight [[1., 6., 0., ...]]; x [[1., 1., ...]]
        gives [[7.]].
    """
    if x_TI.is_cuda:
        from ostro.kernels.gpu.nvfp4_linear import nvfp4_linear_triton

        return nvfp4_linear_triton(x_TI, weight)
    return nvfp4_linear_reference(x_TI, weight)


def nvfp4_linear_reference(x_TI: torch.Tensor, weight: Nvfp4Weight) -> torch.Tensor:
    """Meaning of `nvfp4_linear`; sums in float32."""
    return (x_TI.float() @ nvfp4_weight_values(weight).T).to(x_TI.dtype)


def join_nvfp4(first: Nvfp4Weight, second: Nvfp4Weight) -> Nvfp4Weight:
    """Two weights of the same inputs as one, `second`'s outputs after the others."""
    return replace(
        first,
        words_BOW=torch.cat((first.words_BOW, second.words_BOW), dim=1),
        scales_BOS=torch.cat((first.scales_BOS, second.scales_BOS), dim=1),
        unit_O=torch.cat((first.unit_O, second.unit_O)),
    )


def nvfp4_weight_values(weight: Nvfp4Weight) -> torch.Tensor:
    """The weight itself, float32 [O, I]."""
    values_OI = unpack_nvfp4(weight.words_BOW, weight.scales_BOS, weight.num_inputs)
    return values_OI * weight.unit_O[:, None]


def num_blocks(num_inputs: int) -> int:
    """B of so many inputs."""
    return -(-num_inputs // BLOCK_INPUTS)


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
