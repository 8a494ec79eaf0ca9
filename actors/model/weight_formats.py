"""Quantised weights: what their values mean, how they are made, and a row order to undo.

    FP8     W = value * scale                              e4m3, one scale for the tensor
    NVFP4   W = code * scale of its 16 / global scale      e2m1, two codes a byte, even column low

Both official formats keep a scale for the layer's inputs too, for kernels that multiply in the
format itself (`fp8_weight`); dequantising leaves it aside.
Source: `static per-tensor` of transformers' and Mistral's FP8 checkpoints; compressed-tensors'
`nvfp4-pack-quantized`, whose global scales are divisors.

Shape letters: O outputs, I inputs, G = I / 16 groups of a row, H heads, A head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ostro.configs.quantization import WeightFormat
from ostro.kernels.fp8_linear import Fp8Weight

NVFP4_GROUP = 16
_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_CODE_MAX = 6.0
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between neighbouring magnitudes
_SIGN = 8
_SERIAL_VALUES = 32_767  # torch cuts longer operations for its threads


@dataclass(frozen=True, slots=True, kw_only=True)
class RawWeight:
    """One weight as a checkpoint holds it, not yet dequantised.

    Attributes:
        weight_format: What the other fields mean.
        values: PLAIN and FP8 in the weight's own shape; NVFP4 packed_OI, uint8 [O, I / 2].
        scale: FP8 one value; NVFP4 scale_OG, e4m3.
        global_scale: NVFP4 one float32, a divisor.
        input_scale: One value for the layer's inputs, if the checkpoint has it.
    """

    weight_format: WeightFormat
    values: torch.Tensor
    scale: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None


def dequantize(raw: RawWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight's values, computed in float32 and rounded once.

    Example:
        FP8 value 2.0 with scale 0.5 gives 1.0; the NVFP4 byte 0x51 with scale 4 and global scale 2
        gives the row [1.0, 6.0].
    """
    shape = list(raw.values.shape)
    shape[-1] *= 2 if raw.weight_format is WeightFormat.NVFP4 else 1
    out = torch.empty(shape, dtype=dtype, device=raw.values.device)
    dequantize_into(out, raw)
    return out


def dequantize_into(out: torch.Tensor, raw: RawWeight) -> None:
    """As `dequantize`, into contiguous memory of the weight's shape.

    FP8 values are looked up: a ninth of the time of a conversion and a product.
    """
    if raw.weight_format is WeightFormat.PLAIN:
        out.copy_(raw.values)
        return
    steps = _steps(raw)
    is_fp8 = raw.weight_format is WeightFormat.FP8
    table = _fp8_values(steps).to(out.dtype) if is_fp8 else _nvfp4_values(steps.device)
    for chunk in _row_chunks(out):
        byte = raw.values[chunk].view(torch.uint8).flatten().int()
        if is_fp8:
            torch.index_select(table, 0, byte, out=out[chunk].view(-1))
            continue
        groups = table.index_select(0, byte).view(-1, steps.shape[1], NVFP4_GROUP)
        out[chunk].copy_(groups.mul_(steps[chunk, :, None]).flatten(1))


def fp8_weight(raw: RawWeight) -> Fp8Weight:
    """An FP8 weight as kernels multiply it; its values are `raw`'s own.

    Raises:
        ValueError: It is another format's, or lacks its scale or that of its inputs.
    """
    if raw.weight_format is not WeightFormat.FP8 or raw.scale is None or raw.input_scale is None:
        raise ValueError("only an fp8 weight with its scale and that of its inputs is multiplied")
    return Fp8Weight(
        values_OI=raw.values,
        scale=raw.scale.float().view(()),
        input_scale=raw.input_scale.float().view(()),
    )


def _steps(raw: RawWeight) -> torch.Tensor:
    """What a stored value is multiplied by, float32: FP8 one for all, NVFP4 steps_OG."""
    if raw.scale is None:
        raise ValueError(f"a {raw.weight_format.value} weight without its scale")
    if raw.weight_format is WeightFormat.FP8:
        return raw.scale.float().view(())
    if raw.global_scale is None:
        raise ValueError("an nvfp4 weight without its global scale")
    return raw.scale.float() / raw.global_scale.float().view(())


def quantize(weight_OI: torch.Tensor, weight_format: WeightFormat) -> RawWeight:
    """Round a weight to a format, with scales taken from its largest magnitudes.

    No scale for inputs comes out: that takes activations, which only a calibration sees. PLAIN
    gives bf16. Where a value is not finite, neither is a scale.
    """
    if weight_format is WeightFormat.PLAIN:
        return RawWeight(weight_format=weight_format, values=weight_OI.to(torch.bfloat16))
    lowest, highest = torch.aminmax(weight_OI)
    largest = torch.maximum(-lowest, highest).float()
    largest = torch.where(largest == 0, 1.0, largest)
    if weight_format is WeightFormat.FP8:
        scale = (largest / _FP8_MAX).to(torch.bfloat16)
        values = torch.empty_like(weight_OI, dtype=_FP8)
        for rows in _row_chunks(weight_OI):
            values[rows] = (weight_OI[rows].float() / scale.float()).clamp_(-_FP8_MAX, _FP8_MAX)
        return RawWeight(weight_format=weight_format, values=values, scale=scale)
    return _quantize_nvfp4(weight_OI, _FP8_MAX * _CODE_MAX / largest)


def _quantize_nvfp4(weight_OI: torch.Tensor, global_scale: torch.Tensor) -> RawWeight:
    num_rows, width = weight_OI.shape
    packed = weight_OI.new_empty(num_rows, width // 2, dtype=torch.uint8)
    scale_OG = weight_OI.new_empty(num_rows, width // NVFP4_GROUP, dtype=_FP8)
    for rows in _row_chunks(weight_OI):
        groups = weight_OI[rows].float().view(-1, width // NVFP4_GROUP, NVFP4_GROUP)
        scale = groups.abs().amax(-1) / _CODE_MAX * global_scale
        scale_OG[rows] = scale.clamp_(max=_FP8_MAX)
        step = (scale_OG[rows].float() / global_scale)[:, :, None]
        code = _nearest_code(torch.where(step > 0, groups / step, 0.0).flatten(1))
        packed[rows] = code[:, 0::2] | (code[:, 1::2] << 4)
    return RawWeight(
        weight_format=WeightFormat.NVFP4,
        values=packed,
        scale=scale_OG,
        global_scale=global_scale.view(1),
    )


def _nearest_code(ratio: torch.Tensor) -> torch.Tensor:
    """The e2m1 code next to each value, uint8; of two as near the smaller, and no minus zero.

    Compared with each middle in turn, as that runs over whole vectors: a fifth of a search's time.
    """
    magnitude = ratio.abs()
    code = torch.zeros_like(ratio, dtype=torch.uint8)
    for middle in _MIDDLES:
        code += (magnitude > middle).view(torch.uint8)
    return code.add_(((ratio < 0) & (code > 0)).view(torch.uint8), alpha=_SIGN)


def _row_chunks(tensor: torch.Tensor) -> Iterator[slice]:
    """Slices of rows; on the CPU few, so that what is made on the way stays in the cache.

    So few that torch does not cut them for its threads: where cores are busy, those wait for each
    other at the end of every operation, and a weight took ten times as long.
    """
    num_rows = len(tensor) if tensor.is_cuda else _SERIAL_VALUES // max(1, tensor.shape[-1])
    num_rows = max(1, num_rows)
    for start in range(0, len(tensor), num_rows):
        yield slice(start, start + num_rows)


def requantize(raw: RawWeight, weight_format: WeightFormat) -> RawWeight:
    """The weight in another format; in its own it stays as it is, but for PLAIN, which is bf16."""
    if raw.weight_format is weight_format:
        is_plain = weight_format is WeightFormat.PLAIN
        return replace(raw, values=raw.values.to(torch.bfloat16)) if is_plain else raw
    if raw.weight_format is WeightFormat.PLAIN:
        return quantize(raw.values, weight_format)
    if weight_format is WeightFormat.PLAIN:
        return RawWeight(weight_format=weight_format, values=dequantize(raw, torch.bfloat16))
    return quantize(dequantize(raw, torch.float32), weight_format)


def join_rows(first: RawWeight, second: RawWeight) -> RawWeight:
    """Two PLAIN or FP8 weights as one, `second`'s rows below; FP8 then has one scale for both.

    Exact if their scales are equal, as in the official checkpoint; else both are rounded anew.
    """
    values = torch.cat((first.values, second.values))
    if first.scale is None or second.scale is None or bool(first.scale == second.scale):
        return replace(first, values=values, input_scale=_larger(first, second))
    both = [dequantize(part, torch.float32) for part in (first, second)]
    return replace(
        quantize(torch.cat(both), first.weight_format), input_scale=_larger(first, second)
    )


def pairs_to_halves(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder the rows of each head from rotated pairs side by side to the pairs' two halves.

    Example:
        one head of four rows [a, b, c, d] becomes [a, c, b, d].
    """
    return weight.view(num_heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def halves_to_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo `pairs_to_halves`."""
    return weight.view(num_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _larger(first: RawWeight, second: RawWeight) -> torch.Tensor | None:
    if first.input_scale is None or second.input_scale is None:
        return None
    return torch.maximum(first.input_scale.view(()), second.input_scale.view(()))


def _fp8_values(step: torch.Tensor) -> torch.Tensor:
    """The value of every byte, [256], float32."""
    return torch.arange(256, dtype=torch.uint8, device=step.device).view(_FP8).float() * step


def _nvfp4_values(device: torch.device) -> torch.Tensor:
    """The values of the two codes in every byte, [256, 2], float32."""
    magnitudes = torch.tensor(_MAGNITUDES, device=device)
    values = torch.cat((magnitudes, -magnitudes))
    byte = torch.arange(256, device=device)
    return torch.stack((values[byte & 15], values[byte >> 4]), dim=1)
