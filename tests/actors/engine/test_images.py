"""Images that disagree with their prompt are refused by number, before they touch a step."""

from __future__ import annotations

from typing import Any

import msgspec
import pictures
import pytest
from engine_fakes import make_request

from ostro.actors.engine.images import (
    MAX_REQUEST_IMAGE_BYTES,
    check_image_bytes,
    check_images,
    image_bytes,
)
from ostro.actors.engine.request import GenerationRequest, ImageInput
from ostro.actors.errors import InvalidRequestError
from ostro.configs.vision import VisionConfig

VISION = VisionConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=2,
    head_dim=16,
    intermediate_size=48,
    patch_size=14,
    image_size=168,
    num_channels=3,
    rope_theta=10000.0,
    hidden_act="silu",
    spatial_merge_size=2,
    image_token_id=10,
)
_PARTS = [1, 100, pictures.make_image(56, 84), 101, pictures.make_image(28, 28, seed=1), 102]


def _request(*, change: dict[str, Any] | None = None, **fields: Any) -> GenerationRequest:
    """Two images; `change` alters the second one."""
    prompt, (first, second) = pictures.prompt_of(_PARTS)
    images = (first, msgspec.structs.replace(second, **(change or {})))
    return msgspec.structs.replace(make_request(prompt=prompt, images=images), **fields)


def test_images_that_agree_with_the_prompt_are_taken() -> None:
    check_images(_request(), VISION)
    check_images(make_request(), None)


def test_an_image_may_end_the_prompt() -> None:
    prompt, images = pictures.prompt_of(_PARTS[:3])
    check_images(make_request(prompt=prompt, images=images), VISION)


def test_a_model_without_vision_takes_no_image() -> None:
    with pytest.raises(InvalidRequestError, match="image 0: this model takes no images") as error:
        check_images(_request(), None)
    assert (error.value.code, error.value.param) == ("images_not_supported", "images")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"start": -1}, r"its tokens \[-1, 1\) do not lie in \[10, 14\)"),
        ({"start": 9}, r"its tokens \[9, 11\) do not lie in \[10, 14\)"),
        ({"start": 13}, r"its tokens \[13, 15\) do not lie in \[10, 14\)"),
        ({"start": 10}, r"the prompt's tokens \[10, 11\] are not 1 times 10 and one other token"),
        ({"num_tokens": 3}, "it has 3 tokens; 1 x 1 make 2"),
        ({"height": 29}, "its height is 29 pixels, no multiple of 28 up to 168"),
        ({"width": 0}, "its width is 0 pixels"),
        ({"width": -28}, "its width is -28 pixels"),
        ({"width": 196}, "its width is 196 pixels"),
        ({"pixels": b"12"}, "it has 2 bytes of pixels; its size needs 4704"),
        ({"digest": b"12"}, "its digest has 2 bytes, not 16"),
    ],
    ids=str,
)
def test_what_is_wrong_with_an_image_is_told(change: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidRequestError, match="image 1: " + told):
        check_images(_request(change=change), VISION)


@pytest.mark.parametrize("position", [2, 4, 5, 8])
def test_tokens_must_be_those_of_the_image(position: int) -> None:
    prompt = list(_request().prompt_token_ids)
    prompt[position] = 99 if prompt[position] == pictures.IMG else pictures.IMG
    with pytest.raises(InvalidRequestError, match="image 0: the prompt's tokens"):
        check_images(_request(prompt_token_ids=prompt), VISION)


def _many(count: int) -> GenerationRequest:
    largest = ImageInput(
        start=0, num_tokens=3080, height=1540, width=1540, pixels=bytes(14_229_600), digest=b""
    )
    return make_request(images=(largest,) * count)


def test_a_request_takes_eight_of_the_largest_images() -> None:
    request = _many(8)
    check_image_bytes(request)
    assert 8 * 14_229_600 == image_bytes(request) < MAX_REQUEST_IMAGE_BYTES


def test_more_pixels_than_a_request_takes_are_refused() -> None:
    with pytest.raises(
        InvalidRequestError, match=r"image 8: the 9 images have 128066400 .* only the first 8 fit"
    ) as error:
        check_image_bytes(_many(9))
    assert error.value.code == "images_too_large"
