"""A request's progress: which tokens are known, and which moves are allowed."""

from __future__ import annotations

import msgspec
import pytest
from engine_fakes import make_request

from ostro.actors.engine.request import (
    GenerationRequest,
    RequestProgress,
    RequestState,
    ThinkingParams,
)
from ostro.actors.errors import InvalidTransitionError


def _progress() -> RequestProgress:
    return RequestProgress(make_request(prompt=[5, 6, 7]), arrived_s=0.0, output_token_ids=[8, 9])


@pytest.mark.parametrize(
    ("start", "end", "tokens"),
    [(0, 2, [5, 6]), (1, 5, [6, 7, 8, 9]), (3, 4, [8]), (4, 6, [9]), (5, 6, [])],
)
def test_progress_gives_the_tokens_that_are_known(start: int, end: int, tokens: list[int]) -> None:
    assert _progress().known_tokens(start, end) == tokens


def test_progress_counts_outputs_that_are_on_their_way() -> None:
    progress = _progress()
    progress.num_pending_outputs = 1
    assert (progress.num_known_tokens, progress.num_tokens) == (5, 6)
    assert [progress.token_at(position) for position in (0, 4, 5)] == [5, 9, None]


def test_progress_refuses_a_move_that_its_table_forbids() -> None:
    progress = _progress()
    progress.move_to(RequestState.RUNNING)
    progress.move_to(RequestState.PREEMPTED)
    progress.move_to(RequestState.FINISHED)
    with pytest.raises(InvalidTransitionError, match="r: FINISHED -> RUNNING"):
        progress.move_to(RequestState.RUNNING)


def test_request_survives_the_wire() -> None:
    request = make_request(
        thinking=ThinkingParams(begin_token_id=3, end_token_id=4, closing_token_ids=(5, 4)),
        stop_token_ids=(9,),
        cache_salt="salt",
    )
    wire = msgspec.msgpack.encode(request)
    assert msgspec.msgpack.decode(wire, type=GenerationRequest) == request
