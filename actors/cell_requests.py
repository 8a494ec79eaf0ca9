"""The requests that live in a cell: where each runs, who reads it, and its journal.

The router's bookkeeping between an ingress that submits and a shard that serves; no sockets here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ostro.actors.engine.admission import AdmissionPolicy
from ostro.actors.engine.assignment import Assigner
from ostro.actors.engine.journal import Journal
from ostro.actors.engine.request import GenerationRequest
from ostro.actors.errors import InvalidRequestError
from ostro.actors.fabric.messages import StepDone
from ostro.configs.deployment import EngineConfig


@dataclass(frozen=True, slots=True)
class LiveRequest:
    """Where a request runs and who reads it."""

    request_id: str
    rank: int
    ingress_id: str


class CellRequests:
    """Admits, places and follows requests over the attention ranks of one epoch."""

    def __init__(self, engine: EngineConfig, ranks: Sequence[int]) -> None:
        self._assigner = Assigner(ranks, page_size=engine.page_size)
        self._admission = AdmissionPolicy(engine.max_waiting_requests, engine.max_waiting_tokens)
        per_rank = engine.max_waiting_requests + engine.max_running_requests
        self._journal = Journal(max_entries=per_rank * len(ranks))
        self._live: dict[str, LiveRequest] = {}

    def place(self, request: GenerationRequest, ingress_id: str) -> LiveRequest:
        """Choose the shard of a request and begin its journal.

        Raises:
            InvalidRequestError: A request of that id runs already.
            OverloadedError: The chosen shard's queue is full.
        """
        if request.request_id in self._live:
            raise InvalidRequestError(
                f"request_id {request.request_id!r} is running already; choose another",
                param="request_id",
                code="duplicate_request_id",
            )
        rank = self._assigner.choose(request)
        num_waiting, waiting_tokens = self._assigner.waiting(rank)
        self._admission.check(num_waiting, waiting_tokens, len(request.prompt_token_ids))
        self._journal.add(request, rank)
        self._assigner.add(rank, request)
        live = LiveRequest(request.request_id, rank, ingress_id)
        self._live[request.request_id] = live
        return live

    def find(self, request_id: str) -> LiveRequest | None:
        """The request of that id, if it runs."""
        return self._live.get(request_id)

    def of_ingress(self, ingress_id: str) -> list[LiveRequest]:
        """All requests that an ingress reads."""
        return [live for live in self._live.values() if live.ingress_id == ingress_id]

    def __iter__(self) -> Iterator[LiveRequest]:
        return iter(list(self._live.values()))

    def __len__(self) -> int:
        return len(self._live)

    def follow(self, report: StepDone, *, elapsed_s: float) -> None:
        """Take in what a step brought: tokens, ends, cached pages; `elapsed_s` since the last."""
        drained_tokens = 0
        for request_id, token_ids in report.outputs:
            self._journal.record(request_id, token_ids)
            self._assigner.grow(report.rank, request_id, len(token_ids))
            drained_tokens += len(token_ids)
        for request_id in report.finished:
            self._journal.forget(request_id)
            self._assigner.remove(report.rank, request_id)
            self._live.pop(request_id, None)
        self._assigner.cache_changed(report.rank, report.cached_pages, report.dropped_pages)
        self._admission.record(drained_tokens, elapsed_s)
