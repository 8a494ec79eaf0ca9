"""Tenants share a shard by tokens, not by requests.

Each tenant has a virtual counter that grows with the tokens computed for it, an output token
counting double; the next request to run is one of the tenant with the lowest counter (virtual
token counters: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024). A tenant
that comes back is lifted to the others, so that nobody saves up credit while idle. While one
tenant is alone its requests run in the order of their turn, and count step by step.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from ostro.actors.engine.request import RequestProgress
from ostro.actors.engine.request_pages import RequestPages
from ostro.actors.engine.step import ScheduledStep

OUTPUT_WEIGHT = 2
_MAX_REMEMBERED = 1024  # counters of tenants that have nothing here


class TenantShares:
    """Who has had how much, among the tenants that have requests here.

    Attributes:
        contended: Whether more than one tenant has requests here.
    """

    def __init__(self) -> None:
        self.contended = False
        self._counters: dict[str, int] = {}
        self._num_requests: Counter[str] = Counter()

    def enter(self, tenant: str) -> None:
        """Count a request that came."""
        self._num_requests[tenant] += 1
        self.contended = len(self._num_requests) > 1

    def leave(self, tenant: str) -> None:
        """Count a request that ended."""
        self._num_requests[tenant] -= 1
        if not self._num_requests[tenant]:
            del self._num_requests[tenant]
            self.contended = len(self._num_requests) > 1
            if len(self._counters) > _MAX_REMEMBERED:
                self._counters = {name: self._counters.get(name, 0) for name in self._num_requests}

    def level(self, tenant: str) -> int:
        """The tenant's counter."""
        return self._counters.get(tenant, 0)

    def lift(self, tenant: str, others: Iterable[str]) -> None:
        """Raise a tenant that has begun to wait to the lowest of `others`, or of all here."""
        levels = [self.level(other) for other in others]
        if not levels:
            levels = [self.level(other) for other in self._num_requests if other != tenant]
        if levels:
            self._counters[tenant] = max(self.level(tenant), min(levels))

    def charge(self, tenant: str, num_tokens: int) -> None:
        """Count tokens that are computed: of a prompt once, of an output `OUTPUT_WEIGHT` times."""
        self._counters[tenant] = self._counters.get(tenant, 0) + num_tokens

    def charge_alone(self, step: ScheduledStep) -> None:
        """Count a step that is all of one tenant: what it has alone pays off others' debts."""
        num_outputs = sum(entry.samples for entry in step.entries)
        tenant = step.entries[0].progress.request.tenant
        self.charge(tenant, step.num_tokens + (OUTPUT_WEIGHT - 1) * num_outputs)

    def order(self, prefilling: list[RequestProgress]) -> int:
        """Put those whose tenant had least in front; returns how much that is."""
        prefilling.sort(key=lambda progress: self.level(progress.request.tenant))
        return self.level(prefilling[0].request.tenant)

    def victim_for_place(
        self, first: RequestProgress, running: Sequence[RequestProgress]
    ) -> RequestProgress | None:
        """The running request that is to leave its place to the first waiting one, if any.

        Only for a tenant that stays within its equal share, only from one that is beyond its own,
        and never a tenant's last: everybody advances. Of one tenant the youngest gives way.
        """
        return self._victim(first, 1, running, len(running), lambda _: 1)

    def victim_for_pages(
        self, first: RequestProgress, running: Sequence[RequestProgress], pages: RequestPages
    ) -> RequestProgress | None:
        """The same where it is pages that the first waiting request lacks."""
        needed = pages.missing(first, first.num_tokens)
        return self._victim(first, needed, running, pages.pool.num_pages, lambda p: len(p.pages))

    def _victim(
        self,
        first: RequestProgress,
        needed: int,
        running: Sequence[RequestProgress],
        capacity: int,
        held_by: Callable[[RequestProgress], int],
    ) -> RequestProgress | None:
        held: Counter[str] = Counter()
        num_running: Counter[str] = Counter()
        for progress in running:
            held[progress.request.tenant] += held_by(progress)
            num_running[progress.request.tenant] += 1
        share = capacity / len(self._num_requests)
        if held[first.request.tenant] + needed > share:
            return None
        for progress in reversed(running):
            tenant = progress.request.tenant
            if held[tenant] > share and num_running[tenant] > 1:
                return progress
        return None


class WaitingQueue:
    """Requests that wait to run, or to run again: by tenant, then (scheduling class, arrival).

    Attributes:
        num_tokens: Their prompt tokens; a prompt that several choices share counts once.
    """

    def __init__(self, shares: TenantShares) -> None:
        self.num_tokens = 0
        self._shares = shares
        self._len = 0
        self._of_tenant: dict[str, list[RequestProgress]] = {}
        self._tokens_of_tenant: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._len

    def first(self) -> RequestProgress:
        """The request whose turn is next."""
        queues = self._of_tenant
        if len(queues) == 1:
            return next(iter(queues.values()))[0]
        tenant = min(queues, key=lambda name: (self._shares.level(name), _turn(queues[name][0])))
        return queues[tenant][0]

    def beside(self, progress: RequestProgress) -> tuple[int, int, int, tuple[int, int]]:
        """What waits already and what comes, as `AdmissionPolicy.check` asks for it."""
        tenant = progress.request.tenant
        of_tenant = (len(self._of_tenant.get(tenant, ())), self._tokens_of_tenant[tenant])
        new_tokens = progress.num_prompt_tokens
        return self._len, self.num_tokens, new_tokens, of_tenant if tenant else (0, 0)

    def add(self, progress: RequestProgress) -> None:
        """Put a request in its place."""
        tenant = progress.request.tenant
        if tenant not in self._of_tenant:
            self._shares.lift(tenant, self._of_tenant)
            self._of_tenant[tenant] = []
        insort(self._of_tenant[tenant], progress, key=_turn)
        self._count(progress, 1)

    def remove(self, progress: RequestProgress) -> None:
        """Take a request out, wherever it is."""
        tenant = progress.request.tenant
        queue = self._of_tenant[tenant]
        del queue[bisect_left(queue, _turn(progress), key=_turn)]
        self._count(progress, -1)
        if not queue:
            del self._of_tenant[tenant], self._tokens_of_tenant[tenant]

    def _count(self, progress: RequestProgress, sign: int) -> None:
        num_tokens = sign * progress.request.counted_prompt_tokens
        self._len += sign
        self.num_tokens += num_tokens
        self._tokens_of_tenant[progress.request.tenant] += num_tokens


def _turn(progress: RequestProgress) -> tuple[int, int]:
    return progress.request.scheduling_class, progress.arrival


def youngest_victim(
    step: ScheduledStep, running: Sequence[RequestProgress], requester: RequestProgress
) -> RequestProgress | None:
    """Who of the running, oldest first, loses its pages to `requester`.

    The youngest that is younger and not in this step, or else the requester itself if it is the
    youngest of all; None if it had better wait a step.
    """
    placed = {id(entry.progress) for entry in step.entries}
    for progress in reversed(running):
        if progress is requester:
            break
        if id(progress) not in placed:
            return progress
    return requester if running[-1] is requester else None
