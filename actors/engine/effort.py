"""Thinking budgets: counts a request's thinking tokens and says when thinking must end.

The end is forced as ordinary output, one token of the closing phrase a step, so that the model goes
on from it as if it had written it itself. Nothing here knows of logits: the sampler is told which
token to take, which to favour and which to leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ostro.actors.engine.request import ThinkingParams

EndedBy = Literal["model", "budget", "caller"]

# At the end of the soft zone the end mark's logit is raised by this: enough to win where the model
# gives it one chance in a few thousand.
_FULL_BIAS = 8.0


class ThinkingTracker:
    """Follows one request's output, token by token.

    Attributes:
        is_open: Whether the next token belongs to the thinking.
        num_thinking_tokens: Tokens between the marks so far, a forced closing phrase included;
            never more than the budget.
        ended_by: Who ended the thinking, once it has ended.
        banned_token_ids: The begin mark, where thinking must not begin (again).
    """

    def __init__(self, params: ThinkingParams) -> None:
        self.begin_token_id = params.begin_token_id
        self.end_token_id = params.end_token_id
        end_mark = (params.end_token_id,)
        closing = params.closing_token_ids
        closing = closing if closing[-1:] == end_mark else closing + end_mark
        budget = params.budget_tokens
        if budget is not None and budget < len(closing):
            closing = end_mark  # no room for a phrase
        self._closing = closing
        # The phrase counts as thinking, and a budget is never overrun.
        self._limit = None if budget is None else budget - (len(closing) - 1)
        self._soft_zone_tokens = params.soft_zone_tokens
        self._num_forced = 0
        self._cause: EndedBy | None = None
        self.is_open = False
        self.num_thinking_tokens = 0
        self.ended_by: EndedBy | None = None
        self.banned_token_ids: tuple[int, ...] = ()
        if params.starts_open:
            self._open()
        elif self._is_spent():
            self._forbid()

    def observe(self, token_id: int) -> None:
        """Take note of the next output token."""
        if not self.is_open:
            if token_id == self.begin_token_id:
                self._open()
            return
        if token_id == self.end_token_id:
            self._close()
            return
        self.num_thinking_tokens += 1
        if self._cause is None:
            if self._is_spent():
                self._cause = "budget"
        elif token_id == self._closing[self._num_forced]:
            self._num_forced += 1

    def next_token(self) -> int | None:
        """The token that must come next, or None if the model may choose."""
        return None if self._cause is None else self._closing[self._num_forced]

    def forced_tokens(self) -> list[int]:
        """All tokens that must come next, up to the end of the thinking; none if it is free."""
        return [] if self._cause is None else list(self._closing[self._num_forced :])

    def end_bias(self) -> float:
        """What to add to the end mark's logit: 0 outside the soft zone, rising linearly within."""
        limit, zone = self._limit, self._soft_zone_tokens
        if not self.is_open or self._cause is not None or limit is None or zone == 0:
            return 0.0
        num_into_zone = zone - (limit - self.num_thinking_tokens)
        return max(_FULL_BIAS * num_into_zone / zone, 0.0)

    def leaves_free(self, num_tokens: int) -> bool:
        """Whether the next token, and so many after it, are chosen under what holds now.

        Whatever the tokens are: opening and closing marks among them, too.
        """
        if self._cause is not None:
            return False
        if self._limit is None or (self.banned_token_ids and not self.is_open):
            return True
        left = self._limit - self.num_thinking_tokens
        return num_tokens < left and num_tokens <= left - self._soft_zone_tokens

    def end_now(self) -> bool:
        """End the thinking on the caller's behalf; False if it has ended or is ending already."""
        if self.is_open:
            if self._cause is not None:
                return False
            self._cause = "caller"
            return True
        if self.banned_token_ids or self.ended_by is not None:
            return False
        self._forbid()
        return True

    def end_again(self, output: Sequence[int]) -> None:
        """Take up an end that the caller had asked for before all of this observed output."""
        if not self.is_open:
            self.ended_by = None if self.ended_by is None else "caller"
            self._forbid()
            return
        self._cause = "caller"
        phrase = list(self._closing[:-1])
        while phrase != list(output[len(output) - len(phrase) :]):
            phrase.pop()
        self._num_forced = len(phrase)

    def _open(self) -> None:
        self.is_open = True
        self.ended_by = None
        if self._is_spent():
            self._cause = "budget"

    def _close(self) -> None:
        was_forced = self._cause is not None and self._num_forced == len(self._closing) - 1
        self.ended_by = self._cause if was_forced else "model"
        if self._cause is not None or self._is_spent():
            self._forbid()
        self.is_open = False
        self._cause = None
        self._num_forced = 0

    def _is_spent(self) -> bool:
        return self._limit is not None and self.num_thinking_tokens >= self._limit

    def _forbid(self) -> None:
        self.banned_token_ids = (self.begin_token_id,)
