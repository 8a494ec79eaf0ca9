"""How the contexts of single-token attention are cut into chunks of keys, one for each program.

A query's chunks are cut by its own length alone, so its result does not depend on the other
requests, and a batch of any lengths becomes programs of about one size.

Shape legend: T queries (one per request), X chunks, G pages of all of them.
"""

from __future__ import annotations

import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Keys of a chunk, for contexts up to so many keys. Alone on its processor a program takes 1.5 us
# for 64 keys: few requests want short chunks, many want long ones, which have less to join.
_KEYS_OF_CHUNK = ((2_048, 256), (16_384, 512))
MIN_CHUNK_KEYS, MAX_CHUNK_KEYS = 256, 1024


@dataclass(frozen=True, slots=True)
class DecodeChunks:
    """What each program attends: on the device, the same for every layer of a step.

    Attributes:
        pages_G: int32 pages of every chunk, one chunk after the other.
        chunk_X4: int32 (query, first key, end of keys, where its pages begin in `pages_G`) of each
            chunk, queries ascending; padding has no keys.
        first_T1: int32 [T + 1], where each query's chunks begin; padding has none.
    """

    pages_G: torch.Tensor
    chunk_X4: torch.Tensor
    first_T1: torch.Tensor

    def to(self, device: torch.device) -> DecodeChunks:
        """The same on a device, by one copy."""
        parts = (self.pages_G, self.chunk_X4.flatten(), self.first_T1)
        moved = torch.cat(parts).to(device).split([len(part) for part in parts])
        return DecodeChunks(moved[0], moved[1].view(-1, 4), moved[2])


def cut_chunks(
    page_tables: Sequence[Sequence[int]],
    context_lengths: Sequence[int],
    page_size: int,
    keys_at_once: int | None = None,
) -> DecodeChunks:
    """Chunks of these contexts, on the CPU.

    Args:
        page_tables: Pages of each query's request; may hold more than the context needs.
        context_lengths: Keys that each query sees.
        page_size: At most a chunk.
        keys_at_once: Keys of a chunk; None means `chunk_keys` of each context.

    Raises:
        ValueError: A program does not hold the pages of so many keys at once.

    Example:
        tables [[7, 5], [9]] of 256 keys a page, lengths [300, 3] give pages [7, 5, 9], chunks
        [[0, 0, 256, 0], [0, 256, 300, 1], [1, 0, 3, 2]] and first [0, 2, 3].
    """
    if keys_at_once is not None and keys_at_once > MAX_CHUNK_KEYS:
        raise ValueError(f"keys_at_once={keys_at_once} is more than {MAX_CHUNK_KEYS}")
    pages = array.array("i")
    sizes = []
    for table, length in zip(page_tables, context_lengths, strict=True):
        pages.extend(table[: -(-length // page_size)])
        sizes.append(keys_at_once or chunk_keys(length))
    length_T = np.array(context_lengths, dtype=np.int32)
    size_T = np.array(sizes, dtype=np.int32)
    num_chunks_T = -(-length_T // size_T)
    first_T1 = _starts(num_chunks_T)
    page_T1 = _starts(-(-length_T // page_size))
    query_X = np.repeat(np.arange(len(length_T), dtype=np.int32), num_chunks_T)
    start_X = (np.arange(first_T1[-1], dtype=np.int32) - first_T1[query_X]) * size_T[query_X]
    stop_X = np.minimum(start_X + size_T[query_X], length_T[query_X])
    chunk_X4 = np.stack((query_X, start_X, stop_X, page_T1[query_X] + start_X // page_size), axis=1)
    return DecodeChunks(
        pages_G=torch.from_numpy(np.array(pages, dtype=np.int32)),
        chunk_X4=torch.from_numpy(chunk_X4),
        first_T1=torch.from_numpy(first_T1),
    )


def _starts(sizes: np.ndarray) -> np.ndarray:
    """Where each of these begins, and where the last one ends."""
    return np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)


def chunk_keys(context_length: int) -> int:
    """Keys of each chunk of a context."""
    for at_most, keys in _KEYS_OF_CHUNK:
        if context_length <= at_most:
            return keys
    return MAX_CHUNK_KEYS


def most_chunks(max_context: int) -> int:
    """Chunks of any context up to this one.

    Example:
        2,048 keys may be 8 chunks, 2,500 keys no more than that.
    """
    ends = [at_most for at_most, _ in _KEYS_OF_CHUNK if at_most < max_context]
    return max(-(-length // chunk_keys(length)) for length in (*ends, max_context))
