"""What an attention shard asks of whoever drafts the tokens that its next step verifies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ostro.actors.engine.request import RequestProgress
from ostro.actors.engine.step import ScheduledStep
from ostro.actors.model.batch import Batch

# Finds a request pages for so many tokens; False, and none taken, where that cost others theirs.
GrowPages = Callable[[RequestProgress, int], bool]


class Drafter(Protocol):
    """Guesses the next tokens of requests. A wrong guess costs time and never an answer."""

    def draft(self, step: ScheduledStep, batches: Sequence[Batch], num_drafts: int) -> None:
        """Set `draft_token_ids` of the requests of a completed step that will decode next.

        Args:
            step: Its tokens are chosen, and known to its requests; some of these have ended by now,
                or wait to begin again, and get no drafts.
            batches: The step's micro-batches as the decoder took them.
            num_drafts: Drafts of a request, at most; 0 asks for none, and a drafter that keeps
                something of each token still takes note of the step.
        """
        ...
