"""Linear layers whose weights may be packed for the CPU.

oneDNN reorders a weight once into the layout that its products read fastest. On CPU in bfloat16
that streams small batches 1.4 to 1.8 times faster than the plain product (1 to 8 rows of a
512 x 1024 weight: 55-72 against 93-106 us, one core). Other devices and dtypes keep plain weights.

Shape legend: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch

_MIN_VALUES = 2**16  # smaller weights stay in cache, where packing gains nothing


def pack_linear(weight_OI: torch.Tensor) -> torch.Tensor:
    """The weight in the form that `linear` reads fastest: packed, or itself.

    A packed weight is good for `linear` alone and holds its own memory.
    """
    is_packed_faster = (
        weight_OI.device.type == "cpu"
        and weight_OI.dtype == torch.bfloat16
        and weight_OI.numel() >= _MIN_VALUES
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    if not is_packed_faster:
        return weight_OI
    with torch.inference_mode():
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI, 1)
    return packed


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """Multiply rows by a plain or packed weight: x W^T, [T, O].

    Example:
        x [[1., 2.]], weight [[3., 4.]] give [[11.]].
    """
    if not weight_OI.is_mkldnn:
        return torch.nn.functional.linear(x_TI, weight_OI)
    out_TO: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, None, "none", [], "")
    return out_TO


def linear_reference(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """Meaning of `linear`, for a plain weight, in float32."""
    return (x_TI.float() @ weight_OI.float().T).to(x_TI.dtype)
