"""What the device does at most: a large copy, a large sum and large matrix products."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ostro.kernels.bench.measure import Ceilings, replay_us

_COPIED_BYTES = 2 << 30
_READ_BYTES = 8 << 30
_SIZE = 8192  # of the matrices
_BLOCK, _STEPS = 4096, 16


class NoGpuError(RuntimeError):
    """Nothing can be measured here."""


def gpu_name() -> str:
    """Of the current GPU.

    Raises:
        NoGpuError: There is none.
    """
    if not torch.cuda.is_available():
        raise NoGpuError("this is measured on a CUDA device, and torch finds none")
    return torch.cuda.get_device_name()


def measure_ceilings() -> Ceilings:
    """Of the current device, in about a second."""
    return Ceilings(copy_bytes_s=_copy_bytes_s(), read_bytes_s=_read_bytes_s(), flops_s=_flops_s())


def _copy_bytes_s() -> float:
    source = torch.empty(_COPIED_BYTES // 4, device="cuda").normal_()
    us = replay_us([functools.partial(torch.empty_like(source).copy_, source)])
    return 2e6 * _COPIED_BYTES / us


def _read_bytes_s() -> float:
    """The faster of torch's sum and our own."""
    values = torch.empty(_READ_BYTES // 4, device="cuda").normal_()
    sums = (functools.partial(torch.sum, values), functools.partial(sum_blocks, values))
    return 1e6 * _READ_BYTES / min(replay_us([run]) for run in sums)


def _flops_s() -> dict[str, float]:
    left, right = (torch.randn(_SIZE, _SIZE, device="cuda").bfloat16() for _ in range(2))
    narrow_left, narrow_right = (x.to(torch.float8_e4m3fn) for x in (left, right))
    one = torch.ones((), device="cuda")
    products = {
        "bf16": functools.partial(torch.mm, left, right),
        "fp8": functools.partial(
            torch._scaled_mm,
            narrow_left,
            narrow_right.T,
            one,
            one,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        ),
    }
    return {name: 2e6 * _SIZE**3 / replay_us([run]) for name, run in products.items()}


def sum_blocks(values: torch.Tensor) -> torch.Tensor:
    """Sums of consecutive blocks of 65,536 values, the length a multiple of that; all are read."""
    num_programs = values.numel() // (_BLOCK * _STEPS)
    sums = values.new_empty(num_programs)
    _sum_kernel[(num_programs,)](values, sums, BLOCK=_BLOCK, STEPS=_STEPS, num_warps=8)
    return sums


@triton.jit
def _sum_kernel(values, sums, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)  # int64: places pass 2**31 at 8 GB
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(STEPS):
        total += tl.load(values + program * BLOCK * STEPS + step * BLOCK + i)
    tl.store(sums + program, tl.sum(total, 0))
