"""The rounds in which a step's tokens are chosen where it has drafts.

After each draft there are logits too, but the token that they give counts only if all drafts up to
there were right, and it is chosen under what holds after them: a grammar, penalties or a thinking
budget may have moved on. So nothing is ever taken back: a request's next token is chosen when the
one before is known. Where that changes nothing for a request, all of its tokens are chosen in one
round, and those after a wrong draft are thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ostro.actors.engine.request import RequestProgress
from ostro.actors.engine.step import SampledToken, ScheduledRequest, ScheduledStep
from ostro.actors.engine.token_rules import SamplingState, holds_for, sampling_state


class Choice(NamedTuple):
    """A token to choose.

    Attributes:
        position: Of the token, in prompt and output together.
        row: Of the step's logits.
        state: What holds for it, beyond the request's parameters.
    """

    entry: ScheduledRequest
    position: int
    row: int
    state: SamplingState


def choose_in_rounds(
    step: ScheduledStep,
    choose: Callable[[Sequence[Choice]], Sequence[SampledToken]],
    accept: Callable[[ScheduledRequest, SampledToken], bool],
    make_masks: Callable[[Iterable[RequestProgress]], None],
) -> None:
    """Choose all that a step brings.

    Args:
        step: The logits have a row for each of its entries that samples, and then one for each of
            the entry's drafts.
        choose: Gives a token for each choice; called once a round.
        accept: `Scheduler.accept`.
        make_masks: Called before each round but the first, with the requests that are in it.
    """
    open_entries: list[tuple[ScheduledRequest, int]] = []
    num_rows = 0
    for entry in step.entries:
        if entry.samples:
            open_entries.append((entry, num_rows))
            num_rows += 1 + entry.num_drafts
    while open_entries:
        by_entry = [_choices(entry, first_row) for entry, first_row in open_entries]
        tokens = iter(choose([choice for choices in by_entry for choice in choices]))
        still_open = []
        for opened, choices in zip(open_entries, by_entry, strict=True):
            chosen = [next(tokens) for _ in choices]
            if all(accept(opened[0], token) for token in chosen):  # up to the first wrong draft
                still_open.append(opened)
        open_entries = still_open
        if open_entries:
            make_masks(entry.progress for entry, _ in open_entries)


def _choices(entry: ScheduledRequest, first_row: int) -> list[Choice]:
    """The next token of an entry, and those after it that can be chosen with it."""
    num_outputs = len(entry.outputs or ())
    num_left = entry.num_drafts - num_outputs
    count = 1 + num_left if num_left and holds_for(entry.progress, num_left) else 1
    state = sampling_state(entry.progress)
    first_position = entry.start + entry.num_tokens - entry.num_drafts
    return [
        Choice(entry, first_position + index, first_row + index, state)
        for index in range(num_outputs, num_outputs + count)
    ]
