"""What one submission has brought and its reader has not taken yet."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable

from ostro.actors.engine.request import TokenEvent
from ostro.actors.errors import NotReadyError, OstroError
from ostro.actors.fabric.messages import Accepted, Cancel, EndThinking, Rejected

Item = TokenEvent | Accepted | OstroError


class Inbox:
    """The events of all choices of one submission, in the order of their arrival.

    At most one per choice and step, so `max_tokens` bounds it.

    Attributes:
        ranks: Where its requests were placed.
        dropped: Ids of choices of which no more is wanted.
        controls: What callers have asked for since, whichever replica they asked.
    """

    def __init__(self) -> None:
        self.ranks: set[int] = set()
        self.dropped: set[str] = set()
        self.controls: list[Cancel | EndThinking] = []
        self._queue: asyncio.Queue[Item] = asyncio.Queue()
        self._held: deque[Item] = deque()

    def put(self, item: Item) -> None:
        """Leave an item for the reader."""
        self._queue.put_nowait(item)

    def hear(self, word: Accepted | Rejected | Cancel | EndThinking) -> None:
        """Take the router's word on a request or a choice."""
        match word:
            case Accepted():
                self.ranks.add(word.rank)
                self.put(word)
            case Rejected():
                self.put(word.as_error())
            case _:
                self.controls.append(word)

    async def next(self, timeout_s: float | None) -> Item:
        """The next item; token events of a choice that wait together come as one.

        Raises:
            NotReadyError: Nothing came in time.
        """
        if self._held:
            return self._held.popleft()
        item = await self._wait(timeout_s)
        if self._queue.empty():
            return item
        waiting = [item]
        while not self._queue.empty():
            waiting.append(self._queue.get_nowait())
        self._held.extend(_joined(waiting))
        return self._held.popleft()

    async def _wait(self, timeout_s: float | None) -> Item:
        if timeout_s is None:
            return await self._queue.get()
        try:
            return await asyncio.wait_for(self._queue.get(), timeout_s)
        except TimeoutError:
            raise NotReadyError(
                f"the router did not accept the request within {timeout_s:.0f} s", retry_after_s=5
            ) from None


def _joined(items: Iterable[Item]) -> list[Item]:
    """The same, later tokens of a choice told with its earlier ones."""
    joined: list[Item] = []
    place_of: dict[str, int] = {}
    for item in items:
        if isinstance(item, TokenEvent):
            place = place_of.get(item.request_id)
            earlier = joined[place] if place is not None else None
            both = earlier.joined(item) if isinstance(earlier, TokenEvent) else None
            if place is not None and both is not None:
                joined[place] = both
                continue
            place_of[item.request_id] = len(joined)
        joined.append(item)
    return joined
