"""What a micro-batch of a step looks like to the model: tensors, made on the host from a plan.

A step's tokens stand in the order of its entries and are cut into micro-batches at any token, so a
request's chunk may span two of them. Rows of a single new token attend together (decode), and so
does each token of a decode with drafts, with a context of its own; longer spans attend one by one
(prefill). `moved` takes a step's batches to the device that computes it.

Shape letters: T tokens of the micro-batch, B rows that attend as decode, n pages of a request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from ostro.actors.engine.request import ImageInput, RequestState
from ostro.actors.engine.step import ScheduledRequest
from ostro.actors.model.packed_copy import send_together
from ostro.kernels.mla_decode import DecodePlan

_NO_TOKEN = 0


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """Several consecutive tokens of one request.

    Attributes:
        rows: Where they stand in the micro-batch.
        start: Place of the first one in the request.
        pages_n: int64 pages of the request, as many as its context fills.
    """

    rows: slice
    start: int
    pages_n: torch.Tensor


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Consecutive tokens of one image's place in a prompt.

    Attributes:
        rows: Where they stand in the micro-batch.
        first: How many of the image's tokens come before them.
    """

    image: ImageInput
    rows: slice
    first: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch; tensors are int64 and all on one device, unless they say more.

    Attributes:
        positions_T: Absolute positions, for rotary embedding and query scale.
        slots_T: Where each token's latent goes.
        last_position: Largest of `positions_T`; -1 if there are no tokens.
        decode_rows: Rows that attend as decode, as a slice where they are consecutive.
        decode_plan: Plan of those rows for `mla_decode`, if there are any.
        prefill_spans: The other rows.
        sample_rows: Rows whose logits are wanted, in the order of the entries.
        image_spans: What of images is among the tokens.
        num_live: int32 [1]; tokens from there on are padding. None where there is none.
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    last_position: int
    decode_rows: slice | torch.Tensor
    decode_plan: DecodePlan | None
    prefill_spans: Sequence[PrefillSpan]
    sample_rows: torch.Tensor
    image_spans: Sequence[ImageSpan]
    num_live: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.tokens_T.shape[0]


class _Span(NamedTuple):
    """Tokens [first, first + num_tokens) of an entry, counted from the entry's start."""

    entry: ScheduledRequest
    first: int
    num_tokens: int

    @property
    def stop(self) -> int:
        return self.first + self.num_tokens


def split_evenly(total: int, num_parts: int) -> list[int]:
    """Sizes of `num_parts` parts of `total`, larger ones first.

    Example:
        5 over 2 gives [3, 2]; 1 over 2 gives [1, 0].
    """
    size, rest = divmod(total, num_parts)
    return [size + (part < rest) for part in range(num_parts)]


def build_batches(
    entries: Sequence[ScheduledRequest],
    *,
    page_size: int,
    num_micro_batches: int,
    position_offset: int = 0,
) -> list[Batch]:
    """Cut a step into micro-batches, some of which may be empty; their tensors are on the host.

    Args:
        entries: The step; every token before an entry's `start` is in the cache already or in an
            earlier entry, of the same request or of one whose prompt begins alike.
        page_size: Slots per page.
        num_micro_batches: How many batches to make.
        position_offset: Added to absolute positions, not to places in pages: tests reach far
            positions with short contexts.

    Raises:
        RuntimeError: A token is still unknown, so the step before has not been completed.
    """
    sizes = split_evenly(sum(entry.num_tokens for entry in entries), num_micro_batches)
    return [_build(spans, page_size, position_offset) for spans in _cut(entries, sizes)]


def moved(batches: Sequence[Batch], device: torch.device) -> list[Batch]:
    """Batches of a step on a device, by one copy for all that are not there yet."""
    tensors: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(tensor)
        return tensor

    is_there = [batch.tokens_T.device == device for batch in batches]
    if all(is_there):
        return list(batches)
    for batch, there in zip(batches, is_there, strict=True):
        if not there:
            _mapped(batch, note)
    sent = iter(send_together(tensors, device))
    return [
        batch if there else _mapped(batch, lambda _: next(sent))
        for batch, there in zip(batches, is_there, strict=True)
    ]


def _mapped(batch: Batch, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    """The batch with each of its tensors changed, always in the same order."""
    rows, plan = batch.decode_rows, batch.decode_plan
    return replace(
        batch,
        tokens_T=change(batch.tokens_T),
        positions_T=change(batch.positions_T),
        slots_T=change(batch.slots_T),
        decode_rows=change(rows) if isinstance(rows, torch.Tensor) else rows,
        decode_plan=None if plan is None else _mapped_plan(plan, change),
        prefill_spans=[replace(span, pages_n=change(span.pages_n)) for span in batch.prefill_spans],
        sample_rows=change(batch.sample_rows),
    )


def _mapped_plan(plan: DecodePlan, change: Callable[[torch.Tensor], torch.Tensor]) -> DecodePlan:
    chunks = plan.chunks()
    return plan.with_chunks(
        replace(
            chunks,
            pages_G=change(chunks.pages_G),
            chunk_X4=change(chunks.chunk_X4),
            first_T1=change(chunks.first_T1),
        )
    )


def _cut(entries: Sequence[ScheduledRequest], sizes: Sequence[int]) -> Iterator[list[_Span]]:
    queue = iter(entries)
    entry: ScheduledRequest | None = None
    used = 0
    for size in sizes:
        spans: list[_Span] = []
        while size:
            if entry is None or used == entry.num_tokens:
                entry, used = next(queue), 0
            count = min(size, entry.num_tokens - used)
            spans.append(_Span(entry, used, count))
            used += count
            size -= count
        yield spans


def _build(spans: Sequence[_Span], page_size: int, position_offset: int) -> Batch:
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    decode_rows: list[int] = []  # and of each its pages and how much of them it attends to
    tables: list[Sequence[int]] = []
    lengths: list[int] = []
    prefills: list[PrefillSpan] = []
    sample_rows: list[int] = []
    image_spans: list[ImageSpan] = []
    for span in spans:
        entry, row = span.entry, len(tokens)
        start = entry.start + span.first
        stop = start + span.num_tokens
        if span.num_tokens == 1:
            tokens.append(_known_token(entry, span.first))
            positions.append(start + position_offset)
            slots.append(entry.pages[start // page_size] * page_size + start % page_size)
            decode_rows.append(row)
            tables.append(entry.pages)
            lengths.append(start + 1)
        else:
            tokens.extend(_known_token(entry, index) for index in range(span.first, span.stop))
            positions.extend(range(start + position_offset, stop + position_offset))
            _extend_slots(slots, entry.pages, start, stop, page_size)
            if entry.num_drafts:
                decode_rows.extend(range(row, row + span.num_tokens))
                tables.extend([entry.pages] * span.num_tokens)
                lengths.extend(range(start + 1, stop + 1))
        if span.num_tokens > 1 and not entry.num_drafts:
            pages_n = torch.from_numpy(np.array(entry.pages[: -(-stop // page_size)], np.int64))
            prefills.append(PrefillSpan(slice(row, row + span.num_tokens), start, pages_n))
        if entry.progress.request.images:
            image_spans.extend(_image_spans(entry.progress.request.images, start, stop, row))
        if entry.samples:
            if entry.num_drafts:
                first = max(entry.num_tokens - 1 - entry.num_drafts, span.first)
                sample_rows.extend(range(row + first - span.first, row + span.num_tokens))
            elif span.stop == entry.num_tokens:
                sample_rows.append(len(tokens) - 1)
    return Batch(
        tokens_T=torch.tensor(tokens, dtype=torch.int64),
        positions_T=torch.tensor(positions, dtype=torch.int64),
        slots_T=torch.tensor(slots, dtype=torch.int64),
        last_position=max(positions, default=-1),
        decode_rows=_row_index(decode_rows),
        decode_plan=_decode_plan(tables, lengths, page_size),
        prefill_spans=prefills,
        sample_rows=torch.tensor(sample_rows, dtype=torch.int64),
        image_spans=image_spans,
    )


def _decode_plan(
    tables: Sequence[Sequence[int]], lengths: Sequence[int], page_size: int
) -> DecodePlan | None:
    return DecodePlan(tables, lengths, page_size, torch.device("cpu")) if lengths else None


def _known_token(entry: ScheduledRequest, index: int) -> int:
    token_id = entry.token_ids[index]
    if token_id is not None:
        return token_id
    token_id = entry.progress.token_at(entry.start + index)
    if token_id is not None:
        return token_id
    if entry.progress.state is RequestState.FINISHED:
        return _NO_TOKEN  # cancelled after it was planned; its result is dropped
    raise RuntimeError(f"token {entry.start + index} of a request is not sampled yet")


def _image_spans(
    images: Sequence[ImageInput], start: int, stop: int, row: int
) -> Iterator[ImageSpan]:
    """What of the images lies at positions [start, stop), the first of which stands in `row`."""
    for image in images:
        first = max(start, image.start)
        last = min(stop, image.start + image.num_tokens)
        if first < last:
            rows = slice(row + first - start, row + last - start)
            yield ImageSpan(image, rows, first - image.start)


def _extend_slots(
    slots: list[int], pages: Sequence[int], start: int, stop: int, page_size: int
) -> None:
    while start < stop:
        page, place = divmod(start, page_size)
        count = min(page_size - place, stop - start)
        first = pages[page] * page_size + place
        slots.extend(range(first, first + count))
        start += count


def _row_index(rows: list[int]) -> slice | torch.Tensor:
    if not rows:
        return slice(0, 0)
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows)
