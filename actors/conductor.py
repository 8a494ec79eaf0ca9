"""The conductor: turns the proposals of attention shards into step plans, one step ahead.

Pure bookkeeping without sockets or clocks of its own; the router feeds it and sends what it makes.
A rank that got a plan owes one proposal (0 for idle), which it sends before it runs that plan; so
the plan of step s + 1 is made while s runs. At most two plans are out at a time.

Shape letters: A attention ranks, M micro-batches.
"""

from __future__ import annotations

from collections import deque

from ostro.actors.fabric.messages import StepPlan
from ostro.actors.model.batch import split_evenly
from ostro.configs.deployment import DispatchMode, Layout, LayoutConfig

_MAX_PLANS_OUT = 2


class Conductor:
    """Plans the steps of one epoch."""

    def __init__(self, layout: LayoutConfig, *, epoch: int, placement_version: int) -> None:
        self._layout = layout
        self._epoch = epoch
        self._placement_version = placement_version
        self._num_attention = layout.num_attention_shards
        self._proposed_A = [0] * self._num_attention
        self._owing: set[int] = set()
        self._out: deque[tuple[int, set[int], float]] = deque()
        self._next_step = 0

    def propose(self, rank: int, num_tokens: int) -> None:
        """Note that an attention rank wants to run so many tokens in its next step."""
        self._proposed_A[rank] = num_tokens
        self._owing.discard(rank)

    def done(self, rank: int, step: int, *, now_s: float) -> None:
        """Note that an attention rank finished a step; the next one's time begins with its end."""
        for number, running, _ in self._out:
            if number == step:
                running.discard(rank)
        while self._out and not self._out[0][1]:
            self._out.popleft()
            if self._out:
                number, running, _ = self._out[0]
                self._out[0] = (number, running, now_s)

    def waits_for_plan(self, rank: int) -> bool:
        """Whether an attention rank has proposed and not got its plan yet."""
        return self._proposed_A[rank] > 0

    def next_plan(self, *, now_s: float) -> StepPlan | None:
        """The next plan, or None while there is nothing to run or a proposal is still owed."""
        if len(self._out) >= _MAX_PLANS_OUT or self._owing or not any(self._proposed_A):
            return None
        tokens_AM, sparse = self._shape()
        taking_part = {rank for rank, tokens in enumerate(self._proposed_A) if tokens}
        plan = StepPlan(
            epoch=self._epoch,
            step=self._next_step,
            sparse=sparse,
            tokens_AM=tokens_AM,
            placement_version=self._placement_version,
        )
        self._out.append((self._next_step, set(taking_part), now_s))
        self._owing |= taking_part
        self._proposed_A = [0] * self._num_attention
        self._next_step += 1
        return plan

    def takes_part(self, plan: StepPlan) -> list[int]:
        """Ranks that must get a plan: all experts, and attention ranks that have rows in it."""
        if self._layout.layout is not Layout.SPLIT:
            return list(range(self._layout.world_size()))
        with_rows = [rank for rank, tokens_M in enumerate(plan.tokens_AM) if any(tokens_M)]
        return with_rows + list(self._layout.expert_ranks())

    def overdue(self, *, now_s: float, timeout_s: float) -> tuple[int, list[int]] | None:
        """(step, ranks still running it) of the oldest plan, once it runs for `timeout_s`."""
        if not self._out:
            return None
        step, running, issued_s = self._out[0]
        return (step, sorted(running)) if now_s - issued_s > timeout_s else None

    def _shape(self) -> tuple[list[list[int]], bool]:
        layout = self._layout
        busy = [tokens for tokens in self._proposed_A if tokens]
        sliced = layout.num_micro_batches > 1 and min(busy) >= (
            layout.num_micro_batches * layout.min_tokens_per_micro_batch
        )
        num_slices = layout.num_micro_batches if sliced else 1
        tokens_AM = [split_evenly(tokens, num_slices) for tokens in self._proposed_A]
        if layout.dispatch is DispatchMode.AUTO:
            return tokens_AM, max(map(max, tokens_AM)) > layout.dense_max_tokens
        return tokens_AM, layout.dispatch is DispatchMode.SPARSE
