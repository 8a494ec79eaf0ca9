"""Room for drafts: what of a step and of the pages nobody else wants.

A draft that is wrong was computed for nothing, so drafts come last: they take tokens of the step
that decodes and prompts left, and pages only as long as prompts find theirs and every running
request finds one for its next token. Nobody is ever preempted, held up or charged for them.
"""

from __future__ import annotations

from itertools import islice

from ostro.actors.engine.fairness import OUTPUT_WEIGHT
from ostro.actors.engine.request import RequestProgress
from ostro.actors.engine.request_pages import RequestPages
from ostro.actors.engine.roster import Roster
from ostro.actors.engine.step import ScheduledRequest, ScheduledStep


class DraftRoom:
    """Adds drafts to planned decodes, and finds pages for them.

    Args:
        roster: Whose running requests come first.
        pages: Where they get theirs.
        max_tokens_per_step: Drafts included.
    """

    def __init__(self, roster: Roster, pages: RequestPages, max_tokens_per_step: int) -> None:
        self._roster = roster
        self._pages = pages
        self._max_tokens_per_step = max_tokens_per_step
        self._num_spare: int | None = None  # pages; None while nobody has counted

    def place(self, step: ScheduledStep) -> None:
        """Have the step verify the drafts of its decodes, as far as there is room."""
        self._num_spare = None
        for entry in islice(step.entries, step.num_decodes):
            progress = entry.progress
            if drafts := progress.draft_token_ids:
                progress.draft_token_ids = []
                entry.drafts_are_told = progress.drafts_are_told
                progress.drafts_are_told = False
                if progress.num_pending_outputs == 1:  # else they follow on nothing known
                    self._add(step, entry, drafts)
        self._num_spare = None

    def grow(self, progress: RequestProgress, num_tokens: int) -> bool:
        """Take the pages of a request for so many tokens; False where others need them."""
        missing = self._pages.missing(progress, num_tokens)
        if not missing:
            return True
        if self._num_spare is None:
            self._num_spare = self._count_spare()
        if missing > self._num_spare:
            return False
        self._num_spare -= missing
        return self._pages.grow(progress, num_tokens)

    def close(self, entry: ScheduledRequest) -> int:
        """Take back the room of an entry's wrong drafts, and charge its tenant for the right ones.

        Returns:
            How many were wrong.
        """
        progress, num_accepted = entry.progress, entry.num_accepted()
        num_rejected = entry.num_drafts - num_accepted
        if entry.pages is progress.pages:  # else it was preempted meanwhile and begins again
            progress.num_computed_tokens -= num_rejected
        if num_accepted:
            self._roster.shares.charge(progress.request.tenant, OUTPUT_WEIGHT * num_accepted)
        return num_rejected

    def _count_spare(self) -> int:
        """Pages that are free when every running request has those of its next two tokens."""
        roster = self._roster
        if roster.waiting:
            return 0
        return self._pages.pool.num_free - len(roster.running) - self._pages.lacking(roster.running)

    def _add(self, step: ScheduledStep, entry: ScheduledRequest, drafts: list[int]) -> None:
        progress = entry.progress
        first = progress.num_computed_tokens
        most = min(
            len(drafts),
            self._max_tokens_per_step - step.num_tokens,
            progress.max_num_tokens - 1 - first,  # the last token is never computed
        )
        while most > 0 and not self.grow(progress, first + most):
            most -= 1
        if most > 0:
            entry.token_ids += drafts[:most]
            entry.num_tokens += most
            entry.num_drafts, entry.outputs = most, []
            progress.num_computed_tokens += most
            step.num_tokens += most
            step.num_drafts += most
