"""Small tensors of the host on their way to a device, as one copy.

A copy of its own costs the host ten microseconds and more, and waits where the memory is not
pinned. So they stand one after the other in one piece of pinned memory; a single copy takes it to
the device, nobody waits for it, and there they are views.

Pinned memory is torch's: it hands a piece out again only when an event tells that the copy from it
is through. So the next step is packed while this one's copy is under way, and from the second step
on nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

_ALIGNED_BYTES = 64  # what kernels may expect of a tensor's address, and more

Form = tuple[torch.dtype, Sequence[int]]
"""Dtype and shape of a tensor."""


def packed_bytes(forms: Iterable[Form]) -> int:
    """Bytes of such tensors, one after the other.

    Example:
        three int64 and one float32 take 128 bytes.
    """
    return sum(_aligned_bytes(*form) for form in forms)


def packed_views(memory_bytes: torch.Tensor, forms: Iterable[Form]) -> list[torch.Tensor]:
    """Tensors of these forms, one after the other, in memory that has room for them.

    The place of one depends on the forms before it alone.

    Args:
        memory_bytes: uint8, on any device.
        forms: Of the tensors.
    """
    tensors, start = [], 0
    for dtype, shape in forms:
        stop = start + _num_bytes(dtype, shape)
        tensors.append(memory_bytes[start:stop].view(dtype).view(tuple(shape)))
        start += _aligned_bytes(dtype, shape)
    return tensors


def host_memory(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Memory of the host, uint8 and of any content, from which a device copies while we go on."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def send_together(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """The same tensors on a device; those of the host may be changed at once.

    Kernels launched on the current stream from now on find them there.
    """
    forms = [(tensor.dtype, tensor.shape) for tensor in tensors]
    host = host_memory(packed_bytes(forms), device)
    for view, tensor in zip(packed_views(host, forms), tensors, strict=True):
        view.copy_(tensor)
    return packed_views(host.to(device, non_blocking=True), forms)


def _num_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count


def _aligned_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return -(-_num_bytes(dtype, shape) // _ALIGNED_BYTES) * _ALIGNED_BYTES
