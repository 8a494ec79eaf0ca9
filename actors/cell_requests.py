"""The requests that live in a cell: where each runs, who reads it, what it has brought.

The router's bookkeeping between an ingress that submits and a shard that serves; no sockets here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ostro.actors.engine.admission import AdmissionPolicy
from ostro.actors.engine.assignment import Assigner
from ostro.actors.engine.choices import callers_id, each_choice, submission_of
from ostro.actors.engine.images import check_image_bytes, image_bytes
from ostro.actors.engine.quotas import TenantQuotas
from ostro.actors.engine.request import GenerationRequest
from ostro.actors.errors import OverloadedError
from ostro.actors.fabric.messages import StepDone
from ostro.configs.deployment import EngineConfig


@dataclass(frozen=True, slots=True)
class LiveRequest:
    """Where one choice of a request runs, who reads it and whose it is.

    Attributes:
        charged_tokens: Of the prompt, whose tenant was charged for it with the first choice.
    """

    request_id: str
    rank: int
    ingress_id: str
    tenant: str
    charged_tokens: int


class CellRequests:
    """Admits, places and follows requests over the attention ranks of one epoch.

    `quotas` outlive it: what tenants used in one epoch counts in the next.
    """

    def __init__(self, engine: EngineConfig, ranks: Sequence[int], quotas: TenantQuotas) -> None:
        self._assigner = Assigner(ranks, page_size=engine.page_size)
        self._admission = {
            rank: AdmissionPolicy(engine.max_waiting_requests, engine.max_waiting_tokens)
            for rank in ranks
        }
        per_rank = engine.max_waiting_requests + engine.max_running_requests
        self._max_live = per_rank * len(ranks)
        self._max_live_image_bytes = engine.max_live_image_bytes
        self._num_prompt_tokens = dict.fromkeys(ranks, 0)
        self._quotas = quotas
        self._live: dict[str, LiveRequest] = {}
        self._num_outputs: Counter[str] = Counter()
        self._choices: dict[str, list[str]] = {}  # of a submission: ids of those that run
        self._latest: dict[tuple[str, str], str] = {}  # of a tenant and its id: the submission

    def place(
        self, request: GenerationRequest, ingress_id: str, *, is_resumed: bool = False
    ) -> int:
        """Choose the rank that serves all choices of a request.

        One that is resumed was let in before it was lost: nothing refuses it now, and its tenant
        pays for what it brings from here on alone.

        Raises:
            InvalidRequestError: Its images are more than a request may carry.
            OverloadedError: Every shard's queue is full.
            QuotaError: Its tenant has used up what it may.
        """
        tenant = request.tenant
        if is_resumed:
            num_charged = 0
            rank = self._assigner.ranked(request)[0]
            self._quotas.resume(tenant, request.num_choices)
        else:
            num_charged = len(request.prompt_token_ids)
            rank = self._admit(request)
        submission = submission_of(request.request_id)
        self._latest[tenant, callers_id(request.request_id)] = submission
        running = self._choices.setdefault(submission, [])
        for choice in each_choice(request):
            name = choice.request_id
            charged_tokens = num_charged if name == request.request_id else 0
            self._assigner.add(rank, choice)
            self._live[name] = LiveRequest(name, rank, ingress_id, tenant, charged_tokens)
            running.append(name)
        return rank

    def _admit(self, request: GenerationRequest) -> int:
        """The rank that takes a request, which is charged to its tenant."""
        check_image_bytes(request)
        charged = request.tenant, len(request.prompt_token_ids), request.num_choices
        self._quotas.begin(*charged)
        try:
            return self._rank_with_room(request)
        except OverloadedError:
            self._quotas.undo(*charged)
            raise

    def _rank_with_room(self, request: GenerationRequest) -> int:
        if len(self._live) + request.num_choices > self._max_live:
            raise OverloadedError(
                f"{len(self._live)} requests are being served already", retry_after_s=1.0
            )
        refusal: OverloadedError | None = None
        for rank in self._assigner.ranked(request):
            num_waiting, waiting_tokens = self._assigner.waiting(rank)
            tenant = request.tenant
            try:
                self._admission[rank].check(
                    num_waiting,
                    waiting_tokens,
                    len(request.prompt_token_ids),
                    self._assigner.waiting(rank, tenant) if tenant else (0, 0),
                )
                if request.images:
                    self._check_room_for_images(rank, request)
            except OverloadedError as error:
                refusal = refusal or error
            else:
                return rank
        raise refusal or OverloadedError("no attention shard takes requests")

    def _check_room_for_images(self, rank: int, request: GenerationRequest) -> None:
        """Refuse pixels that a rank has no room for; where there are none, any get in."""
        live_bytes = self._assigner.live_image_bytes(rank)
        if live_bytes and live_bytes + image_bytes(request) > self._max_live_image_bytes:
            raise OverloadedError(
                f"images of {live_bytes} bytes are being served already", retry_after_s=5.0
            )

    def num_live(self, rank: int) -> int:
        """Requests that live on a rank."""
        return self._assigner.num_live(rank)

    def find(self, name: str, tenant: str | None = None) -> list[LiveRequest]:
        """The running choice of that id, or all of that submission or of that caller's latest.

        Of that tenant only, unless it is None; two tenants may use one id.
        """
        if name in self._live:
            names = [name]
        else:
            submission = name if name in self._choices else self._latest_of(name, tenant)
            names = self._choices.get(submission, [])
        found = [self._live[request_id] for request_id in names]
        return [live for live in found if tenant in (None, live.tenant)]

    def _latest_of(self, name: str, tenant: str | None) -> str:
        if tenant is not None:
            return self._latest.get((tenant, name), "")
        of_all = (at for (_, other), at in reversed(self._latest.items()) if other == name)
        return next(of_all, "")

    def of_ingress(self, ingress_id: str) -> list[LiveRequest]:
        """All requests that an ingress reads."""
        return [live for live in self._live.values() if live.ingress_id == ingress_id]

    def __iter__(self) -> Iterator[LiveRequest]:
        return iter(list(self._live.values()))

    def __len__(self) -> int:
        return len(self._live)

    def follow(self, report: StepDone, *, elapsed_s: float) -> None:
        """Take in what a step brought: tokens, ends, cached pages; `elapsed_s` since the last."""
        self._measure_drain(report, elapsed_s)
        for request_id, token_ids in report.outputs:
            if request_id in self._live:
                self._num_outputs[request_id] += len(token_ids)
            self._assigner.grow(report.rank, request_id, len(token_ids))
        for request_id in report.finished:
            num_output_tokens = self._num_outputs.pop(request_id, 0)
            self._assigner.remove(report.rank, request_id)
            live = self._live.pop(request_id, None)
            if live is not None:
                self._quotas.end(live.tenant, num_output_tokens)
                self._forget(live)
        self._assigner.cache_changed(report.rank, report.cached_pages, report.dropped_pages)

    def give_up(self) -> list[LiveRequest]:
        """All requests of an epoch that failed; they cost their tenants nothing."""
        given_up = list(self)
        for live in given_up:
            self._quotas.undo(live.tenant, live.charged_tokens)
        self._live.clear()
        return given_up

    def _forget(self, live: LiveRequest) -> None:
        submission = submission_of(live.request_id)
        name = live.tenant, callers_id(live.request_id)
        running = self._choices[submission]
        running.remove(live.request_id)
        if not running:
            del self._choices[submission]
            if self._latest.get(name) == submission:
                del self._latest[name]

    def _measure_drain(self, report: StepDone, elapsed_s: float) -> None:
        """How fast prompts begin to run, while any wait: what Retry-After is computed from."""
        begun_tokens = report.load.num_prompt_tokens - self._num_prompt_tokens[report.rank]
        self._num_prompt_tokens[report.rank] = report.load.num_prompt_tokens
        if self._assigner.any_waits(report.rank):
            self._admission[report.rank].record(begun_tokens, elapsed_s)
