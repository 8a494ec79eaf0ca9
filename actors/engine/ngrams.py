"""Prompt lookup: what followed the last tokens where they stood before, in the same request.

An index of a request's text grows with it, so that a look-up costs the same at any length: short
runs of tokens are found by hash, the longest earlier one by walking back from its latest places.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

_TOKEN_BITS = 32
_MOST_PLACES = 16  # where the shortest run stood, that are looked at: the latest ones


class NgramIndex:
    """The runs of one request's tokens.

    Args:
        prompt: The first tokens; kept by reference, as `output` is, which may grow.
        output: Those that follow.
        max_ngram: Longest run that is compared.
        min_ngram: Shortest run that counts.
        most_of_prompt: Tokens of the prompt that are indexed, its last ones; None for all. A token
            takes some 110 bytes.
    """

    def __init__(
        self,
        prompt: list[int],
        output: list[int],
        *,
        max_ngram: int,
        min_ngram: int,
        most_of_prompt: int | None = None,
    ) -> None:
        self._prompt, self._output = prompt, output
        self._min, self._max = min_ngram, max_ngram
        self._mask = (1 << _TOKEN_BITS * min_ngram) - 1
        self._key = 0  # the last `min_ngram` of the indexed tokens
        self._first = 0 if most_of_prompt is None else max(len(prompt) - most_of_prompt, 0)
        self._num_indexed = self._first  # the tokens before it count as indexed
        self._least = self._first + min_ngram - 1  # no place has a whole run before this one
        self._last_of: dict[int, int] = {}  # position of the last token of the latest such run
        self._before = array("i")  # from `_first` on, of the run before; -1 for none

    def extend(self, most: int) -> int:
        """Take in new tokens, but no more than `most`; returns how many."""
        first, num_prompt = self._num_indexed, len(self._prompt)
        end = num_prompt + len(self._output)
        if end - first == 1 <= most and first >= num_prompt:  # as with every token of a stream
            self._key = key = (self._key << _TOKEN_BITS | self._output[-1]) & self._mask
            self._before.append(self._last_of.get(key, -1))
            self._last_of[key] = first
            self._num_indexed = end
            return 1
        last = min(end, first + most)
        tokens = self._prompt[first:last]
        tokens += self._output[max(first - num_prompt, 0) : max(last - num_prompt, 0)]
        key, mask, last_of, before = self._key, self._mask, self._last_of, self._before
        for position, token_id in enumerate(tokens, first):
            key = (key << _TOKEN_BITS | token_id) & mask
            before.append(last_of.get(key, -1))
            last_of[key] = position
        self._key, self._num_indexed = key, last
        return last - first

    def draft(self, num_tokens: int) -> list[int]:
        """What would come next if the text went on as it did before; empty if all is new.

        Of the runs that end the text the longest one counts that stood there before, and where it
        stood last. Past the end of the text its own continuation goes on.

        Example:
            [1, 2, 3, 1, 2] gives [3, 1, 2, 3] for 4 tokens.
        """
        end = len(self._prompt) + len(self._output)
        if self._num_indexed < end or end - self._first <= self._min or num_tokens < 1:
            return []
        place = self._find(end)
        if place < 0:
            return []
        drafts: list[int] = []
        for position in range(place + 1, place + 1 + num_tokens):
            drafts.append(self._at(position) if position < end else drafts[position - end])
        return drafts

    def places_of(self, run: Sequence[int]) -> Iterator[int]:
        """Positions of the last token of a run of `min_ngram` tokens, the latest of them first."""
        key = 0
        for token_id in run:
            key = key << _TOKEN_BITS | token_id
        place = self._last_of.get(key, -1)
        for _ in range(_MOST_PLACES):
            if place < self._least:
                return
            yield place
            place = self._before[place - self._first]

    def _find(self, end: int) -> int:
        """Position of the last token of the run to go on from; -1 if there is none."""
        best, longest = -1, self._min - 1
        place = self._before[end - 1 - self._first]
        for _ in range(_MOST_PLACES):
            if place < self._least:
                break
            length = self._length(place, end - 1)
            if length > longest:
                best, longest = place, length
                if length == self._max:
                    break
            place = self._before[place - self._first]
        return best

    def _length(self, first: int, second: int) -> int:
        """How many tokens up to two positions are the same, as far as it counts."""
        length = 0
        while length < self._max and length <= first:
            if self._at(first - length) != self._at(second - length):
                break
            length += 1
        return length

    def _at(self, position: int) -> int:
        num_prompt = len(self._prompt)
        if position < num_prompt:
            return self._prompt[position]
        return self._output[position - num_prompt]
