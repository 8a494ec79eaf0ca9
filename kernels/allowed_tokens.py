"""Choices among the tokens that a mask allows, for one row of logits on a CPU.

A mask is a bit for each token, least significant first, as grammars give it. Where few tokens are
allowed it is far less work to look at these than at the vocabulary; and no copy of the row is made.

Shape legend: V vocabulary, A allowed tokens.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from ostro.kernels.cpu import library
from ostro.kernels.sampling import greedy

_ROOM = 16  # the operator writes whole vectors


def best_allowed(logits_V: torch.Tensor, allowed: bytearray) -> torch.Tensor:
    """The allowed token with the largest logit, the lowest id among equals.

    Args:
        logits_V: float32. At least one is finite and allowed, or the token is any of the
            vocabulary.
        allowed: Bits of at least V tokens; those beyond mean nothing.

    Returns:
        Token id, int64 without dimensions.

    Raises:
        ValueError: There are fewer bits than logits.

    Example:
        logits [3., 1., 2.], bits 0b110 give 2.
    """
    _check(logits_V, allowed)
    native = library.load()
    if native is None:
        return best_allowed_reference(logits_V, allowed)
    logits_V = logits_V.contiguous()
    best = torch.empty((), dtype=torch.int64)
    native.ostro_best_allowed(
        logits_V.data_ptr(), _address(allowed), logits_V.shape[0], best.data_ptr()
    )
    return best


def best_allowed_reference(logits_V: torch.Tensor, allowed: bytearray) -> torch.Tensor:
    """Meaning of `best_allowed`."""
    logits_A, ids_A = gather_allowed_reference(logits_V, allowed)
    return ids_A[greedy(logits_A[None])[0]].long() if len(ids_A) else torch.tensor(0)


def gather_allowed(logits_V: torch.Tensor, allowed: bytearray) -> tuple[torch.Tensor, torch.Tensor]:
    """The allowed logits, float32 [A], and their tokens, int32 [A], ids ascending.

    Args:
        logits_V: float32.
        allowed: Bits of at least V tokens; those beyond mean nothing.

    Raises:
        ValueError: There are fewer bits than logits.

    Example:
        logits [3., 1., 2.], bits 0b110 give [1., 2.] and [1, 2].
    """
    _check(logits_V, allowed)
    native = library.load()
    if native is None:
        return gather_allowed_reference(logits_V, allowed)
    logits_V, vocabulary = logits_V.contiguous(), logits_V.shape[0]
    logits_A = torch.empty(vocabulary + _ROOM)
    ids_A = torch.empty(vocabulary + _ROOM, dtype=torch.int32)
    num_allowed = ctypes.c_int64()
    native.ostro_gather_allowed(
        logits_V.data_ptr(),
        _address(allowed),
        vocabulary,
        logits_A.data_ptr(),
        ids_A.data_ptr(),
        ctypes.addressof(num_allowed),
    )
    return logits_A[: num_allowed.value], ids_A[: num_allowed.value]


def gather_allowed_reference(
    logits_V: torch.Tensor, allowed: bytearray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Meaning of `gather_allowed`."""
    bits = np.unpackbits(np.frombuffer(allowed, np.uint8), bitorder="little")
    ids_A = torch.from_numpy(np.flatnonzero(bits[: logits_V.shape[0]]).astype(np.int32))
    return logits_V.index_select(0, ids_A), ids_A


def _check(logits_V: torch.Tensor, allowed: bytearray) -> None:
    if len(allowed) * 8 < logits_V.shape[0]:
        raise ValueError(f"{len(allowed) * 8} bits for {logits_V.shape[0]} logits")


def _address(allowed: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(allowed))
