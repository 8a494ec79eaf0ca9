"""Transport of a colocated cell: every rank has requests and experts.

Each rank sends its rows, serves everybody's, and takes its answers; its own rows stay where they
are. The order is the same on every rank, so nobody waits in a circle: a dispatch only sends and
begins to receive, and a combine serves first.
"""

from __future__ import annotations

import time

import torch

from ostro.actors.errors import TransportError
from ostro.actors.fabric.links import Lane, Moment, Pending
from ostro.actors.fabric.local_exchange import ExchangeCounters, RowExperts
from ostro.actors.fabric.messages import StepPlan
from ostro.actors.fabric.parcels import Parcel, count_rows, reply_parts
from ostro.actors.fabric.transport import ExpertServer
from ostro.actors.fabric.wiring import Wiring, check_size


class ColocatedExchange:
    """Both sides of the transport on one rank; `wiring.attention_ranks` are the expert ranks."""

    def __init__(self, wiring: Wiring, experts: RowExperts) -> None:
        self._wiring = wiring
        self._rank = wiring.group.rank
        self._links = wiring.links()
        self._packer = wiring.packer(wiring.expert_map())
        self._server = ExpertServer(wiring, experts, self._links)
        self._shipments: dict[int, tuple[list[Parcel], list[Pending]]] = {}
        self.counters = ExchangeCounters()

    def begin_step(self, plan: StepPlan) -> None:
        """Make ready for a plan's rows.

        Raises:
            TransportError: The plan is not for us, or an empty micro-batch precedes a full one.
        """
        self._server.begin_step(plan)
        self._plan = plan
        self._tokens_M = self._wiring.tokens_of(plan, self._rank)
        self._num_full = sum(1 for num_tokens in self._tokens_M if num_tokens)
        if not all(self._tokens_M[: self._num_full]):
            raise TransportError(f"step {plan.step}: empty micro-batches must come last")

    @torch.inference_mode()
    def dispatch(
        self,
        layer: int,
        micro_batch: int,
        x_TD: torch.Tensor,
        expert_TK: torch.Tensor,
        weight_TK: torch.Tensor,
    ) -> None:
        """Send a micro-batch's rows; ids are logical, int64.

        In sparse mode this waits for the others' counts; else for nobody.

        Raises:
            TransportError: A connection is broken, or a count did not come.
        """
        began_s = time.perf_counter()
        check_size(self._plan, self._tokens_M, micro_batch, len(x_TD))
        if not len(x_TD):
            return
        parcels = self._packer.pack(self._plan, layer, micro_batch, x_TD, expert_TK, weight_TK)
        others = [parcel for parcel in parcels if parcel.rank != self._rank]
        replies: list[Pending] = []
        if not self._links.batched:
            replies = self._links.post(Lane.REPLIES, receives=reply_parts(others))
        self._server.take_in(layer, micro_batch, others)
        for empty in self._empty_after(micro_batch):  # peers may wait for us to take theirs
            self._server.take_in(layer, empty)
        self._shipments[micro_batch] = (parcels, replies)
        self.counters.num_rows += count_rows(others)
        self.counters.dispatch_s += time.perf_counter() - began_s

    @torch.inference_mode()
    def combine(self, layer: int, micro_batch: int) -> torch.Tensor:
        """Serve the micro-batch for all ranks, then [T, D] float32: the sums for our own rows.

        Raises:
            TransportError: Names the rank that did not answer.
        """
        num_tokens = self._tokens_M[micro_batch]
        if not num_tokens:  # served already, after the last full one
            return self._packer.unpack([], 0)
        parcels, replies = self._shipments.pop(micro_batch)
        self._answer(layer, micro_batch, parcels, replies)
        total_TD = self._packer.unpack(parcels, num_tokens)
        for empty in self._empty_after(micro_batch):
            self._server.answer(layer, empty)
        return total_TD

    @torch.inference_mode()
    def serve_all(self, num_layers: int) -> None:
        """Serve a whole step in which this rank has no rows of its own."""
        self._server.serve_all(num_layers)

    def end_step(self) -> None:
        """Wait until all answers are out, on CUDA for the device too; raises TransportError."""
        self._server.end_step()

    def _empty_after(self, micro_batch: int) -> range:
        """The micro-batches without rows of ours, once the last one with rows is reached."""
        is_last = micro_batch == self._num_full - 1
        return range(self._num_full if is_last else len(self._tokens_M), len(self._tokens_M))

    def _answer(
        self, layer: int, micro_batch: int, parcels: list[Parcel], replies: list[Pending]
    ) -> None:
        own = next(parcel for parcel in parcels if parcel.rank == self._rank)
        others = [parcel for parcel in parcels if parcel.rank != self._rank]
        receives = reply_parts(others) if self._links.batched else ()
        own_rows = own.load.message if own.load else None
        own_RD, received = self._server.answer(layer, micro_batch, own_rows, receives)
        if own.load is not None and own_RD is not None:
            own.load.reply_RD = own_RD
        began_s = time.perf_counter()
        self._links.wait(replies or received, Moment(self._plan.step, layer))
        self.counters.wait_s += time.perf_counter() - began_s
