"""Drafts tokens with a head that reads the model's hidden states.

After each step the head takes note of all its tokens, at the same places as the model did: rejected
drafts stand where the next step's tokens will. The row of a request's last token gives its first
draft; each further one takes a pass of the head alone, over that draft and the head's own state.

Shape letters: T tokens of a micro-batch, B requests that get drafts, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import torch

from ostro.actors.drafter import GrowPages
from ostro.actors.engine.request import RequestProgress, RequestState
from ostro.actors.engine.step import ScheduledStep
from ostro.actors.model.batch import Batch
from ostro.actors.model.latent_cache import LatentCache
from ostro.actors.model.next_tokens import next_tokens
from ostro.actors.model.packed_copy import send_together
from ostro.kernels.mla_decode import DecodePlan


class DraftedModel(Protocol):
    """The model as a drafter knows it; `model.decoder.Decoder` is one."""

    hidden: list[torch.Tensor]

    def logits(self, rows_BD: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] of normed hidden states."""
        ...


class DraftingHead(Protocol):
    """The head as a drafter knows it; `EagleHead` and `GraphedHead` are such."""

    cache: LatentCache

    def forward(
        self,
        hidden_TD: torch.Tensor,
        batch: Batch,
        rows_R: torch.Tensor | None = None,
        tokens_T: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `EagleHead`."""
        ...


@dataclass(frozen=True, slots=True)
class EagleParts:
    """What outlives the drafters of single epochs."""

    head: DraftingHead
    model: DraftedModel


@dataclass(frozen=True, slots=True)
class _Guess:
    """A request that will decode next, and how many drafts it has room for."""

    progress: RequestProgress
    num_drafts: int


class EagleDrafter:
    """See `drafter.Drafter`."""

    def __init__(self, parts: EagleParts, grow: GrowPages) -> None:
        self._head, self._model = parts.head, parts.model
        self._grow = grow

    @torch.inference_mode()
    def draft(self, step: ScheduledStep, batches: Sequence[Batch], num_drafts: int) -> None:
        """See `drafter.Drafter`."""
        rows = _rows_of_last_tokens(step) if num_drafts else []
        state_BD = self._take_note(step, batches, [row for _, row in rows])
        for progress, _ in rows:
            progress.draft_token_ids = []
        # Only now: the pages may be those of requests that have ended, which were written above.
        guesses = [_Guess(progress, self._room(progress, num_drafts)) for progress, _ in rows]
        order = sorted(range(len(guesses)), key=lambda index: -guesses[index].num_drafts)
        order = [index for index in order if guesses[index].num_drafts]
        if order:
            (order_B,) = send_together([torch.tensor(order)], state_BD.device)
            self._guess([guesses[index] for index in order], state_BD.index_select(0, order_B))

    def _take_note(
        self, step: ScheduledStep, batches: Sequence[Batch], rows: Sequence[int]
    ) -> torch.Tensor:
        """Take the step's tokens; the head's states [B, D] at these of its rows, ascending."""
        states, sizes = [], [batch.num_tokens for batch in batches]
        for batch, following, hidden_TD, stop in zip(
            batches,
            next_tokens(step.entries, sizes),
            self._model.hidden,
            accumulate(sizes),
            strict=True,
        ):
            first = stop - batch.num_tokens
            within = [row - first for row in rows if first <= row < stop]
            shifted = replace(
                batch,
                tokens_T=torch.tensor(following.token_ids, dtype=torch.int64),
                image_spans=following.image_spans,
            )
            rows_R = torch.tensor(within, dtype=torch.int64)
            states.append(self._head.forward(hidden_TD, shifted, rows_R))
        return states[0] if len(states) == 1 else torch.cat(states)

    def _room(self, progress: RequestProgress, num_drafts: int) -> int:
        """Drafts that can be verified: the last token the model allows needs none."""
        num_known = progress.num_known_tokens
        most = min(num_drafts, progress.max_num_tokens - num_known - 1)
        if most > 0 and not self._grow(progress, num_known + most):
            most = min(most, len(progress.pages) * self._head.cache.page_size - num_known)
        return max(most, 0)

    def _guess(self, guesses: Sequence[_Guess], state_BD: torch.Tensor) -> None:
        """Draft for requests, those with the most drafts first, from the head's states."""
        model = self._model
        chosen = [model.logits(state_BD).argmax(dim=1)]
        for batch in self._single_passes(guesses):
            count = batch.num_tokens
            tokens_B = chosen[-1][:count]
            state_BD = self._head.forward(state_BD[:count], batch, tokens_T=tokens_B)
            chosen.append(model.logits(state_BD).argmax(dim=1))
        token_ids = iter(torch.cat(chosen).tolist())
        for tokens_B in chosen:
            for guess in guesses[: len(tokens_B)]:
                guess.progress.draft_token_ids.append(next(token_ids))

    def _single_passes(self, guesses: Sequence[_Guess]) -> Iterator[Batch]:
        """One token of each request for every draft but the first, on the host."""
        for depth in range(1, guesses[0].num_drafts):
            taking = [guess.progress for guess in guesses if guess.num_drafts > depth]
            # The first draft comes from the last computed token, this one from `depth` after it.
            positions = [progress.num_known_tokens - 2 + depth for progress in taking]
            yield self._decode_batch(taking, positions)

    def _decode_batch(self, requests: Sequence[RequestProgress], positions: Sequence[int]) -> Batch:
        page_size = self._head.cache.page_size
        tables = [progress.pages for progress in requests]
        slots = [
            table[position // page_size] * page_size + position % page_size
            for table, position in zip(tables, positions, strict=True)
        ]
        positions_T = torch.tensor(positions)
        lengths = [position + 1 for position in positions]
        return Batch(
            tokens_T=positions_T,  # the tokens are known on the device alone
            positions_T=positions_T,
            slots_T=torch.tensor(slots),
            last_position=max(positions),
            decode_rows=slice(0, len(requests)),
            decode_plan=DecodePlan(tables, lengths, page_size, torch.device("cpu")),
            prefill_spans=(),
            sample_rows=positions_T[:0],
            image_spans=(),
        )


def _rows_of_last_tokens(step: ScheduledStep) -> list[tuple[RequestProgress, int]]:
    """Requests whose next step decodes, with the row of the last token that the model computed.

    Not those whose next tokens are known: their drafts would be replaced.
    """
    found, first_row = [], 0
    for entry in step.entries:
        progress = entry.progress
        index = progress.num_computed_tokens - 1 - entry.start
        if _needs_guess(progress) and 0 <= index < entry.num_tokens:
            found.append((progress, first_row + index))
        first_row += entry.num_tokens
    return found


def _needs_guess(progress: RequestProgress) -> bool:
    decodes = progress.num_computed_tokens == progress.num_known_tokens - 1
    is_known = progress.prediction is not None and progress.prediction.is_sure
    return progress.state is RequestState.RUNNING and decodes and not is_known
