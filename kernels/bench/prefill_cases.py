"""Cases of chunked prefill: attention to rebuilt keys, and all of it from pages.

Every score of a long chunk fits no memory in float32, so a few rows of queries are checked: the
first, some in the middle and the last.

Shape letters: T queries, S keys, H heads, Q query width, V value width, C latent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from ostro.kernels.bench.attention_cases import random_heads, shuffled_tables
from ostro.kernels.bench.measure import Case, Launch, largest_error, poison, relative_error
from ostro.kernels.bench.sizes import Sizes
from ostro.kernels.gpu.mla_prefill import (
    PrefillTile,
    attend_reference,
    attend_triton,
    mla_prefill_triton,
)
from ostro.kernels.latent_cache import FP8_ROWS, row_values
from ostro.kernels.latent_heads import LatentHeads
from ostro.kernels.mla_prefill import mla_prefill_reference

# (new tokens, tokens before them)
CHUNKS = ((2048, 0), (8192, 0), (8192, 8192), (8192, 24_576), (8192, 131_072))
_CHECKED_ROWS = 48
_TOLERANCE = 1e-2


@dataclass(frozen=True, slots=True)
class Chunk:
    """Queries, and the keys and values that they may see."""

    q_THQ: torch.Tensor
    key_SHQ: torch.Tensor
    value_SHV: torch.Tensor
    scale: float

    @property
    def start(self) -> int:
        """Keys before the first query's own."""
        return len(self.key_SHQ) - len(self.q_THQ)

    def attend(self, tile: PrefillTile | None = None) -> torch.Tensor:
        """To all of the keys at once."""
        keys = (self.key_SHQ, self.value_SHV)
        return attend_triton(self.q_THQ, *keys, self.start, self.scale, tile=tile)[0]

    def error(self) -> float:
        """Of some rows of `attend`."""
        poison(self.q_THQ.numel() * 2, str(self.q_THQ.device))
        out_THV = self.attend()
        expected = [
            attend_reference(
                self.q_THQ[rows],
                self.key_SHQ,
                self.value_SHV,
                self.start + rows.start,
                self.scale,
                out_dtype=torch.float32,
            )[0]
            for rows in checked_rows(len(self.q_THQ))
        ]
        return _error_of_rows(out_THV, expected)

    def sdpa(self, backend: SDPBackend) -> torch.Tensor:
        """Torch's attention of the same."""
        q, key, value = (
            x.transpose(0, 1)[None] for x in (self.q_THQ, self.key_SHQ, self.value_SHV)
        )
        run = torch.nn.functional.scaled_dot_product_attention
        with sdpa_kernel(backend):
            if not self.start:
                return run(q, key, value, is_causal=True, scale=self.scale)
            mask = causal_lower_right(q.shape[2], key.shape[2])
            return run(q, key, value, attn_mask=mask, scale=self.scale)


def random_chunk(sizes: Sizes, num_tokens: int, start: int) -> Chunk:
    """Of one layer."""
    s, width = sizes, sizes.nope + sizes.rope
    return Chunk(
        s.randn(num_tokens, s.num_heads, width),
        s.randn(start + num_tokens, s.num_heads, width),
        s.randn(start + num_tokens, s.num_heads, s.value),
        width**-0.5,
    )


def checked_rows(num_tokens: int) -> list[slice]:
    """Rows of a chunk that are compared."""
    size = min(_CHECKED_ROWS, num_tokens)
    return [slice(at, at + size) for at in (0, (num_tokens - size) // 2, num_tokens - size)]


def num_pairs(num_tokens: int, start: int) -> int:
    """Of a query and a key that it sees.

    Example:
        2 tokens after 3 see 4 and 5 keys: 9.
    """
    return num_tokens * start + num_tokens * (num_tokens + 1) // 2


def cases(sizes: Sizes, chunks: Sequence[tuple[int, int]] = CHUNKS) -> Iterator[Case]:
    """Attention alone, then rebuilding and attention; of FP8 rows the latter."""
    for num_tokens, start in chunks:
        if sizes.cache_dtype != FP8_ROWS:
            yield _attention(sizes, num_tokens, start)
        yield _whole(sizes, num_tokens, start)


def _attention(sizes: Sizes, num_tokens: int, start: int) -> Case:
    s, chunk = sizes, random_chunk(sizes, num_tokens, start)
    tensors = (chunk.q_THQ, chunk.key_SHQ, chunk.value_SHV)
    others: dict[str, Sequence[Launch]] = {
        "flash": [partial(chunk.sdpa, SDPBackend.FLASH_ATTENTION)]
    }
    if not start:
        others["cudnn"] = [partial(chunk.sdpa, SDPBackend.CUDNN_ATTENTION)]
    return Case(
        operation="attend",
        size=f"{num_tokens} @ {start}",
        launches=[chunk.attend],
        bytes_moved=2.0 * sum(map(torch.Tensor.numel, tensors)),
        flops=_flops(s, num_tokens, start),
        error=chunk.error,
        tolerance=_TOLERANCE,
        others=others,
    )


def _whole(sizes: Sizes, num_tokens: int, start: int) -> Case:
    s, heads = sizes, random_heads(sizes)
    cache_NSW, [[table]] = shuffled_tables(s, [start + num_tokens], 1)
    pages_n = torch.tensor(table, device=s.device)
    q_THQ = s.randn(num_tokens, s.num_heads, s.nope + s.rope)
    arguments = (q_THQ, cache_NSW, pages_n, start, heads)
    rebuilt = 2.0 * (start + num_tokens) * s.num_heads * s.latent * (s.nope + s.value)
    return Case(
        operation=s.of_cache("mla_prefill"),
        size=f"{num_tokens} @ {start}",
        launches=[partial(mla_prefill_triton, *arguments)],
        bytes_moved=(start + num_tokens) * s.row_bytes() + 2.0 * q_THQ.numel(),
        flops=_flops(s, num_tokens, start) + rebuilt,
        error=partial(_whole_error, *arguments),
        tolerance=2 * _TOLERANCE,
    )


def _whole_error(
    q_THQ: torch.Tensor,
    cache_NSW: torch.Tensor,
    pages_n: torch.Tensor,
    start: int,
    heads: LatentHeads,
) -> float:
    poison(q_THQ.numel() * 2, str(q_THQ.device))
    out_THV = mla_prefill_triton(q_THQ, cache_NSW, pages_n, start, heads)
    rows_LW = cache_NSW[pages_n].flatten(0, 1)[: start + len(q_THQ)]
    context_LW = row_values(rows_LW, heads.w_uk_HNC.shape[2], torch.float32)
    expected = [
        mla_prefill_reference(q_THQ[rows].float(), context_LW[: start + rows.stop], heads)
        for rows in checked_rows(len(q_THQ))
    ]
    return _error_of_rows(out_THV, expected)


def _error_of_rows(out_THV: torch.Tensor, expected: list[torch.Tensor]) -> float:
    """The largest: early rows see few keys and have larger values."""
    rows = checked_rows(len(out_THV))
    return largest_error(
        [relative_error(out_THV[r], e) for r, e in zip(rows, expected, strict=True)]
    )


def _flops(sizes: Sizes, num_tokens: int, start: int) -> float:
    per_pair = 2.0 * sizes.num_heads * (sizes.nope + sizes.rope + sizes.value)
    return per_pair * num_pairs(num_tokens, start)
