"""Micro-batches: even cuts at any token, slots, positions, what samples and how rows attend."""

from __future__ import annotations

from array import array
from dataclasses import astuple

import pytest
import torch
from model_rig import make_progress

from ostro.actors.engine.request import RequestState
from ostro.actors.engine.step import ScheduledRequest
from ostro.actors.model.batch import Batch, build_batches, moved, split_evenly


def entry(
    start: int,
    num_tokens: int,
    pages: list[int],
    *,
    samples: bool = False,
    unknown: bool = False,
    output: tuple[int, ...] = (),
) -> ScheduledRequest:
    """Part of a request whose token at position p is 100 + p; `unknown` leaves the last one out."""
    prompt = [100 + position for position in range(start + num_tokens - unknown)]
    progress = make_progress("r", prompt, output=output)
    tokens: list[int | None] = [100 + start + index for index in range(num_tokens)]
    if unknown:
        tokens[-1] = None
    return ScheduledRequest(progress, start, num_tokens, tokens, array("i", pages), samples)


def build(entries: list[ScheduledRequest], num_micro_batches: int = 1) -> list[Batch]:
    return build_batches(entries, page_size=4, num_micro_batches=num_micro_batches)


@pytest.mark.parametrize(
    ("total", "num_parts", "sizes"),
    [(5, 2, [3, 2]), (4, 2, [2, 2]), (1, 2, [1, 0]), (0, 2, [0, 0]), (7, 1, [7])],
)
def test_split_evenly(total: int, num_parts: int, sizes: list[int]) -> None:
    assert split_evenly(total, num_parts) == sizes


def test_batch_holds_tokens_positions_and_slots() -> None:
    (batch,) = build([entry(2, 5, [7, 3]), entry(4, 1, [0, 9])])
    assert batch.tokens_T.tolist() == [102, 103, 104, 105, 106, 104]
    assert batch.positions_T.tolist() == [2, 3, 4, 5, 6, 4]
    assert batch.slots_T.tolist() == [30, 31, 12, 13, 14, 36]
    assert batch.last_position == 6
    assert batch.num_tokens == 6


def test_single_tokens_attend_as_decode_and_spans_as_prefill() -> None:
    (batch,) = build([entry(8, 1, [1, 2, 3]), entry(0, 4, [4]), entry(3, 1, [5])])
    assert isinstance(batch.decode_rows, torch.Tensor)
    assert batch.decode_rows.tolist() == [0, 5]
    (span,) = batch.prefill_spans
    assert (span.rows, span.start, span.pages_n.tolist()) == (slice(1, 5), 0, [4])
    assert batch.decode_plan is not None
    assert len(batch.decode_plan.context_lengths) == 2


def test_consecutive_decode_rows_are_a_slice() -> None:
    (batch,) = build([entry(0, 4, [4]), entry(3, 1, [5]), entry(9, 1, [1, 2, 3])])
    assert batch.decode_rows == slice(4, 6)


def test_a_prefill_span_sees_only_the_pages_of_its_context() -> None:
    (batch,) = build([entry(2, 3, [7, 3, 8, 9])])
    assert batch.prefill_spans[0].pages_n.tolist() == [7, 3]


def test_samples_are_the_last_tokens_of_entries_that_sample() -> None:
    first, second = build(
        [entry(0, 3, [0], samples=True), entry(0, 4, [1]), entry(5, 1, [2, 3], samples=True)], 2
    )
    assert first.sample_rows.tolist() == [2]
    assert second.sample_rows.tolist() == [3]


def test_a_cut_may_pass_through_an_entry() -> None:
    first, second = build([entry(0, 1, [5]), entry(4, 6, [0, 1, 2], samples=True)], 2)
    assert first.tokens_T.tolist() == [100, 104, 105, 106]
    assert second.tokens_T.tolist() == [107, 108, 109]
    assert first.sample_rows.tolist() == []
    assert second.sample_rows.tolist() == [2]
    assert second.prefill_spans[0].start == 7
    assert first.prefill_spans[0].pages_n.tolist() == [0, 1]


def test_a_cut_may_leave_a_single_token_to_decode() -> None:
    first, second = build([entry(0, 3, [5], samples=True)], 2)
    assert first.prefill_spans[0].rows == slice(0, 2)
    assert not second.prefill_spans
    assert second.decode_plan is not None
    assert len(second.decode_plan.context_lengths) == 1


def test_no_entries_give_empty_batches() -> None:
    for batch in build([], 2):
        assert batch.num_tokens == 0
        assert batch.last_position == -1
        assert batch.decode_plan is None
        assert batch.sample_rows.numel() == 0


def test_a_token_sampled_since_the_plan_is_filled_in() -> None:
    (batch,) = build([entry(6, 1, [0, 1], unknown=True, output=(555,))])
    assert batch.tokens_T.tolist() == [555]


def test_a_token_that_is_still_unknown_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="token 6 of a request is not sampled yet"):
        build([entry(6, 1, [0, 1], unknown=True)])


def test_position_offset_moves_positions_but_not_slots() -> None:
    (batch,) = build_batches(
        [entry(1, 2, [3])], page_size=4, num_micro_batches=1, position_offset=8192
    )
    assert batch.positions_T.tolist() == [8193, 8194]
    assert batch.slots_T.tolist() == [13, 14]
    assert batch.prefill_spans[0].start == 1


def test_a_token_that_a_cancelled_request_will_never_know_is_filled_in() -> None:
    planned = entry(4, 1, [0, 9], unknown=True)
    with pytest.raises(RuntimeError, match="not sampled yet"):
        build([planned])
    planned.progress.move_to(RequestState.FINISHED)
    (batch,) = build([planned])
    assert batch.num_tokens == 1


def test_batches_of_another_device_are_moved_whole() -> None:
    entries = [entry(8, 1, [1, 2, 3], samples=True), entry(0, 4, [4]), entry(3, 2, [5, 6])]
    batches = build(entries, 2)
    # Not equal to plain "cpu", so that everything is packed and copied.
    for found, batch in zip(moved(batches, torch.device("cpu:0")), batches, strict=True):
        assert found is not batch
        assert torch.equal(found.tokens_T, batch.tokens_T)
        assert torch.equal(found.positions_T, batch.positions_T)
        assert torch.equal(found.slots_T, batch.slots_T)
        assert torch.equal(found.sample_rows, batch.sample_rows)
        for one, other in zip(found.prefill_spans, batch.prefill_spans, strict=True):
            assert (one.rows, one.start) == (other.rows, other.start)
            assert torch.equal(one.pages_n, other.pages_n)
        assert (found.decode_plan is None) is (batch.decode_plan is None)
        if found.decode_plan is not None and batch.decode_plan is not None:
            assert found.decode_plan.context_lengths == batch.decode_plan.context_lengths
            chunks = astuple(batch.decode_plan.chunks())
            for one, other in zip(astuple(found.decode_plan.chunks()), chunks, strict=True):
                assert torch.equal(one, other)


def test_moved_decode_rows_that_are_apart_stay_apart() -> None:
    (batch,) = build([entry(8, 1, [1, 2, 3]), entry(0, 4, [4]), entry(3, 1, [5])])
    (found,) = moved([batch], torch.device("cpu:0"))
    assert isinstance(found.decode_rows, torch.Tensor)
    assert found.decode_rows.tolist() == [0, 5]


def test_batches_that_are_there_are_not_copied() -> None:
    batches = build([entry(0, 3, [5], samples=True)], 2)
    assert [id(batch) for batch in moved(batches, torch.device("cpu"))] == list(map(id, batches))
