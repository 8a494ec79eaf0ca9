"""The choice of a step's tokens: its logits go to the sampler, what comes back to the scheduler.

Shape letters: B rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from ostro.actors.engine.grammar_masks import MaskMaker
from ostro.actors.engine.request import RequestProgress
from ostro.actors.engine.rounds import Choice, choose_in_rounds
from ostro.actors.engine.scheduler import Scheduler
from ostro.actors.engine.step import SampledToken, ScheduledRequest, ScheduledStep
from ostro.actors.engine.token_rules import SamplingState, sampling_state
from ostro.actors.model.sampler import SamplingRow


class StepSampler(Protocol):
    """The choice of tokens as the loop knows it; `model.sampler.Sampler` is one."""

    def sample(
        self, logits: Sequence[torch.Tensor], rows: Sequence[SamplingRow]
    ) -> list[SampledToken]:
        """One token for each row."""
        ...


class StepSampling:
    """Has a step's tokens chosen, each under its request's rules, and hands them to a scheduler."""

    def __init__(self, scheduler: Scheduler, sampler: StepSampler, masks: MaskMaker) -> None:
        self._scheduler = scheduler
        self._sampler = sampler
        self._masks = masks

    def start(self, step: ScheduledStep) -> None:
        """Begin with what the choice needs, beside the model's forward pass."""
        self._masks.start(entry.progress for entry in step.entries if entry.samples)

    def finish(self, step: ScheduledStep, logits: Sequence[torch.Tensor]) -> None:
        """Choose the tokens.

        Args:
            step: `start` was called with it.
            logits: Per micro-batch, float32 [B, V] of its rows that sample.
        """
        self._masks.wait()
        if step.num_drafts:
            self._verify(step, logits)
            return
        entries = [entry for entry in step.entries if entry.samples]
        if not entries:
            return
        rows = [
            _row(entry, entry.start + entry.num_tokens, sampling_state(entry.progress))
            for entry in entries
        ]
        accept = self._scheduler.accept
        for entry, token in zip(entries, self._sampler.sample(logits, rows), strict=True):
            accept(entry, token)

    def _verify(self, step: ScheduledStep, logits: Sequence[torch.Tensor]) -> None:
        logits_BV = logits[0] if len(logits) == 1 else torch.cat(list(logits))

        def choose(choices: Sequence[Choice]) -> list[SampledToken]:
            wanted_BV = logits_BV
            if len(choices) < len(logits_BV):
                row_index = torch.tensor([choice.row for choice in choices])
                wanted_BV = logits_BV.index_select(0, row_index.to(logits_BV.device))
            rows = [_row(choice.entry, choice.position, choice.state) for choice in choices]
            return self._sampler.sample([wanted_BV], rows)

        choose_in_rounds(step, choose, self._scheduler.accept, self._make_masks)

    def _make_masks(self, requests: Iterable[RequestProgress]) -> None:
        self._masks.start(requests)
        self._masks.wait()


def _row(entry: ScheduledRequest, position: int, state: SamplingState) -> SamplingRow:
    forced, bias, banned, allowed = state
    return SamplingRow(
        progress=entry.progress,
        position=position,
        forced_token_id=forced,
        bias=bias,
        banned_token_ids=banned,
        allowed=allowed,
    )
