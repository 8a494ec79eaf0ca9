"""Drafts that are hardly guesses: what a request's rules leave as the only tokens to come.

The phrase that closes a thinking budget is known to its end, and so is the text of a grammar where
it leaves no choice, as in the names of a JSON object's members. What a grammar does not take is not
worth verifying.
"""

from __future__ import annotations

from ostro.actors.engine.request import RequestProgress, RequestState
from ostro.actors.engine.step import ScheduledStep


def draft_forced(step: ScheduledStep, most: int) -> None:
    """Draft what must come next in place of what was guessed, and drop guesses that cannot be.

    Args:
        step: Completed; drafts of its requests are made.
        most: Drafts of a request.
    """
    for entry in step.entries:
        progress = entry.progress
        is_decoding = entry.samples and progress.state is RequestState.RUNNING
        if is_decoding and (progress.grammar is not None or progress.thinking is not None):
            _draft(progress, most)


def _draft(progress: RequestProgress, most: int) -> None:
    thinking, grammar, guesses = progress.thinking, progress.grammar, progress.draft_token_ids
    if thinking is not None and thinking.is_open:
        forced = thinking.forced_tokens()
    elif grammar is not None:
        forced = grammar.forced_tokens()
        if guesses[: len(forced)] == forced:
            progress.draft_token_ids = grammar.possible(guesses)[:most]
            return
    else:
        return
    if forced:
        progress.draft_token_ids = forced[:most]
        progress.drafts_are_told = True
