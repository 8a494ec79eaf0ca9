"""The images that a tokenizer made ready -> what travels to the shards, placed by the tokens.

The tokenizer moves images within a message and sorts tool results, so only the prompt's tokens say
where an image stands: rows of `[IMG]`, an `[IMG_BREAK]` after each, `[IMG_END]` after the last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ostro.actors.engine.images import MAX_REQUEST_IMAGE_BYTES
from ostro.actors.engine.request import ImageInput
from ostro.actors.errors import InvalidRequestError, OstroError

_DIGEST_BYTES = 16
_PIXEL = np.dtype("<f2")


def image_inputs(
    token_ids: Sequence[int],
    images: Sequence[npt.NDArray[np.floating]],
    *,
    image_token_id: int,
    end_token_id: int,
) -> tuple[ImageInput, ...]:
    """The images of a prompt, in the order of their places in it.

    Args:
        token_ids: The prompt.
        images: Normalised pixels, channels first, in the same order.
        image_token_id: `[IMG]`.
        end_token_id: `[IMG_END]`.

    Raises:
        InvalidRequestError: They are too large together; `param` is "messages".
    """
    num_bytes = sum(image.size for image in images) * _PIXEL.itemsize
    if num_bytes > MAX_REQUEST_IMAGE_BYTES:
        raise InvalidRequestError(
            f"messages: the images of this request take {num_bytes} bytes once they are made "
            f"ready, {MAX_REQUEST_IMAGE_BYTES} are the most: send fewer or smaller ones",
            code="image_too_large",
            param="messages",
        )
    spans = _spans(token_ids, len(images), image_token_id, end_token_id)
    return tuple(
        _image_input(image, start, end) for image, (start, end) in zip(images, spans, strict=True)
    )


def _spans(
    token_ids: Sequence[int], num_images: int, image_token_id: int, end_token_id: int
) -> list[tuple[int, int]]:
    """[start, end) of each image's tokens."""
    spans: list[tuple[int, int]] = []
    end = 0
    try:
        for _ in range(num_images):
            start = token_ids.index(image_token_id, end)
            end = token_ids.index(end_token_id, start) + 1
            spans.append((start, end))
    except ValueError as error:
        raise OstroError("the tokenizer made an image ready and did not place it") from error
    return spans


def _image_input(image: npt.NDArray[np.floating], start: int, end: int) -> ImageInput:
    _, height, width = image.shape
    pixels = image.astype(_PIXEL, order="C").tobytes()
    shape = height.to_bytes(4, "little") + width.to_bytes(4, "little")
    return ImageInput(
        start=start,
        num_tokens=end - start,
        height=height,
        width=width,
        pixels=pixels,
        digest=hashlib.blake2b(shape + pixels, digest_size=_DIGEST_BYTES).digest(),
    )
