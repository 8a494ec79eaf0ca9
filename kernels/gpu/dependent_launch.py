"""Kernels that start while the one ahead still ends: programmatic dependent launch.

Between two launches a GPU stands still for a microsecond or two, which is what a step of one
request is bound by. A kernel launched so may start as soon as every program of the one ahead has
started; it may load weights, which nobody writes, and waits before it reads what others write and
before it writes what others may still read. A kernel ends only after its own wait, so waiting for
the one ahead is waiting for all before it. It holds within a CUDA graph too.

Off unless the device's file of tiles says `"dependent_launch": true` (`tiles`). No GPU has measured
it yet: `ostro bench h200 --pdl` and `ostro bench kernels --pdl` print times with and without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import triton
import triton.language as tl

from ostro.kernels.gpu.tiles import architecture, is_switched_on

_HOPPER = 90  # older GPUs do not know it
_forced: ContextVar[bool | None] = ContextVar("dependent_launch", default=None)


@contextmanager
def dependent_launch(is_on: bool) -> Iterator[None]:  # noqa: FBT001 - it is the only argument
    """Launches and captures within are so, or not, whatever the device's file says."""
    token = _forced.set(is_on)
    try:
        yield
    finally:
        _forced.reset(token)


def pdl_options(device: torch.device) -> dict[str, bool]:
    """What a launch on a device adds to its arguments; the kernel takes PDL. Nothing on a CPU."""
    if device.type == "cpu":
        return {}
    forced = _forced.get()
    is_on = is_switched_on("dependent_launch", device) if forced is None else forced
    return {"PDL": True, "launch_pdl": True} if is_on and architecture(device) >= _HOPPER else {}


@triton.jit
def let_next_start(PDL: tl.constexpr) -> None:
    """First of all: the next kernel may start when every program has said so."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def await_previous(PDL: tl.constexpr) -> None:
    """Until all kernels ahead have ended, and what they wrote can be read."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def await_inputs(PDL: tl.constexpr) -> None:
    """Both at once, for a kernel that has no weights to load meanwhile."""
    let_next_start(PDL)
    await_previous(PDL)


@triton.jit
def prefetch(pointers, PDL: tl.constexpr) -> None:
    """Bring the lines of weights at these addresses to the L2 cache, ahead of the wait."""
    if PDL:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // dummy $0",
            "=r,l",
            [pointers.to(tl.int64, bitcast=True)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
