"""What a cell takes in: bounds on the pixels of one request and of all that live at a rank."""

from __future__ import annotations

import msgspec
import pytest
from engine_fakes import make_fake_image, make_request

from ostro.actors.cell_requests import CellRequests
from ostro.actors.engine.images import MAX_REQUEST_IMAGE_BYTES
from ostro.actors.engine.request import GenerationRequest
from ostro.actors.engine.step import ShardLoad
from ostro.actors.errors import InvalidRequestError, OverloadedError
from ostro.actors.fabric.messages import StepDone
from ostro.configs.deployment import EngineConfig


def _request(name: str, num_bytes: int) -> GenerationRequest:
    image = msgspec.structs.replace(make_fake_image(0, 2, 1), pixels=bytes(num_bytes))
    return make_request(name, images=(image,))


def _finished(request_id: str) -> StepDone:
    return StepDone(
        epoch=0,
        rank=0,
        step=0,
        outputs=[],
        finished=[request_id],
        load=ShardLoad(),
        cached_pages=[],
        dropped_pages=[],
        seconds={},
    )


def test_pixels_of_live_requests_are_bounded_by_rank() -> None:
    requests = CellRequests(EngineConfig(max_live_image_bytes=100), [0, 1])
    assert {requests.place(_request(name, 60), "i").rank for name in "ab"} == {0, 1}
    with pytest.raises(OverloadedError, match="images of 60 bytes are being served"):
        requests.place(_request("c", 60), "i")
    requests.place(make_request("text"), "i")
    requests.follow(_finished("a"), elapsed_s=0.1)
    assert requests.place(_request("c", 60), "i").rank == 0


def test_an_image_beyond_the_bound_is_served_where_there_is_no_other() -> None:
    requests = CellRequests(EngineConfig(max_live_image_bytes=100), [0])
    assert requests.place(_request("a", 200), "i").rank == 0


def test_a_request_with_more_pixels_than_travel_is_refused_and_forgotten() -> None:
    requests = CellRequests(EngineConfig(), [0])
    with pytest.raises(InvalidRequestError, match="image 0"):
        requests.place(_request("a", MAX_REQUEST_IMAGE_BYTES + 1), "i")
    assert len(requests) == 0
