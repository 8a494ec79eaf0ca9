"""Logarithm of the sum of exponentials of each row, on a GPU.

One program a row, so that a row's sum runs in the same order in every batch.

Shape legend: A rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK_V = 8192


def log_normalizer_triton(logits_AV: torch.Tensor) -> torch.Tensor:
    """`ostro.kernels.batch_sampling.log_normalizer` by Triton; the same shapes and dtypes."""
    num_rows, vocabulary = logits_AV.shape
    normalizer_A = logits_AV.new_empty(num_rows, dtype=torch.float32)
    if num_rows:
        _log_normalizer_kernel[(num_rows,)](
            logits_AV.contiguous(),
            normalizer_A,
            vocabulary,
            BLOCK_V=min(_BLOCK_V, triton.next_power_of_2(vocabulary)),
            num_warps=16,
        )
    return normalizer_A


@triton.jit
def _log_normalizer_kernel(logits, normalizer, V, BLOCK_V: tl.constexpr):
    a = tl.program_id(0).to(tl.int64)  # int64: a * V passes 2**31 at 16,384 rows
    v = tl.arange(0, BLOCK_V)
    top_V = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    for start in range(0, V, BLOCK_V):
        is_token = start + v < V
        x = tl.load(logits + a * V + start + v, mask=is_token, other=float("-inf"))
        top_V = tl.maximum(top_V, x.to(tl.float32))
    top = tl.max(top_V, 0)
    total_V = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        is_token = start + v < V
        x = tl.load(logits + a * V + start + v, mask=is_token, other=float("-inf"))
        total_V += tl.exp(x.to(tl.float32) - top)
    tl.store(normalizer + a, top + tl.log(tl.sum(total_V, 0)))
