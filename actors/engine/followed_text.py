"""A text that a caller expects to get, and where in it the answer stands.

Most of an edited file is the file as it was. While an answer goes as the expected text does, its
next tokens are known; where it leaves the text, it is looked for again: close by after any of its
tokens, anywhere after two of them. Of several places the one that more tokens lead up to is it, or
the next one ahead.

What is found follows from the tokens alone, not from steps, drafts or ranks: an answer that goes on
elsewhere after a failure stands where it stood.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from math import log
from typing import TYPE_CHECKING

from ostro.actors.engine.ngrams import NgramIndex

if TYPE_CHECKING:
    from ostro.actors.engine.request import GenerationRequest

_MIN_RUN = 2  # tokens that tell a place anywhere in the text
_MAX_RUN = 8  # tokens before a place that are compared, and the trust in where an answer begins
_SURE = 3  # tokens in a row
_NEAR = 32  # tokens ahead of where the answer left the text that are "close by"
_NEAR_FOR = 16  # tokens of the answer since then; after more it is somewhere else
_FIRST_SHARE = 0.95  # of tokens that come as they should: the caller's word
_LEAST_SHARE = 0.01  # and the same of tokens that do not
_NEW_WEIGHT = 1 / 12  # of a token in that share
_INDEXED_PER_TOKEN = 512  # 0.2 ms; an answer cannot get so far ahead


TOKEN_BYTES = 4


def packed(token_ids: list[int]) -> bytes:
    """Token ids as a request carries them while it waits: a ninth of a list's memory.

    Example:
        [1, 256] is 01 00 00 00 00 01 00 00.
    """
    return struct.pack(f"<{len(token_ids)}i", *token_ids)


def followed_text(request: GenerationRequest, output: list[int]) -> FollowedText:
    """Where a request's output, which may grow, stands in what was predicted of it."""
    prediction = request.prediction
    text = [*struct.unpack(f"<{len(prediction) // TOKEN_BYTES}i", prediction)]
    restart_token_id = None if request.thinking is None else request.thinking.end_token_id
    return FollowedText(text, request.prompt_token_ids, output, restart_token_id)


class FollowedText:
    """The place of one answer in the text that was expected.

    Attributes:
        num_met: Tokens of the text that the answer had where it stood at them; thinking that has
            ended does not count.

    Args:
        text: What is expected, at least one token.
        prompt: What the answer follows on: it may begin in the middle of the text.
        output: Of the request, thinking included; kept by reference, it grows.
        restart_token_id: The answer begins, anew, after this one: thinking ends with it.
    """

    def __init__(
        self, text: list[int], prompt: list[int], output: list[int], restart_token_id: int | None
    ) -> None:
        self._text, self._prompt, self._output = text, prompt, output
        self._restart_token_id = restart_token_id
        self._index = NgramIndex(text, [], max_ngram=_MAX_RUN, min_ngram=_MIN_RUN)
        self._num_seen = 0  # tokens of the output
        self._next = 0  # place of the token that should come next; beyond the text: nobody knows
        self._run = _MAX_RUN  # how many tokens in a row say so
        self._share = _FIRST_SHARE  # of tokens that came as they should where that was sure
        self._home = 0  # where the answer stood when that was sure
        self._num_lost = 0  # tokens since then
        self._is_met = bytearray(len(text))
        self._num_met = 0

    @property
    def num_met(self) -> int:
        """See the class."""
        self._follow()
        return self._num_met

    @property
    def is_sure(self) -> bool:
        """Whether it is known what should come next, and likelier right than not."""
        return self.num_likely > 0 and self._is_found()

    @property
    def num_likely(self) -> int:
        """How many of the next tokens are likelier right than not, going by those that came."""
        self._follow()
        share = min(max(self._share, _LEAST_SHARE), 1 - _LEAST_SHARE)
        return int(log(0.5) / log(share))

    def draft(self, num_tokens: int) -> list[int]:
        """What should come next, at most one token more than have come as they should in a row.

        Example:
            text [1, 2, 3, 4, 5, 6]: after output [1] it is [2, 3, ...], after [1, 9] it is [3], and
            after [1, 9, 4, 5] it is [6].
        """
        self._follow()
        return self._text[self._next : self._next + min(num_tokens, self._run + 1)]

    def _follow(self) -> None:
        """Take note of all output that is there."""
        output, text = self._output, self._text
        while self._num_seen < len(output):
            self._index.extend(_INDEXED_PER_TOKEN)
            if not self._num_seen:
                self._begin_amid()
            token_id = output[self._num_seen]
            self._num_seen += 1
            if token_id == self._restart_token_id:
                self._restart()
            elif self._next < len(text) and text[self._next] == token_id:
                self._judge(is_right=True)
                self._meet(self._next, self._run + 1)
            else:
                self._judge(is_right=False)
                self._leave(token_id)

    def _begin_amid(self) -> None:
        """Begin after the prompt's last tokens if the text has them, as with an answer's prefix."""
        if self._prompt:
            place, run = self._find(self._prompt[-1])
            if run >= _SURE:
                self._next, self._run, self._home = place + 1, run, place + 1

    def _is_found(self) -> bool:
        return self._run >= _SURE and self._next < len(self._text)

    def _judge(self, *, is_right: bool) -> None:
        if self._is_found():
            self._share += _NEW_WEIGHT * (is_right - self._share)

    def _restart(self) -> None:
        self._next, self._run, self._home, self._num_lost = 0, _MAX_RUN, 0, 0
        self._share = _FIRST_SHARE
        self._is_met, self._num_met = bytearray(len(self._text)), 0

    def _meet(self, place: int, run: int) -> None:
        """The last token is the one at a place, after so many in a row, itself included."""
        self._num_met += not self._is_met[place]
        self._is_met[place] = 1
        self._next, self._run = place + 1, run
        if run >= _SURE:
            self._home, self._num_lost = self._next, 0

    def _leave(self, token_id: int) -> None:
        """The last token is another one than it should be."""
        was_sure = self._run >= _SURE
        self._num_lost += 1
        place, run = self._find(token_id)
        if run:
            self._meet(place, run)
        else:  # the first one may stand for the one that should be
            self._next = self._next + 1 if was_sure else len(self._text)
            self._run = 0

    def _find(self, token_id: int) -> tuple[int, int]:
        """The likeliest place of the last token, and how many are the same up to there; 0: none."""
        places = {*self._index.places_of((self._back(1), token_id))}
        if 0 < self._num_lost <= _NEAR_FOR:
            places.update(self._near(token_id))
        best, best_rank = 0, (0, False, 0)
        for place in places:
            is_ahead = place >= self._home
            rank = (self._length(place), is_ahead, -abs(place - self._home))
            if rank > best_rank:
                best, best_rank = place, rank
        return best, best_rank[0]

    def _near(self, token_id: int) -> Iterator[int]:
        first, text = self._home, self._text
        ahead = range(first, min(first + _NEAR, len(text)))
        return (place for place in ahead if text[place] == token_id)

    def _length(self, place: int) -> int:
        """How many tokens up to a place are the last ones of prompt and output."""
        length = 0
        while length < _MAX_RUN and length <= place:
            if self._text[place - length] != self._back(length):
                break
            length += 1
        return length

    def _back(self, count: int) -> int:
        """The token so many before the last one that was seen; -1 before the prompt."""
        index = self._num_seen - 1 - count
        if index >= 0:
            return self._output[index]
        index += len(self._prompt)
        return self._prompt[index] if index >= 0 else -1
