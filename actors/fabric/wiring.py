"""What both sides of a cell's transport know, and the plans they refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ostro.actors.errors import TransportError
from ostro.actors.fabric.epoch import EpochGroup
from ostro.actors.fabric.expert_map import ExpertMap
from ostro.actors.fabric.links import Links
from ostro.actors.fabric.local_exchange import check_placement
from ostro.actors.fabric.messages import StepPlan
from ostro.actors.fabric.parcels import RowPacker
from ostro.actors.fabric.placement import Placement
from ostro.actors.fabric.row_codec import RowLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """What both sides of a cell's transport know.

    Attributes:
        group: The epoch.
        attention_ranks: In the order of a plan's `tokens_AM`.
        placement: Its ranks are the expert ranks.
        layout: Rows, the same everywhere.
        timeout_s: How long a peer may stay silent.
    """

    group: EpochGroup
    attention_ranks: Sequence[int]
    placement: Placement
    layout: RowLayout
    timeout_s: float

    def links(self) -> Links:
        """Connections whose errors name a peer's role."""
        return Links(self.group, timeout_s=self.timeout_s, role_of=self._role_of)

    def expert_map(self) -> ExpertMap:
        """The placement as this rank sees it."""
        return ExpertMap(self.placement, self.group.device, rank=self.group.rank)

    def packer(self, expert_map: ExpertMap) -> RowPacker:
        """Parcels for all expert ranks."""
        return RowPacker(expert_map, self.layout, self.placement.ranks(), self.group.device)

    def check_plan(self, plan: StepPlan) -> None:
        """Refuse a plan of another epoch or placement; raises TransportError."""
        if plan.epoch != self.group.epoch:
            raise TransportError(
                f"step {plan.step} is planned for epoch {plan.epoch}; "
                f"this rank is in epoch {self.group.epoch}"
            )
        check_placement(plan, self.placement)
        if len(plan.tokens_AM) != len(self.attention_ranks):
            raise TransportError(
                f"step {plan.step} is planned for {len(plan.tokens_AM)} attention ranks, "
                f"the cell has {len(self.attention_ranks)}"
            )

    def tokens_of(self, plan: StepPlan, rank: int) -> list[int]:
        """Rows of one attention rank by micro-batch."""
        return plan.tokens_AM[self.attention_ranks.index(rank)]

    def _role_of(self, rank: int) -> str:
        if rank in self.attention_ranks and rank in self.placement.ranks():
            return "shard"
        return "attention shard" if rank in self.attention_ranks else "expert shard"


def check_size(plan: StepPlan, tokens_M: Sequence[int], micro_batch: int, num_tokens: int) -> None:
    """Refuse rows that the plan does not know of: a peer would wait for others.

    Raises:
        TransportError: Tells both numbers.
    """
    if micro_batch >= len(tokens_M) or tokens_M[micro_batch] != num_tokens:
        raise TransportError(
            f"micro-batch {micro_batch} has {num_tokens} tokens; step {plan.step} is planned "
            f"with {list(tokens_M)}"
        )
