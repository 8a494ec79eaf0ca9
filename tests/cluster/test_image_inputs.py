"""Images as they travel: placed by the prompt's tokens, named by their pixels."""

from __future__ import annotations

import numpy as np
import pytest

from ostro.actors.engine.images import MAX_REQUEST_IMAGE_BYTES
from ostro.actors.errors import InvalidRequestError, OstroError
from ostro.cluster.image_inputs import image_inputs

IMG, BREAK, END = 10, 12, 13


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((height, width, 3))
    return values.astype(np.float32).transpose(2, 0, 1)  # not contiguous, as the library's


def placed(token_ids: list[int], *images: np.ndarray):
    return image_inputs(token_ids, images, image_token_id=IMG, end_token_id=END)


def test_images_are_placed_by_the_tokens() -> None:
    first, second = pixels(56, 28), pixels(28, 84, seed=1)
    token_ids = [1, 3, IMG, BREAK, IMG, END, IMG, IMG, IMG, END, 77, 4]
    found = placed(token_ids, first, second)
    assert [(image.start, image.num_tokens) for image in found] == [(2, 4), (6, 4)]
    assert [(image.height, image.width) for image in found] == [(56, 28), (28, 84)]


def test_pixels_are_float16_channels_first() -> None:
    image = pixels(28, 56)
    (found,) = placed([IMG, IMG, END], image)
    values = np.frombuffer(found.pixels, dtype="<f2").reshape(3, 28, 56)
    assert np.array_equal(values, image.astype(np.float16))


def test_digests_name_pixels_and_shape() -> None:
    tokens = [IMG, END, IMG, END, IMG, END]
    flat = np.zeros((3, 28, 56), dtype=np.float32)
    first, second, other = placed(tokens, pixels(28, 28), pixels(28, 28), pixels(28, 28, seed=1))
    assert first.digest == second.digest
    assert len(first.digest) == 16
    assert first.digest != other.digest
    wide, high = placed([IMG, END, IMG, END], flat, flat.reshape(3, 56, 28))
    assert wide.pixels == high.pixels
    assert wide.digest != high.digest


def test_more_than_a_request_carries_is_refused() -> None:
    side = int((MAX_REQUEST_IMAGE_BYTES / 6) ** 0.5) + 28
    huge = np.broadcast_to(np.float32(0), (3, side, side))
    with pytest.raises(InvalidRequestError, match="send fewer or smaller") as caught:
        placed([IMG, END], huge)
    assert (caught.value.param, caught.value.code) == ("messages", "image_too_large")


@pytest.mark.parametrize("token_ids", [[], [1, 2], [IMG, IMG], [END]])
def test_an_image_without_a_place_is_our_failure(token_ids: list[int]) -> None:
    with pytest.raises(OstroError, match="did not place it") as caught:
        placed(token_ids, pixels(28, 28))
    assert not isinstance(caught.value, InvalidRequestError)
