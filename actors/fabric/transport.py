"""Transport between ranks: rows go out to expert ranks and their sums come back, pair by pair.

    split       `PairExchange` on attention ranks, `ExpertServer` on expert ranks
    colocated   `colocated_exchange.ColocatedExchange` on every rank: both in one

    attention rank        expert rank
    dispatch   -- rows -->  serve: receive from all, compute once, answer each
    combine   <-- sums --

Everybody follows the step's plan: it says how many rows each attention rank has in each
micro-batch; one with none sends nothing and is not waited for. Serving goes layer by layer, within
a layer by micro-batch. Rows carry the epoch, step and layer they belong to, and a message of
another one is refused; on CUDA only sparse headers do, since reading one there stops the host.
Memory that is used again is made in inference mode, so everything that touches it runs in it.

Shape letters: T tokens of a micro-batch, R rows at an expert rank, K experts per token, D hidden
size, A attention ranks, M micro-batches.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ostro.actors.fabric.links import Lane, Links, Moment, Part, Pending
from ostro.actors.fabric.local_exchange import ExchangeCounters, RowExperts
from ostro.actors.fabric.messages import StepPlan
from ostro.actors.fabric.parcels import (
    Parcel,
    announcement_parts,
    count_rows,
    reply_parts,
    row_parts,
)
from ostro.actors.fabric.row_codec import (
    HEADER_BYTES,
    Header,
    RowBuffer,
    RowMessage,
    check_header,
    read_header,
)
from ostro.actors.fabric.wiring import Wiring, check_size


@dataclass(slots=True)
class _Shipment:
    """One micro-batch of ours on its way."""

    parcels: list[Parcel]
    num_tokens: int
    sends: list[Pending]
    replies: list[Pending]


class PairExchange:
    """The attention side of a split cell."""

    def __init__(self, wiring: Wiring) -> None:
        self._wiring = wiring
        self._links = wiring.links()
        self._packer = wiring.packer(wiring.expert_map())
        self._shipments: dict[int, _Shipment] = {}
        self._moment = Moment(0, 0)
        self.counters = ExchangeCounters()

    def begin_step(self, plan: StepPlan) -> None:
        """Make ready for a plan's rows; raises TransportError if the plan is not for us."""
        self._wiring.check_plan(plan)
        self._plan = plan
        self._tokens_M = self._wiring.tokens_of(plan, self._wiring.group.rank)

    @torch.inference_mode()
    def dispatch(
        self,
        layer: int,
        micro_batch: int,
        x_TD: torch.Tensor,
        expert_TK: torch.Tensor,
        weight_TK: torch.Tensor,
    ) -> None:
        """Send a micro-batch's rows; ids are logical, int64. Does not wait for anybody.

        Raises:
            TransportError: A connection is broken.
        """
        began_s = time.perf_counter()
        check_size(self._plan, self._tokens_M, micro_batch, len(x_TD))
        parcels: list[Parcel] = []
        if len(x_TD):
            parcels = self._packer.pack(self._plan, layer, micro_batch, x_TD, expert_TK, weight_TK)
        replies: list[Pending] = []
        if not self._links.batched:  # a receive that waits already spares the sender a round trip
            replies = self._links.post(Lane.REPLIES, receives=reply_parts(parcels))
        sends = self._links.post(Lane.HEADERS, sends=announcement_parts(parcels))
        sends += self._links.post(Lane.ROWS, sends=row_parts(parcels))
        self._shipments[micro_batch] = _Shipment(parcels, len(x_TD), sends, replies)
        self.counters.num_rows += count_rows(parcels)
        self.counters.dispatch_s += time.perf_counter() - began_s

    @torch.inference_mode()
    def combine(self, layer: int, micro_batch: int) -> torch.Tensor:
        """[T, D] float32: the sums that came back, added in rank order; the caller's to keep.

        Raises:
            TransportError: Names the expert rank that did not answer.
        """
        shipment = self._shipments.pop(micro_batch)
        self._moment = Moment(self._plan.step, layer)
        replies = shipment.replies
        if self._links.batched:
            replies = self._links.post(Lane.REPLIES, receives=reply_parts(shipment.parcels))
        began_s = time.perf_counter()
        self._links.wait(replies, self._moment)
        self._links.wait(shipment.sends, self._moment)
        self.counters.wait_s += time.perf_counter() - began_s
        return self._packer.unpack(shipment.parcels, shipment.num_tokens)

    def end_step(self) -> None:
        """On CUDA, wait for the device under the deadline; call it before reading a result.

        Raises:
            TransportError: A peer was lost; which one is unknown.
        """
        self._links.finish(self._moment)

    def serve_all(self, num_layers: int) -> None:
        """A rank without experts has nothing to serve."""


@dataclass(slots=True)
class _Intake:
    """Rows of one micro-batch on their way in."""

    arrivals: list[tuple[int, RowMessage]]
    pending: list[Pending]


class ExpertServer:
    """The expert side: takes rows from all attention ranks, computes once, answers each."""

    def __init__(self, wiring: Wiring, experts: RowExperts, links: Links | None = None) -> None:
        self._wiring = wiring
        self._experts = experts
        self._rank = wiring.group.rank
        self._links = links or wiring.links()
        self._map = wiring.expert_map()
        self._buffers: dict[tuple[int, int], RowBuffer] = {}
        self._announcements: dict[tuple[int, int], torch.Tensor] = {}
        self._gathered: dict[int, RowBuffer] = {}
        self._intakes: dict[int, _Intake] = {}
        # Sent answers by micro-batch; their memory must last until the sends are through.
        self._answers: dict[int, tuple[torch.Tensor, list[Pending]]] = {}
        self._moment = Moment(0, 0)
        self.counters = ExchangeCounters()

    def begin_step(self, plan: StepPlan) -> None:
        """Make ready for a plan's rows; raises TransportError if the plan is not for us."""
        self._wiring.check_plan(plan)
        self._plan = plan
        self._sources_M = [
            [
                (rank, tokens_M[micro_batch])
                for rank, tokens_M in zip(self._wiring.attention_ranks, plan.tokens_AM, strict=True)
                if tokens_M[micro_batch] and rank != self._rank
            ]
            for micro_batch in range(len(plan.tokens_AM[0]))
        ]

    @torch.inference_mode()
    def serve_all(self, num_layers: int) -> None:
        """Serve a whole step, then wait until its answers are out."""
        for layer in range(num_layers):
            for micro_batch in range(len(self._sources_M)):
                self.serve(layer, micro_batch)
        self.end_step()

    @torch.inference_mode()
    def serve(self, layer: int, micro_batch: int) -> None:
        """Receive a micro-batch, compute it, send its answers.

        Raises:
            TransportError: Names the attention rank that did not send, or sent something stale.
        """
        self.take_in(layer, micro_batch)
        self.answer(layer, micro_batch)

    def end_step(self) -> None:
        """Wait until all answers are out; raises TransportError."""
        for micro_batch in list(self._answers):
            self._await_answers(micro_batch)
        self._links.finish(self._moment)

    def take_in(self, layer: int, micro_batch: int, parcels: Sequence[Parcel] = ()) -> None:
        """Begin to receive a micro-batch, and send `parcels`, rows of this very rank, with it."""
        self._moment = Moment(self._plan.step, layer)
        sources = self._sources_M[micro_batch]
        sends: list[Pending] = []
        if self._plan.sparse:
            sources, sends = self._take_counts(layer, micro_batch, parcels)
        arrivals = [(rank, self._buffer(micro_batch, rank, size)) for rank, size in sources]
        receives = [Part(rank, rows.raw) for rank, rows in arrivals]
        pending = self._links.post(Lane.ROWS, sends=row_parts(parcels), receives=receives)
        self._intakes[micro_batch] = _Intake(arrivals, pending + sends)

    def answer(
        self,
        layer: int,
        micro_batch: int,
        own: RowMessage | None = None,
        receives: Sequence[Part] = (),
    ) -> tuple[torch.Tensor | None, list[Pending]]:
        """Compute what was taken in and send the answers.

        Args:
            layer: As in `take_in`.
            micro_batch: As in `take_in`.
            own: Rows of this very rank.
            receives: Answers to this rank's own rows, received in the same exchange.

        Returns:
            The answer to `own`, valid until this micro-batch's next one, and the wait for
            `receives`.
        """
        self._moment = Moment(self._plan.step, layer)
        intake = self._intakes.pop(micro_batch)
        began_s = time.perf_counter()
        self._await_answers(micro_batch)
        self._links.wait(intake.pending, self._moment)
        computing_s = time.perf_counter()
        self.counters.wait_s += computing_s - began_s
        self._check(layer, micro_batch, intake.arrivals)
        messages = list(intake.arrivals)
        if own is not None:
            messages = sorted([*messages, (self._rank, own)], key=lambda arrival: arrival[0])
        if not messages:
            return None, self._links.post(Lane.REPLIES, receives=receives)
        out_RD = self._compute(layer, micro_batch, [rows for _, rows in messages])
        sizes = [len(rows.rows_RD) for _, rows in messages]
        parts = torch.split(out_RD, sizes)
        answer_to = {rank: part for (rank, _), part in zip(messages, parts, strict=True)}
        own_RD = answer_to.pop(self._rank, None)
        sends = [Part(rank, answer_RD) for rank, answer_RD in answer_to.items()]
        self.counters.experts_s += time.perf_counter() - computing_s
        pending = self._links.post(Lane.REPLIES, sends=sends, receives=receives)
        # Only a batch may be waited for twice.
        first_send = 0 if self._links.batched else len(receives)
        self._answers[micro_batch] = (out_RD, pending[first_send:])
        return own_RD, pending[: len(receives)]

    def _take_counts(
        self, layer: int, micro_batch: int, parcels: Sequence[Parcel]
    ) -> tuple[list[tuple[int, int]], list[Pending]]:
        """Read the sparse headers; ranks and rows of those that send any, and unfinished sends."""
        sources = self._sources_M[micro_batch]
        headers = [self._announcement(micro_batch, rank) for rank, _ in sources]
        pending = self._links.post(
            Lane.HEADERS,
            sends=announcement_parts(parcels),
            receives=[
                Part(rank, header) for (rank, _), header in zip(sources, headers, strict=True)
            ],
        )
        num_receives = len(pending) if self._links.batched else len(headers)
        began_s = time.perf_counter()
        self._links.wait(pending[:num_receives], self._moment)
        self.counters.wait_s += time.perf_counter() - began_s
        counts = []
        for (rank, num_tokens), header in zip(sources, headers, strict=True):
            num_rows = min(read_header(header).num_rows, num_tokens)
            check_header(header, self._header(layer, micro_batch, num_rows), rank)
            counts.append((rank, num_rows))
        return [(rank, count) for rank, count in counts if count], pending[num_receives:]

    def _check(self, layer: int, micro_batch: int, arrivals: list[tuple[int, RowMessage]]) -> None:
        if self._plan.sparse or self._links.batched:
            return
        for rank, rows in arrivals:
            expected = self._header(layer, micro_batch, len(rows.rows_RD))
            check_header(rows.raw, expected, rank)

    def _compute(self, layer: int, micro_batch: int, messages: list[RowMessage]) -> torch.Tensor:
        rows = messages[0]
        if len(messages) > 1:
            num_rows = sum(len(message.rows_RD) for message in messages)
            rows = self._gather_into(micro_batch).take(num_rows)
            torch.cat([message.rows_RD for message in messages], out=rows.rows_RD)
            torch.cat([message.expert_RK for message in messages], out=rows.expert_RK)
            torch.cat([message.weight_RK for message in messages], out=rows.weight_RK)
        self.counters.num_rows += len(rows.rows_RD)
        local_RK = self._map.to_local(rows.expert_RK)
        out_RD = self._experts(layer, rows.rows_RD, local_RK, rows.weight_RK)
        return out_RD.to(self._wiring.layout.dtype).contiguous()

    def _await_answers(self, micro_batch: int) -> None:
        _, pending = self._answers.pop(micro_batch, (None, []))
        self._links.wait(pending, self._moment)

    def _header(self, layer: int, micro_batch: int, num_rows: int) -> Header:
        plan = self._plan
        return Header(plan.epoch, plan.step, layer, micro_batch, num_rows, plan.sparse)

    def _buffer(self, micro_batch: int, rank: int, num_rows: int) -> RowMessage:
        key = (micro_batch, rank)
        if key not in self._buffers:
            self._buffers[key] = RowBuffer(self._wiring.layout, self._wiring.group.device)
        return self._buffers[key].take(num_rows)

    def _gather_into(self, micro_batch: int) -> RowBuffer:
        if micro_batch not in self._gathered:
            self._gathered[micro_batch] = RowBuffer(self._wiring.layout, self._wiring.group.device)
        return self._gathered[micro_batch]

    def _announcement(self, micro_batch: int, rank: int) -> torch.Tensor:
        key = (micro_batch, rank)
        if key not in self._announcements:
            self._announcements[key] = torch.empty(
                HEADER_BYTES, dtype=torch.uint8, device=self._wiring.group.device
            )
        return self._announcements[key]
