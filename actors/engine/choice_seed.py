"""The seeds of several answers to one prompt, which a client that resumes one of them knows too."""

from __future__ import annotations

from hashlib import blake2b

SEED_RANGE = 1 << 63  # seeds are folded into a non-negative int64
_SEED_BYTES = 8


def choice_seed(seed: int, index: int) -> int:
    """Seed of a prompt's choice: `seed` itself for the first, in [0, 2**63) for the others.

    A hash, so that the second choice of seed 1 is not the first of seed 2.
    """
    if index == 0:
        return seed
    digest = blake2b(f"{seed}/{index}".encode(), digest_size=_SEED_BYTES).digest()
    return int.from_bytes(digest, "little") >> 1
