"""The pages of one shard's latent cache, and who holds them.

A page is free, idle or referenced. Idle pages are unreferenced, but the prefix cache has said that
their content is worth keeping; they are handed out last, the longest unused first, and whoever
watches evictions is told. The pool knows no requests, no tokens and no device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence


class PageLeakError(RuntimeError):
    """Pages are not where they should be: a bug of ours."""


class PagePool:
    """Hands out page numbers [0, num_pages) and counts their holders.

    Attributes:
        num_releases: Grows whenever a page may have become free, so that a reader can tell whether
            trying again is worthwhile.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.num_releases = 0
        self._refs = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._idle: dict[int, None] = {}
        self._kept: set[int] = set()
        self._on_evict: Callable[[int], None] | None = None

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can hand out, idle ones included."""
        return len(self._free) + len(self._idle)

    def watch_evictions(self, on_evict: Callable[[int], None]) -> None:
        """Have `on_evict(page)` called whenever an idle page is about to lose its content."""
        self._on_evict = on_evict

    def allocate(self, num_pages: int) -> list[int] | None:
        """So many pages with one reference each; None, and none taken, if there are fewer."""
        if num_pages > self.num_free:
            return None
        pages = [self._take() for _ in range(num_pages)]
        for page in pages:
            self._refs[page] = 1
        return pages

    def acquire(self, page: int) -> None:
        """Add a reference to an idle or referenced page."""
        if self._refs[page] == 0:
            del self._idle[page]
        self._refs[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference of each page; the last of them are evicted before the first."""
        refs = self._refs
        for page in reversed(pages):
            refs[page] -= 1
            if refs[page] == 0:
                if page in self._kept:
                    self._idle[page] = None
                else:
                    self._free.append(page)
            elif refs[page] < 0:
                raise PageLeakError(f"page {page} was released more often than acquired")
        self.num_releases += 1

    def keep(self, page: int) -> None:
        """Have a referenced page idle, rather than be free, once nobody holds it."""
        self._kept.add(page)

    def stop_keeping(self, page: int) -> None:
        """Take back `keep`; the page is free if nobody holds it."""
        self._kept.discard(page)
        if page in self._idle:
            del self._idle[page]
            self._free.append(page)

    def check(self, expected_refs: Mapping[int, int]) -> None:
        """Compare with the references that the holders know of.

        Raises:
            PageLeakError: A page is lost, held twice or counted wrongly; the message names it.
        """
        wrong = [
            f"page {page}: {refs} references counted, {expected_refs.get(page, 0)} held"
            for page, refs in enumerate(self._refs)
            if refs != expected_refs.get(page, 0)
        ]
        places = [0] * self.num_pages
        for page in (*self._free, *self._idle):
            places[page] += 1
        wrong += [
            f"page {page}: {refs} references, and {places[page]} times among the free"
            for page, refs in enumerate(self._refs)
            if places[page] != (1 if refs == 0 else 0)
        ]
        wrong += [f"page {page}: free, but kept" for page in self._free if page in self._kept]
        wrong += [f"page {page}: idle, not kept" for page in self._idle if page not in self._kept]
        if wrong:
            raise PageLeakError("; ".join(wrong[:16]))

    def kept_pages(self) -> frozenset[int]:
        """Pages whose content is worth keeping, referenced or idle."""
        return frozenset(self._kept)

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        page = next(iter(self._idle))
        del self._idle[page]
        self._kept.discard(page)
        if self._on_evict is not None:
            self._on_evict(page)
        return page
