"""The repaired interpreter gives bfloat16 and float8 their values."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

NARROW = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@triton.jit
def _sum_and_product_kernel(x, y, total, product, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(total + i, a + b)
    tl.store(product + i, a * b)


@triton.jit
def _cast_kernel(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def _dot_kernel(x, y, out, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    at = row * SIZE + column
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


def _normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def test_bfloat16_sums_and_products_match_torch(triton_device: str) -> None:
    x, y = (_normal(256, seed=seed).bfloat16().to(triton_device) for seed in (0, 1))
    total, product = torch.empty_like(x), torch.empty_like(x)
    _sum_and_product_kernel[(1,)](x, y, total, product, SIZE=256)
    assert torch.equal(total, x + y)
    assert torch.equal(product, x * y)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_casts_round_to_nearest_even(dtype: torch.dtype, triton_device: str) -> None:
    x = _normal(1024, seed=2).to(triton_device)
    out = torch.empty(1024, dtype=dtype, device=triton_device)
    _cast_kernel[(1,)](x, out, SIZE=1024)
    assert torch.equal(out.float(), x.to(dtype).float())
    back = torch.empty_like(x)
    _cast_kernel[(1,)](out, back, SIZE=1024)
    assert torch.equal(back, out.float())


@pytest.mark.parametrize("dtype", NARROW[:2], ids=str)
def test_dot_of_narrow_types_sums_in_float32(dtype: torch.dtype, triton_device: str) -> None:
    x, y = (_normal(32, 32, seed=seed).to(dtype).to(triton_device) for seed in (3, 4))
    out = torch.empty(32, 32, device=triton_device)
    _dot_kernel[(1,)](x, y, out, SIZE=32)
    torch.testing.assert_close(out, x.float() @ y.float(), rtol=1e-5, atol=1e-4)
