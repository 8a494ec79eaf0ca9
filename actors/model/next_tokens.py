"""The token that follows each token of a step, which a draft head reads beside the hidden state.

Shape letters: T tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ostro.actors.engine.step import ScheduledRequest
from ostro.actors.model.batch import ImageSpan

_NO_TOKEN = 0


@dataclass(frozen=True, slots=True)
class NextTokens:
    """What follows the tokens of a micro-batch.

    Attributes:
        token_ids: One for each row; any where nobody knows it, as after a draft that was wrong.
        image_spans: What of images is among them.
    """

    token_ids: list[int]
    image_spans: list[ImageSpan]


def next_tokens(entries: Sequence[ScheduledRequest], sizes: Sequence[int]) -> list[NextTokens]:
    """What follows each token of a completed step, cut as its micro-batches are.

    Args:
        entries: The step's.
        sizes: Tokens of each micro-batch; together all of the step's.

    Example:
        a request [5, 6, 7], of whose prompt a step computes the first two, gives [6, 7].
    """
    token_ids = [token_id for entry in entries for token_id in _after(entry)]
    spans = list(_image_spans(entries))
    return [
        NextTokens(token_ids[stop - size : stop], list(_within(spans, stop - size, stop)))
        for size, stop in zip(sizes, accumulate(sizes), strict=True)
    ]


def _after(entry: ScheduledRequest) -> list[int]:
    first = entry.start + 1
    known = entry.progress.known_tokens(first, first + entry.num_tokens)
    return known + [_NO_TOKEN] * (entry.num_tokens - len(known))


def _image_spans(entries: Sequence[ScheduledRequest]) -> Iterator[ImageSpan]:
    """Images among the following tokens, their rows counted over the whole step."""
    row = 0
    for entry in entries:
        start = entry.start + 1
        for image in entry.progress.request.images:
            first = max(start, image.start)
            last = min(start + entry.num_tokens, image.start + image.num_tokens)
            if first < last:
                rows = slice(row + first - start, row + last - start)
                yield ImageSpan(image, rows, first - image.start)
        row += entry.num_tokens


def _within(spans: Sequence[ImageSpan], start: int, stop: int) -> Iterator[ImageSpan]:
    """The spans' parts in rows [start, stop), counted from `start`."""
    for span in spans:
        first, last = max(start, span.rows.start), min(stop, span.rows.stop)
        if first < last:
            skipped = first - span.rows.start
            yield ImageSpan(span.image, slice(first - start, last - start), span.first + skipped)
