"""Cases of what very few rows take in one launch, beside the launches that it stands for.

Shape letters: T tokens, I inputs, O outputs, X chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ostro.kernels.bench.attention_cases import random_turns
from ostro.kernels.bench.measure import Case, num_variants, poison, relative_error
from ostro.kernels.bench.sizes import Sizes
from ostro.kernels.fp8_linear import Fp8Rows, Fp8Weight
from ostro.kernels.gpu.decode_chunks import cut_chunks
from ostro.kernels.gpu.fp8_linear import MAX_FEW_ROWS, fp8_linear_triton
from ostro.kernels.gpu.join_values import join_values_triton
from ostro.kernels.gpu.latent_heads import expand_values_triton
from ostro.kernels.gpu.mla_decode import attend_chunks, attend_latents_triton
from ostro.kernels.gpu.mla_prologue import mla_prologue_triton
from ostro.kernels.gpu.query_projection import project_queries_triton
from ostro.kernels.mla_prologue import PrologueNorms

_CONTEXT = 1024
_EPS = 1e-6
_TOLERANCE = 1e-2


def cases(sizes: Sizes, context: int = _CONTEXT) -> Iterator[Case]:
    """By tokens."""
    for num_tokens in (1, MAX_FEW_ROWS):
        yield _project_queries(sizes, num_tokens)
        yield _join_values(sizes, num_tokens, context)


def _project_queries(sizes: Sizes, num_tokens: int) -> Case:
    """Norms, cache and the queries' product; beside it the first two and the last apart."""
    s = sizes
    num_in, num_out = s.compressed, s.num_heads * (s.nope + s.rope)
    row_TX = s.randn(num_tokens, s.compressed + s.latent + s.rope)
    inputs = (
        row_TX[:, : s.compressed],
        row_TX[:, s.compressed :],
        PrologueNorms(s.randn(s.compressed), s.randn(s.latent), _EPS),
        random_turns(s, num_tokens),
        torch.arange(num_tokens, device=s.device),
        s.randn_cache(1),
    )
    input_scale = torch.tensor(1 / 32, device=s.device)
    scale = torch.tensor(num_in**-0.5 / 16, device=s.device)
    weights = [
        Fp8Weight(
            values_OI=s.randn_fp8(num_out, num_in, scale=16.0),
            scale=scale,
            input_scale=input_scale,
        )
        for _ in range(num_variants(num_in * num_out))
    ]

    def apart(weight: Fp8Weight) -> torch.Tensor:
        values_TI = mla_prologue_triton(*inputs, input_scale)
        return fp8_linear_triton(Fp8Rows(values_TI=values_TI, dtype=torch.bfloat16), weight)

    def error() -> float:
        expected = apart(weights[0])
        poison(expected.numel() * 2, s.device)
        return relative_error(project_queries_triton(*inputs, weights[0]), expected)

    return Case(
        operation=s.of_cache("project_queries"),
        size=f"T={num_tokens}",
        launches=[partial(project_queries_triton, *inputs, weight) for weight in weights],
        bytes_moved=num_in * num_out + num_tokens * (row_TX.shape[1] + num_out) * 2.0,
        error=error,
        tolerance=_TOLERANCE,
        others={"apart": [partial(apart, weight) for weight in weights]},
    )


def _join_values(sizes: Sizes, num_tokens: int, context: int) -> Case:
    """Attention of chunks, then their join and values; beside it all three apart."""
    s = sizes
    pages_each = -(-context // s.page_size)
    cache_NSW = s.randn_cache(num_tokens * pages_each)
    tables = [list(range(t * pages_each, (t + 1) * pages_each)) for t in range(num_tokens)]
    chunks = cut_chunks(tables, [context] * num_tokens, s.page_size).to(torch.device(s.device))
    q_THW = s.randn(num_tokens, s.num_heads, s.latent + s.rope)
    arguments = (q_THW, cache_NSW, chunks, s.latent, (s.nope + s.rope) ** -0.5)
    value_bytes = 2.0 * s.num_heads * s.value * s.latent
    weights = [s.randn(s.num_heads, s.value, s.latent) for _ in range(num_variants(value_bytes))]

    def together(w_uv_HVC: torch.Tensor) -> torch.Tensor:
        return join_values_triton(attend_chunks(*arguments), chunks.first_T1, w_uv_HVC)

    def apart(w_uv_HVC: torch.Tensor) -> torch.Tensor:
        return expand_values_triton(attend_latents_triton(*arguments), w_uv_HVC)

    def error() -> float:
        expected = apart(weights[0])
        poison(expected.numel() * 2, s.device)
        return relative_error(together(weights[0]), expected)

    return Case(
        operation=s.of_cache("attend, join_values"),
        size=f"T={num_tokens}",
        launches=[partial(together, weight) for weight in weights],
        bytes_moved=value_bytes + num_tokens * context * s.row_bytes(),
        error=error,
        tolerance=_TOLERANCE,
        others={"apart": [partial(apart, weight) for weight in weights]},
    )
