"""The reference of every transport: all experts in the caller's own process.

An exchange takes a token's row to the ranks that hold its experts and brings their sum back. What
the decoder sees of it is `dispatch` and `combine` (its protocol ExpertExchange); what computes is
a callable `RowExperts`. `LocalExchange` joins the two with a call; `transport` sends rows between
ranks and must agree with it.

Shape letters: T tokens of a micro-batch, R rows at an expert rank, K experts per token, D hidden
size.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch

from ostro.actors.errors import TransportError
from ostro.actors.fabric.expert_map import ExpertMap
from ostro.actors.fabric.messages import StepPlan
from ostro.actors.fabric.placement import Placement
from ostro.kernels.combine import PairRows


class RowExperts(Protocol):
    """The experts of one rank."""

    def __call__(
        self,
        layer: int,
        rows_RD: torch.Tensor,
        expert_RK: torch.Tensor,
        weight_RK: torch.Tensor,
    ) -> torch.Tensor:
        """Each row's weighted sum over the experts that are here.

        Args:
            layer: Which layer's experts.
            rows_RD: The model's dtype; must not be kept or written to.
            expert_RK: int64 local ids, -1 for an expert of another rank.
            weight_RK: float32.

        Returns:
            out_RD in the dtype of `rows_RD`.
        """
        ...


class LocalRowExperts(Protocol):
    """Likewise, where nothing travels: what it gives may be left to add up."""

    def __call__(
        self,
        layer: int,
        rows_RD: torch.Tensor,
        expert_RK: torch.Tensor,
        weight_RK: torch.Tensor,
    ) -> torch.Tensor | PairRows:
        """As `RowExperts`, or its pairs' rows."""
        ...


@dataclass(slots=True)
class ExchangeCounters:
    """Where a transport's time went and what it carried, in its epoch.

    Attributes:
        dispatch_s: Packing and sending rows.
        wait_s: Waiting for peers.
        experts_s: Computing experts, on a rank that has some.
        num_rows: Rows sent to other ranks, or served for them on a rank with experts only.
    """

    dispatch_s: float = 0.0
    wait_s: float = 0.0
    experts_s: float = 0.0
    num_rows: int = 0


class LocalExchange:
    """All experts in the same process, called directly: the reference of every transport."""

    def __init__(
        self,
        experts: LocalRowExperts,
        placement: Placement,
        device: torch.device | str = "cpu",
        *,
        has_shared: bool = False,
    ) -> None:
        """An exchange without other ranks.

        Args:
            experts: All of them.
            placement: Puts every expert on one rank.
            device: Where rows are.
            has_shared: Whether the id after the last logical expert's is the shared one's.

        Raises:
            ValueError: Several ranks, or `has_shared` and experts that do not stand in the order of
                their ids.
        """
        if len(placement.ranks()) != 1:
            raise ValueError(f"a local exchange has one rank; placement has {placement.ranks()}")
        self._experts = experts
        self._map = ExpertMap(placement, torch.device(device), rank=placement.ranks()[0])
        if has_shared and not self._map.is_plain:
            raise ValueError(
                "a shared expert among the routed ones needs expert i in slot i; "
                f"placement has {placement.physical_to_logical}; load the shared expert apart"
            )
        self._waiting: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self.counters = ExchangeCounters()

    def begin_step(self, plan: StepPlan) -> None:
        """Make ready for a plan's rows."""
        check_placement(plan, self._map.placement)
        self._waiting.clear()

    def dispatch(
        self,
        layer: int,
        micro_batch: int,
        x_TD: torch.Tensor,
        expert_TK: torch.Tensor,
        weight_TK: torch.Tensor,
    ) -> None:
        """Hand in a micro-batch's rows; ids are logical, int64."""
        self._waiting[layer, micro_batch] = (x_TD, expert_TK, weight_TK)

    def combine(self, layer: int, micro_batch: int) -> torch.Tensor | PairRows:
        """[T, D], or its pairs: what the experts made of the rows handed in; float32 on a CPU."""
        x_TD, expert_TK, weight_TK = self._waiting.pop((layer, micro_batch))
        began_s = time.perf_counter()
        if not self._map.is_plain:
            expert_TK = self._map.to_local(self._map.to_physical(expert_TK))
        out_TD = self._experts(layer, x_TD, expert_TK, weight_TK)
        self.counters.experts_s += time.perf_counter() - began_s
        if isinstance(out_TD, PairRows) or out_TD.is_cuda:
            return out_TD
        return out_TD.float()

    def end_step(self) -> None:
        """Nothing is left to wait for."""

    def serve_all(self, num_layers: int) -> None:
        """Nobody else has rows."""


def check_placement(plan: StepPlan, placement: Placement) -> None:
    """Refuse a plan whose physical experts are another placement's.

    Raises:
        TransportError: Names both versions.
    """
    if plan.placement_version != placement.version:
        raise TransportError(
            f"step {plan.step} is planned for placement {plan.placement_version}; "
            f"this rank has placement {placement.version}"
        )
