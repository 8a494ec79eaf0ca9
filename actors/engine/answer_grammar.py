"""The grammar of one request's answer: follows its tokens, says what may come next, and its end.

Only answer tokens count: thinking, and a closing phrase that a budget forces, pass it by. So a
grammar costs nothing while the model thinks, and no budget can bring it out of step. Its state is a
function of the answer's tokens: a request that goes on after a failure is told them again.
"""

from __future__ import annotations

from collections.abc import Iterable

from llguidance import LLMatcher

from ostro.actors.engine.grammar import GrammarError, error_text
from ostro.actors.engine.request import GRAMMAR_FAILED, GrammarParams
from ostro.actors.errors import InvalidRequestError


class AnswerGrammar:
    """One answer's matcher.

    Args:
        matcher: Fresh, of the request's grammar; this object's own.
        params: The request's.

    Attributes:
        matcher: For `grammar_masks`, which computes many masks at once.
        held_token_ids: See `GrammarParams`.
        has_begun: There is some of the answer.
        is_complete: Nothing can follow: the generation ends.
        error: Why the answer cannot go on, or None.

    Raises:
        GrammarError: The prompt ends with what the grammar does not take, or with all of an answer.
    """

    def __init__(self, matcher: LLMatcher, params: GrammarParams) -> None:
        self.matcher = matcher
        self.held_token_ids = params.held_token_ids
        self.is_complete = False
        self.error: InvalidRequestError | None = None
        self.has_begun = bool(params.prefix_token_ids)
        self._mask: bytes | bytearray | memoryview | None = None
        if not matcher.consume_tokens(list(params.prefix_token_ids)):
            raise GrammarError("the prefix is no beginning of such an answer")
        if matcher.is_stopped():
            raise GrammarError("the prefix is a whole answer already")

    @property
    def needs_mask(self) -> bool:
        """Whether the mask of the next token has yet to be computed."""
        return self._mask is None and not self.is_complete and self.error is None

    def observe(self, token_id: int) -> None:
        """Take note of the answer's next token; what ends the output need not be told."""
        self.has_begun, self._mask = True, None
        if not self.matcher.consume_token(token_id):
            self._fail(error_text(self.matcher))
        elif self.matcher.is_stopped():
            self.is_complete = True

    def set_mask(self, mask: memoryview) -> None:
        """Give it the mask that was computed for its next token."""
        self._mask = mask

    def allowed(self, *, also: int | None, banned: Iterable[int]) -> bytearray | None:
        """Bits of the tokens that may come next, least significant first, padded to whole words.

        None if there are none: then `is_complete` or `error` says which of both it is.

        Args:
            also: A token that may come besides those of the grammar.
            banned: Tokens that may not come, for other reasons.
        """
        if self.needs_mask:
            self._mask = self.matcher.compute_bitmask()
        if self.matcher.is_error():
            self._fail(error_text(self.matcher))
        if self._mask is None or self.error is not None:
            return None
        mask = bytearray(self._mask)
        if also is not None:
            mask[also >> 3] |= 1 << (also & 7)
        for token_id in banned:
            if token_id >> 3 < len(mask):
                mask[token_id >> 3] &= ~(1 << (token_id & 7))
        if mask.count(0) < len(mask):
            return mask
        self._end()
        return None

    def forced_tokens(self) -> list[int]:
        """Tokens that come next in any answer; none where there is a choice."""
        if self.is_complete or self.error is not None:
            return []
        return self.matcher.compute_ff_tokens()

    def possible(self, token_ids: list[int]) -> list[int]:
        """The first of these tokens, as far as an answer may go on with them."""
        if not token_ids or self.is_complete or self.error is not None:
            return []
        return token_ids[: self.matcher.validate_tokens(token_ids)]

    def _end(self) -> None:
        if self.matcher.is_accepting():
            self.is_complete = True
        else:
            self._fail("no token that may come next is allowed")

    def _fail(self, why: str) -> None:
        self.error = InvalidRequestError(
            f"the answer cannot go on under its grammar: {why}", code=GRAMMAR_FAILED
        )
