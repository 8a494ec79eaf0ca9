"""Linear layers whose weights may be packed for the CPU, or be FP8 or NVFP4.

A packed weight stands in the order in which the CPU operators read it (`cpu/tile.h`): 16 outputs
side by side, two inputs of each together. On CPU in bfloat16 that streams small batches at the
memory's speed, twice as fast as the plain product; other devices and dtypes keep plain weights.
An FP8 or NVFP4 weight (`fp8_linear`, `nvfp4_linear`) brings its scales along and stays as it is.

Shape legend: T rows, I inputs, O outputs; a packed weight is [O / 16, I / 2, 16, 2].
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias, TypeGuard, overload

import torch

from ostro.kernels.cpu import library
from ostro.kernels.fp8_linear import Fp8Rows, Fp8Weight, fp8_linear
from ostro.kernels.nvfp4_linear import Nvfp4Weight, join_nvfp4, nvfp4_linear

LinearWeight: TypeAlias = torch.Tensor | Fp8Weight | Nvfp4Weight

_PANEL = 16


@overload
def pack_linear(weight_OI: torch.Tensor) -> torch.Tensor: ...


@overload
def pack_linear(weight_OI: LinearWeight) -> LinearWeight: ...


def pack_linear(weight_OI: LinearWeight) -> LinearWeight:
    """The weight in the form that `linear` reads fastest: packed, or itself.

    A packed weight is good for `linear` and `expert_mlp` alone. Leading dimensions, of a stack of
    weights, stay.
    """
    if not isinstance(weight_OI, torch.Tensor):
        return weight_OI
    num_out, num_in = weight_OI.shape[-2:]
    if not library.serves(weight_OI) or num_out % _PANEL or num_in % 2:
        return weight_OI
    pairs = weight_OI.unflatten(-1, (num_in // 2, 2))
    panels = pairs.unflatten(-3, (num_out // _PANEL, _PANEL))
    packed: torch.Tensor = panels.transpose(-3, -2).contiguous()
    return packed


def is_packed(weight: LinearWeight) -> TypeGuard[torch.Tensor]:
    """Whether a weight, or a stack of them, is packed."""
    return isinstance(weight, torch.Tensor) and weight.dim() >= 4


def join_linear(first_OI: LinearWeight, second_OI: LinearWeight) -> LinearWeight | None:
    """Two weights of the same inputs as one, `second_OI`'s outputs after the others.

    None where one product cannot serve both: a packed weight, FP8 with different scales, or two
    formats.

    Example:
        [[1., 2.]] and [[3., 4.]] give [[1., 2.], [3., 4.]].
    """
    if isinstance(first_OI, Fp8Weight) and isinstance(second_OI, Fp8Weight):
        pairs = ("scale", "input_scale")
        if any(not torch.equal(getattr(first_OI, n), getattr(second_OI, n)) for n in pairs):
            return None
        return replace(first_OI, values_OI=torch.cat((first_OI.values_OI, second_OI.values_OI)))
    if isinstance(first_OI, Nvfp4Weight) and isinstance(second_OI, Nvfp4Weight):
        return join_nvfp4(first_OI, second_OI)
    if not isinstance(first_OI, torch.Tensor) or not isinstance(second_OI, torch.Tensor):
        return None
    if is_packed(first_OI) or is_packed(second_OI):
        return None
    return torch.cat((first_OI, second_OI))


def linear(x_TI: torch.Tensor | Fp8Rows, weight_OI: LinearWeight) -> torch.Tensor:
    """Multiply rows by a plain, packed, FP8 or NVFP4 weight: x W^T, [T, O].

    Raises:
        TypeError: The rows are rounded to FP8, and the weight is not.

    Example:
        x [[1., 2.]], weight [[3., 4.]] give [[11.]].
    """
    if isinstance(weight_OI, Fp8Weight):
        return fp8_linear(x_TI, weight_OI)
    if isinstance(x_TI, Fp8Rows):
        raise TypeError("rows in FP8 meet a weight that is not")
    if isinstance(weight_OI, Nvfp4Weight):
        return nvfp4_linear(x_TI, weight_OI)
    if not is_packed(weight_OI):
        return torch.nn.functional.linear(x_TI, weight_OI)
    return linear_cpu(x_TI, weight_OI, x_TI.dtype)


def linear_wide(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """`linear` in float32, for logits; a plain weight's product is rounded to its dtype first."""
    if not is_packed(weight_OI):
        return torch.nn.functional.linear(x_TI, weight_OI).float()
    return linear_cpu(x_TI, weight_OI, torch.float32)


def linear_cpu(x_TI: torch.Tensor, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`linear` for a packed weight, summed in float32, rounded to bfloat16 or kept.

    A row's result does not depend on the rows beside it.
    """
    native = library.required()
    if x_TI.stride(-1) != 1:
        x_TI = x_TI.contiguous()
    (num_rows, num_in), num_out = x_TI.shape, packed.shape[0] * _PANEL
    out_TO = torch.empty(num_rows, num_out, dtype=dtype)
    run = native.ostro_linear_wide if dtype == torch.float32 else native.ostro_linear
    run(
        x_TI.data_ptr(),
        x_TI.stride(0),
        packed.data_ptr(),
        num_rows,
        num_in,
        num_out,
        out_TO.data_ptr(),
        torch.get_num_threads(),
    )
    return out_TO


def linear_reference(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """Meaning of `linear`, for a plain weight, in float32."""
    return (x_TI.float() @ weight_OI.float().T).to(x_TI.dtype)
