"""The requests of a scheduler: who waits, who runs, and who ended while a step refers to it.

Each move of a request's state is here, with what it does to its place and to its pages.
"""

from __future__ import annotations

from bisect import insort
from operator import attrgetter

from ostro.actors.engine.fairness import TenantShares, WaitingQueue
from ostro.actors.engine.request import RequestProgress, RequestState
from ostro.actors.engine.request_pages import RequestPages


class Roster:
    """Waiting requests in the order of `fairness`, running ones by arrival.

    Attributes:
        leaving: Ended, their pages held until no planned step refers to them any more.
    """

    def __init__(self, pages: RequestPages) -> None:
        self.shares = TenantShares()
        self.waiting = WaitingQueue(self.shares)
        self.running: list[RequestProgress] = []
        self.leaving: set[RequestProgress] = set()
        self._pages = pages
        self._requests: dict[str, RequestProgress] = {}
        self._num_arrivals = 0

    def __len__(self) -> int:
        return len(self._requests)

    def find(self, request_id: str) -> RequestProgress | None:
        """The request of that id, unless it has ended."""
        return self._requests.get(request_id)

    def enter(self, progress: RequestProgress) -> None:
        """Have a new request wait."""
        progress.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._requests[progress.request_id] = progress
        self.shares.enter(progress.request.tenant)
        self.waiting.add(progress)

    def begin(self, progress: RequestProgress, num_cached: int) -> None:
        """Have a waiting request run, whose pages hold so many latents already."""
        self.waiting.remove(progress)
        progress.move_to(RequestState.RUNNING)
        progress.num_computed_tokens = num_cached
        insort(self.running, progress, key=attrgetter("arrival"))

    def preempt(self, progress: RequestProgress) -> None:
        """Take the pages of a running request, which waits for its turn to be computed again."""
        self.running.remove(progress)
        self._pages.release(progress)
        progress.move_to(RequestState.PREEMPTED)
        progress.num_computed_tokens = 0
        progress.draft_token_ids = []
        progress.drafts_are_told = False
        self.waiting.add(progress)

    def finish(self, progress: RequestProgress) -> None:
        """Have a request end, wherever it is."""
        if progress.state is RequestState.RUNNING:
            self.running.remove(progress)
        else:
            self.waiting.remove(progress)
        progress.move_to(RequestState.FINISHED)
        del self._requests[progress.request_id]
        self.shares.leave(progress.request.tenant)
        self.leaving.add(progress)
        self.let_go(progress)

    def let_go(self, progress: RequestProgress) -> None:
        """Free the pages of a finished request, unless a planned step still refers to them."""
        if not progress.num_in_flight:
            self.leaving.discard(progress)
            self._pages.release(progress)

    def holders(self) -> list[RequestProgress]:
        """All that hold pages."""
        return [*self.running, *self.leaving]
