"""What a cell takes in: bounds on the pixels of one request and of all that live at a rank."""

from __future__ import annotations

import sys

import msgspec
import pytest
from engine_fakes import make_fake_image, make_request
from rank_reports import step_that_finished

from ostro.actors.cell_requests import CellRequests
from ostro.actors.engine.choices import unique_id
from ostro.actors.engine.images import MAX_REQUEST_IMAGE_BYTES
from ostro.actors.engine.quotas import TenantQuotas
from ostro.actors.engine.request import GenerationRequest
from ostro.actors.errors import InvalidRequestError, OverloadedError
from ostro.configs.deployment import EngineConfig


def _request(name: str, num_bytes: int) -> GenerationRequest:
    image = msgspec.structs.replace(make_fake_image(0, 2, 1), pixels=bytes(num_bytes))
    return make_request(name, images=(image,))


def _choices(name: str, num_choices: int, *, first: int = 0) -> GenerationRequest:
    request = make_request(unique_id(name, "i-1", first))
    return msgspec.structs.replace(request, choice=first, num_choices=num_choices)


def test_pixels_of_live_requests_are_bounded_by_rank() -> None:
    requests = CellRequests(EngineConfig(max_live_image_bytes=100), [0, 1], TenantQuotas())
    assert {requests.place(_request(name, 60), "i") for name in "ab"} == {0, 1}
    with pytest.raises(OverloadedError, match="images of 60 bytes are being served"):
        requests.place(_request("c", 60), "i")
    requests.place(make_request("text"), "i")
    requests.follow(step_that_finished("a"), elapsed_s=0.1)
    assert requests.place(_request("c", 60), "i") == 0


def test_an_image_beyond_the_bound_is_served_where_there_is_no_other() -> None:
    requests = CellRequests(EngineConfig(max_live_image_bytes=100), [0], TenantQuotas())
    assert requests.place(_request("a", 200), "i") == 0


def test_a_request_with_more_pixels_than_travel_is_refused_and_forgotten() -> None:
    requests = CellRequests(EngineConfig(), [0], TenantQuotas())
    with pytest.raises(InvalidRequestError, match="image 0"):
        requests.place(_request("a", MAX_REQUEST_IMAGE_BYTES + 1), "i")
    assert len(requests) == 0


def _found(requests: CellRequests, name: str) -> list[str]:
    return [live.request_id for live in requests.find(name)]


def test_choices_of_a_prompt_live_on_one_rank_and_are_found_by_each_of_their_names() -> None:
    requests = CellRequests(EngineConfig(), [0, 1], TenantQuotas())
    rank = requests.place(_choices("mine", 2), "i")
    assert requests.place(_choices("mine", 2, first=2), "i") == 1 - rank  # another prompt
    everyone = [f"mine#i-1.{choice}" for choice in range(4)]
    assert _found(requests, "mine") == _found(requests, "mine#i-1") == everyone
    assert _found(requests, "mine#i-1.2") == ["mine#i-1.2"]
    assert (requests.num_live(rank), requests.num_live(1 - rank)) == (2, 2)


def test_choices_are_forgotten_one_by_one_and_their_name_with_the_last() -> None:
    requests = CellRequests(EngineConfig(), [0], TenantQuotas())
    requests.place(_choices("mine", 2), "i")
    requests.follow(step_that_finished("mine#i-1.0"), elapsed_s=0.1)
    requests.follow(step_that_finished("mine#i-1.0"), elapsed_s=0.1)
    assert _found(requests, "mine") == ["mine#i-1.1"]
    requests.follow(step_that_finished("mine#i-1.1"), elapsed_s=0.1)
    assert (_found(requests, "mine"), len(requests)) == ([], 0)


def test_a_callers_id_names_its_latest_submission() -> None:
    requests = CellRequests(EngineConfig(), [0], TenantQuotas())
    older, newer = make_request("mine#i-1.0"), make_request("mine#i-2.0")
    requests.place(older, "i")
    requests.place(newer, "i")
    assert _found(requests, "mine") == ["mine#i-2.0"]
    requests.follow(step_that_finished("mine#i-1.0"), elapsed_s=0.1)
    assert _found(requests, "mine") == ["mine#i-2.0"]


def test_choices_that_the_books_have_no_room_for_leave_no_trace() -> None:
    engine = EngineConfig(max_waiting_requests=1, max_running_requests=2)
    requests = CellRequests(engine, [0], TenantQuotas())
    with pytest.raises(OverloadedError):
        requests.place(_choices("mine", 4), "i")
    assert (len(requests), requests.num_live(0), _found(requests, "mine")) == (0, 0, [])
    requests.place(_choices("mine", 3), "i")


def test_pixels_of_choices_count_once() -> None:
    requests = CellRequests(EngineConfig(max_live_image_bytes=100), [0], TenantQuotas())
    request = msgspec.structs.replace(_request("a#i-1.0", 60), num_choices=3)
    requests.place(request, "i")
    requests.place(_request("b", 40), "i")


def test_what_is_resumed_is_let_in_whatever_waits() -> None:
    engine = EngineConfig(max_waiting_requests=1, max_live_image_bytes=10)
    requests = CellRequests(engine, [0], TenantQuotas())
    requests.place(_request("a#i-1.0", 10), "i")
    with pytest.raises(OverloadedError):
        requests.place(_request("b#i-1.0", 10), "i")
    assert requests.place(_request("b#i-2.0", 10), "i", is_resumed=True) == 0
    assert _found(requests, "b") == ["b#i-2.0"]


def test_the_books_keep_no_pixels() -> None:
    requests = CellRequests(EngineConfig(), [0], TenantQuotas())
    pixels = bytes(1000)
    num_holders = sys.getrefcount(pixels)
    image = msgspec.structs.replace(make_fake_image(0, 2, 1), pixels=pixels)
    request = make_request("a", images=(image,))
    del image
    requests.place(request, "i")
    assert requests.num_live(0) == 1
    del request  # it is on its way to the shard
    assert sys.getrefcount(pixels) == num_holders
