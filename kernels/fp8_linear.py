"""Linear layers whose weight and inputs are FP8 e4m3, scales fixed beforehand.

    W = values * scale;   x -> clamp(x / input_scale), rounded to e4m3;   y = (x W^T) * both scales

One scale for the weight and one for its inputs, as the official FP8 checkpoint has them: nothing
looks for a maximum while serving.

Shape legend: T rows, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_STEP = 16  # bytes to which cuBLAS wants the rows of weight, input and output aligned


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Weight:
    """The weight of one linear layer in FP8 e4m3.

    Attributes:
        values_OI: Contiguous.
        scale: float32 value of one unit of `values_OI`, without dimensions.
        input_scale: Likewise of the rows that it multiplies.
    """

    values_OI: torch.Tensor
    scale: torch.Tensor
    input_scale: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Rows:
    """Rows that whoever made them has rounded already, for the one weight they are for.

    Attributes:
        values_TI: e4m3, in units of that weight's input scale.
        dtype: Of the product.
    """

    values_TI: torch.Tensor
    dtype: torch.dtype


def fp8_linear(x_TI: torch.Tensor | Fp8Rows, weight: Fp8Weight) -> torch.Tensor:
    """Multiply rows by an FP8 weight: x W^T, [T, O] in the dtype of `x_TI`.

    Raises:
        ValueError: On a GPU, I or O does not divide by 16.

    Example:
        values [[2., 4.]] of scale 0.5, input scale 1: x [[1.1, 3.]] enters as [[1.125, 3.]] and
        gives [[7.125]].
    """
    if weight.values_OI.is_cuda:
        return fp8_linear_cuda(x_TI, weight)
    return fp8_linear_reference(x_TI, weight)


def fp8_linear_cuda(x_TI: torch.Tensor | Fp8Rows, weight: Fp8Weight) -> torch.Tensor:
    """`fp8_linear` by Triton for very few rows, else by cuBLAS of rows that Triton has rounded.

    Sums are not taken by the fast accumulation, which on Hopper keeps 14 bits of them.
    """
    from ostro.kernels.gpu.fp8_linear import (
        MAX_FEW_INPUTS,
        MAX_FEW_ROWS,
        fp8_linear_triton,
        quantize_fp8_triton,
    )

    if any(size % _STEP for size in weight.values_OI.shape):
        raise ValueError(
            f"an FP8 weight of {list(weight.values_OI.shape)}: both must divide by {_STEP} on a GPU"
        )
    num_rows, num_in = (x_TI.values_TI if isinstance(x_TI, Fp8Rows) else x_TI).shape
    if num_rows <= MAX_FEW_ROWS and num_in <= MAX_FEW_INPUTS:
        return fp8_linear_triton(x_TI, weight)
    if not isinstance(x_TI, Fp8Rows):
        values_TI = quantize_fp8_triton(x_TI, weight.input_scale)
        x_TI = Fp8Rows(values_TI=values_TI, dtype=x_TI.dtype)
    return torch._scaled_mm(
        x_TI.values_TI,
        weight.values_OI.t(),  # column-major, the one form that Hopper multiplies
        scale_a=weight.input_scale,
        scale_b=weight.scale,
        out_dtype=x_TI.dtype,
        use_fast_accum=False,
    )


def fp8_linear_reference(x_TI: torch.Tensor | Fp8Rows, weight: Fp8Weight) -> torch.Tensor:
    """Meaning of `fp8_linear`; sums in float32."""
    if not isinstance(x_TI, Fp8Rows):
        values_TI = quantize_fp8_reference(x_TI, weight.input_scale)
        x_TI = Fp8Rows(values_TI=values_TI, dtype=x_TI.dtype)
    sum_TO = x_TI.values_TI.float() @ weight.values_OI.float().T
    return (sum_TO * (weight.input_scale * weight.scale)).to(x_TI.dtype)


def quantize_fp8(x_TI: torch.Tensor, input_scale: torch.Tensor) -> torch.Tensor:
    """Rows in units of a scale, rounded to FP8 e4m3; what is too large becomes 448, NaN stays NaN.

    Args:
        x_TI: Rows may be strided.
        input_scale: float32, without dimensions.

    Example:
        x [[1.1, -9000.]], scale 0.5 give [[2.25, -448.]].
    """
    if x_TI.is_cuda:
        from ostro.kernels.gpu.fp8_linear import quantize_fp8_triton

        return quantize_fp8_triton(x_TI, input_scale)
    return quantize_fp8_reference(x_TI, input_scale)


def quantize_fp8_reference(x_TI: torch.Tensor, input_scale: torch.Tensor) -> torch.Tensor:
    """Plain-torch meaning of `quantize_fp8`."""
    return (x_TI.float() / input_scale).clamp(-_FP8_MAX, _FP8_MAX).to(_FP8)
