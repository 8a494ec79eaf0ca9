"""Which attention shard takes a request: the one that has the least to compute with it.

That is its token load and what of the prompt is not in its prefix cache, so that a long cached
prefix attracts a request and a prefix that all requests share does not send them all to one shard.
Pure bookkeeping of the router: it mirrors each shard's cached pages by hash and counts the tokens
of the requests that live there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ostro.actors.engine.images import image_bytes
from ostro.actors.engine.prefix_cache import page_hashes
from ostro.actors.engine.request import GenerationRequest


class _Unstarted(NamedTuple):
    """What is counted of a request that waits; the request itself may hold megabytes of pixels."""

    tenant: str
    num_tokens: int


@dataclass(slots=True)
class _Shard:
    cached: set[int] = field(default_factory=set)
    live_tokens: dict[str, int] = field(default_factory=dict)
    unstarted: dict[str, _Unstarted] = field(default_factory=dict)
    image_bytes: dict[str, int] = field(default_factory=dict)
    load_tokens: int = 0


class Assigner:
    """Keeps the picture of every attention shard and places requests on it."""

    def __init__(self, ranks: Iterable[int], *, page_size: int) -> None:
        self._page_size = page_size
        self._shards = {rank: _Shard() for rank in ranks}

    def ranked(self, request: GenerationRequest) -> list[int]:
        """The ranks, best first."""
        if len(self._shards) == 1:
            return list(self._shards)
        hashes = page_hashes(
            request.prompt_token_ids, self._page_size, request.cache_salt, request.images
        )

        def cost_tokens(rank: int) -> int:
            shard = self._shards[rank]
            return shard.load_tokens - self._page_size * _leading(hashes, shard.cached)

        return sorted(self._shards, key=cost_tokens)

    def num_live(self, rank: int) -> int:
        """Requests that live on a rank."""
        return len(self._shards[rank].live_tokens)

    def add(self, rank: int, request: GenerationRequest) -> None:
        """Count a request, or one choice of it, that was placed on a rank."""
        shard, tokens = self._shards[rank], request.counted_prompt_tokens
        shard.live_tokens[request.request_id] = tokens
        shard.unstarted[request.request_id] = _Unstarted(request.tenant, tokens)
        shard.load_tokens += tokens
        if request.images:
            shard.image_bytes[request.request_id] = image_bytes(request) // request.prompt_shared_by

    def grow(self, rank: int, request_id: str, num_tokens: int) -> None:
        """Count new output tokens of a request."""
        shard = self._shards[rank]
        if request_id in shard.live_tokens:
            shard.live_tokens[request_id] += num_tokens
            shard.load_tokens += num_tokens
            shard.unstarted.pop(request_id, None)

    def remove(self, rank: int, request_id: str) -> None:
        """Forget a request that ended."""
        shard = self._shards[rank]
        shard.load_tokens -= shard.live_tokens.pop(request_id, 0)
        shard.unstarted.pop(request_id, None)
        shard.image_bytes.pop(request_id, None)

    def cache_changed(self, rank: int, added: Sequence[int], dropped: Sequence[int]) -> None:
        """Mirror a shard's prefix cache."""
        cached = self._shards[rank].cached
        cached.update(added)
        cached.difference_update(dropped)

    def live_image_bytes(self, rank: int) -> int:
        """Pixels of the requests that live on a rank."""
        return sum(self._shards[rank].image_bytes.values())

    def any_waits(self, rank: int) -> bool:
        """Whether some request on a rank has brought no token yet."""
        return bool(self._shards[rank].unstarted)

    def waiting(self, rank: int, tenant: str | None = None) -> tuple[int, int]:
        """(requests, prompt tokens) placed on a rank that have brought no token yet.

        Args:
            rank: Where.
            tenant: Only this one's.
        """
        lengths = [
            waiting.num_tokens
            for waiting in self._shards[rank].unstarted.values()
            if tenant is None or waiting.tenant == tenant
        ]
        return len(lengths), sum(lengths)


def _leading(hashes: Sequence[int], cached: set[int]) -> int:
    for index, page_hash in enumerate(hashes):
        if page_hash not in cached:
            return index
    return len(hashes)
