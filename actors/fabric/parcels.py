"""Packing a micro-batch's rows for the expert ranks, and adding up what comes back.

    dense   every rank gets the same message with all tokens, and answers with as many rows
    sparse  each rank gets only tokens that have an expert there, once each, after a header that
            says how many; a rank that none needs gets the header alone

Shape letters: T tokens of a micro-batch, R rows for one rank, K experts per token, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ostro.actors.fabric.expert_map import ExpertMap
from ostro.actors.fabric.links import Part
from ostro.actors.fabric.messages import StepPlan
from ostro.actors.fabric.row_codec import (
    HEADER_BYTES,
    Header,
    ReplyBuffer,
    RowBuffer,
    RowLayout,
    RowMessage,
)


@dataclass(slots=True)
class Load:
    """Rows for one expert rank.

    Attributes:
        message: The rows.
        token_R: The token of each row; None if rows are all tokens in order.
        reply_RD: Where the answer comes in, one row for each sent.
    """

    message: RowMessage
    token_R: torch.Tensor | None
    reply_RD: torch.Tensor


@dataclass(slots=True)
class Parcel:
    """What goes to one expert rank.

    Attributes:
        rank: The expert rank.
        announcement: Bytes of the sparse header; None in dense mode.
        load: None if no token needs this rank.
    """

    rank: int
    announcement: torch.Tensor | None
    load: Load | None


class RowPacker:
    """Makes parcels in memory that it uses again; a micro-batch's last until its next `pack`."""

    def __init__(
        self,
        expert_map: ExpertMap,
        layout: RowLayout,
        expert_ranks: Sequence[int],
        device: torch.device,
    ) -> None:
        self._map = expert_map
        self._layout = layout
        self._expert_ranks = expert_ranks
        self._device = device
        self._messages: dict[tuple[int, int | None], RowBuffer] = {}
        self._replies: dict[tuple[int, int], ReplyBuffer] = {}
        self._announcements: dict[tuple[int, int], torch.Tensor] = {}

    def pack(
        self,
        plan: StepPlan,
        layer: int,
        micro_batch: int,
        x_TD: torch.Tensor,
        expert_TK: torch.Tensor,
        weight_TK: torch.Tensor,
    ) -> list[Parcel]:
        """One parcel for each expert rank, in rank order."""
        header = Header(plan.epoch, plan.step, layer, micro_batch, len(x_TD), plan.sparse)
        physical_TK = self._map.to_physical(expert_TK)
        if plan.sparse:
            return self._pack_sparse(header, x_TD, physical_TK, weight_TK)
        return self._pack_dense(header, x_TD, physical_TK, weight_TK)

    def unpack(self, parcels: Sequence[Parcel], num_tokens: int) -> torch.Tensor:
        """[T, D] float32, new: each token's answers, added in rank order."""
        loads = [parcel.load for parcel in parcels if parcel.load is not None]
        if loads and loads[0].token_R is None:
            total_TD = loads[0].reply_RD.to(torch.float32, copy=True)
            for load in loads[1:]:
                total_TD += load.reply_RD
            return total_TD
        total_TD = torch.zeros(
            num_tokens, self._layout.hidden_size, dtype=torch.float32, device=self._device
        )
        for load in loads:
            if load.token_R is not None:
                total_TD.index_add_(0, load.token_R, load.reply_RD.float())
        return total_TD

    def _pack_dense(
        self,
        header: Header,
        x_TD: torch.Tensor,
        physical_TK: torch.Tensor,
        weight_TK: torch.Tensor,
    ) -> list[Parcel]:
        micro_batch = header.micro_batch
        message = self._message(micro_batch, None, len(x_TD))
        message.rows_RD.copy_(x_TD)
        message.expert_RK.copy_(physical_TK)
        message.weight_RK.copy_(weight_TK)
        if not message.raw.is_cuda:  # there it would cost a copy from the host per layer
            header.write(message.raw)
        return [
            Parcel(rank, None, Load(message, None, self._reply(micro_batch, rank, len(x_TD))))
            for rank in self._expert_ranks
        ]

    def _pack_sparse(
        self,
        header: Header,
        x_TD: torch.Tensor,
        physical_TK: torch.Tensor,
        weight_TK: torch.Tensor,
    ) -> list[Parcel]:
        rank_TK = self._map.to_rank(physical_TK)
        parcels = []
        for rank in self._expert_ranks:
            token_R = (rank_TK == rank).any(dim=1).nonzero().flatten()
            num_rows = len(token_R)
            parcel = Parcel(rank, self._announce(header, rank, num_rows), None)
            if num_rows:
                message = self._message(header.micro_batch, rank, num_rows)
                torch.index_select(x_TD, 0, token_R, out=message.rows_RD)
                message.expert_RK.copy_(physical_TK[token_R])
                torch.index_select(weight_TK, 0, token_R, out=message.weight_RK)
                reply_RD = self._reply(header.micro_batch, rank, num_rows)
                parcel.load = Load(message, token_R, reply_RD)
            parcels.append(parcel)
        return parcels

    def _announce(self, header: Header, rank: int, num_rows: int) -> torch.Tensor:
        key = (header.micro_batch, rank)
        if key not in self._announcements:
            self._announcements[key] = torch.empty(
                HEADER_BYTES, dtype=torch.uint8, device=self._device
            )
        header.with_rows(num_rows).write(self._announcements[key])
        return self._announcements[key]

    def _message(self, micro_batch: int, rank: int | None, num_rows: int) -> RowMessage:
        key = (micro_batch, rank)
        if key not in self._messages:
            self._messages[key] = RowBuffer(self._layout, self._device)
        return self._messages[key].take(num_rows)

    def _reply(self, micro_batch: int, rank: int, num_rows: int) -> torch.Tensor:
        key = (micro_batch, rank)
        if key not in self._replies:
            self._replies[key] = ReplyBuffer(self._layout, self._device)
        return self._replies[key].take(num_rows)


def row_parts(parcels: Sequence[Parcel]) -> list[Part]:
    """What to send on the row lane."""
    return [Part(p.rank, p.load.message.raw) for p in parcels if p.load is not None]


def announcement_parts(parcels: Sequence[Parcel]) -> list[Part]:
    """What to send on the header lane; nothing in dense mode."""
    return [Part(p.rank, p.announcement) for p in parcels if p.announcement is not None]


def reply_parts(parcels: Sequence[Parcel]) -> list[Part]:
    """What to receive on the reply lane."""
    return [Part(p.rank, p.load.reply_RD) for p in parcels if p.load is not None]


def count_rows(parcels: Sequence[Parcel]) -> int:
    """Rows that travel."""
    return sum(len(p.load.message.rows_RD) for p in parcels if p.load is not None)
