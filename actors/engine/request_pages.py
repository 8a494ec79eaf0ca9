"""The pages of requests: taken, shared, published and given back.

Page p of a request holds the latents of positions [p * S, (p + 1) * S), S being the page size.
Pages from the prefix cache are shared and never written: a request computes its last known token
itself, and it does so in a page of its own.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable

from ostro.actors.engine.page_pool import PagePool
from ostro.actors.engine.prefix_cache import PrefixCache, extend_page_hashes
from ostro.actors.engine.request import RequestProgress, RequestState
from ostro.actors.engine.step import ScheduledStep


class RequestPages:
    """Moves pages between the pool, the prefix cache and requests."""

    def __init__(self, num_pages: int, page_size: int, *, prefix_cache: bool) -> None:
        self.pool = PagePool(num_pages, page_size)
        self.page_size = page_size
        self.num_slots = num_pages * page_size
        self._cache = PrefixCache(self.pool) if prefix_cache else None

    def missing(self, progress: RequestProgress, num_tokens: int) -> int:
        """Pages that a request lacks to hold so many tokens."""
        return max(-(-num_tokens // self.page_size) - len(progress.pages), 0)

    def lacking(self, requests: Iterable[RequestProgress]) -> int:
        """Pages that the running ones of these requests lack to hold all their tokens."""
        return sum(
            self.missing(progress, progress.num_tokens)
            for progress in requests
            if progress.state is RequestState.RUNNING
        )

    def adopt(self, progress: RequestProgress) -> int:
        """Give a request without pages its cached prefix; returns the tokens that it spares."""
        if self._cache is None:
            return 0
        # At least one token is left to compute: its logits are wanted.
        num_pages = (progress.num_known_tokens - 1) // self.page_size
        self._hash(progress, num_pages)
        progress.pages = array("i", self._cache.match(progress.page_hashes[:num_pages]))
        progress.num_published_pages = len(progress.pages)
        return len(progress.pages) * self.page_size

    def grow(self, progress: RequestProgress, num_tokens: int) -> bool:
        """Take the pages that so many tokens need; False, and none taken, if they are not there."""
        pages = self.pool.allocate(self.missing(progress, num_tokens))
        if pages is None:
            return False
        progress.pages.extend(pages)
        return True

    def publish(self, progress: RequestProgress, num_computed: int) -> None:
        """Offer the full pages among the first `num_computed` latents.

        They are in place, or a planned step puts them there before a step planned later reads them.
        """
        next_page = progress.num_published_pages + 1
        if self._cache is None or num_computed < next_page * self.page_size:
            return
        # An output that was dropped leaves a latent of a token that nobody knows.
        num_full = min(num_computed, progress.num_known_tokens) // self.page_size
        self._hash(progress, num_full)
        for index in range(progress.num_published_pages, num_full):
            self._cache.insert(progress.page_hashes[index], progress.pages[index])
        progress.num_published_pages = max(num_full, progress.num_published_pages)

    def release(self, progress: RequestProgress) -> None:
        """Take all pages from a request; steps in flight keep the array they were given."""
        self.pool.release(progress.pages)
        progress.pages = array("i")
        progress.num_published_pages = 0

    def hand_over(
        self, holders: Iterable[RequestProgress], in_flight: Iterable[ScheduledStep]
    ) -> None:
        """Make ready for another owner: holders lose their pages, what is cached stays.

        But not what steps in flight were to write: it may be there, in part or not at all.

        Raises:
            PageLeakError: Somebody else holds a page, or one is lost.
        """
        for progress in holders:
            self.release(progress)
        if self._cache is not None:
            for step in in_flight:
                for entry in step.entries:
                    first, last = entry.start, entry.start + entry.num_tokens - 1
                    for page in entry.pages[first // self.page_size : last // self.page_size + 1]:
                        self._cache.discard(page)
            self._cache.tell_all()
        self.check(())

    def changes(self) -> tuple[list[int], list[int]]:
        """See `PrefixCache.drain_changes`."""
        return self._cache.drain_changes() if self._cache is not None else ([], [])

    def check(self, holders: Iterable[RequestProgress]) -> None:
        """Raise PageLeakError unless exactly these requests hold pages."""
        self.pool.check(Counter(page for progress in holders for page in progress.pages))
        if self._cache is not None:
            self._cache.check()

    def _hash(self, progress: RequestProgress, num_pages: int) -> None:
        hashes = progress.page_hashes
        if len(hashes) < num_pages:
            tokens = progress.known_tokens(len(hashes) * self.page_size, num_pages * self.page_size)
            request = progress.request
            extend_page_hashes(hashes, tokens, self.page_size, request.cache_salt, request.images)
