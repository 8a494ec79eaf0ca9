"""Whether the images of a request and its prompt agree, before either touches a step."""

from __future__ import annotations

from ostro.actors.engine.request import GenerationRequest, ImageInput
from ostro.actors.errors import InvalidRequestError
from ostro.configs.vision import VisionConfig

# What one request may carry: eight images of 1540 x 1540, the largest of Mistral Small 4.
MAX_REQUEST_IMAGE_BYTES = 120 * 2**20
_DIGEST_BYTES = 16
_VALUE_BYTES = 2  # float16


def image_bytes(request: GenerationRequest) -> int:
    """Bytes of pixels that a request carries."""
    return sum(len(image.pixels) for image in request.images)


def check_image_bytes(request: GenerationRequest) -> None:
    """Refuse a request that no channel would carry.

    Raises:
        InvalidRequestError: Its images are too many or too large; the message tells how many fit.
    """
    num_bytes = 0
    for index, image in enumerate(request.images):
        num_bytes += len(image.pixels)
        if num_bytes > MAX_REQUEST_IMAGE_BYTES:
            raise InvalidRequestError(
                f"image {index}: the {len(request.images)} images have {image_bytes(request)} "
                f"bytes of pixels, but a request takes {MAX_REQUEST_IMAGE_BYTES}; send smaller or "
                f"fewer images, only the first {index} fit",
                code="images_too_large",
                param="images",
            )


def check_images(request: GenerationRequest, vision: VisionConfig | None) -> None:
    """Refuse images that disagree with the prompt or that the model cannot take.

    Raises:
        InvalidRequestError: The message names the image by its index.
    """
    if not request.images:
        return
    if vision is None:
        raise InvalidRequestError(
            "image 0: this model takes no images", code="images_not_supported", param="images"
        )
    check_image_bytes(request)
    first_free = 0
    for index, image in enumerate(request.images):
        problem = _size_problem(image, vision) or _place_problem(
            image, request.prompt_token_ids, first_free, vision
        )
        if problem is not None:
            raise InvalidRequestError(f"image {index}: {problem}", param="images")
        first_free = image.start + image.num_tokens


def _size_problem(image: ImageInput, vision: VisionConfig) -> str | None:
    side, longest = vision.token_side(), vision.longest_side()
    for name, pixels in (("height", image.height), ("width", image.width)):
        if not 0 < pixels <= longest or pixels % side:
            return f"its {name} is {pixels} pixels, no multiple of {side} up to {longest}"
    num_bytes = vision.num_channels * image.height * image.width * _VALUE_BYTES
    if len(image.pixels) != num_bytes:
        return f"it has {len(image.pixels)} bytes of pixels; its size needs {num_bytes}"
    if len(image.digest) != _DIGEST_BYTES:
        return f"its digest has {len(image.digest)} bytes, not {_DIGEST_BYTES}"
    return None


def _place_problem(
    image: ImageInput, prompt: list[int], first_free: int, vision: VisionConfig
) -> str | None:
    num_rows = image.height // vision.token_side()
    num_columns = image.width // vision.token_side()
    num_tokens = num_rows * (num_columns + 1)
    if image.num_tokens != num_tokens:
        return f"it has {image.num_tokens} tokens; {num_rows} x {num_columns} make {num_tokens}"
    end = image.start + num_tokens
    if image.start < first_free or end > len(prompt):
        return (
            f"its tokens [{image.start}, {end}) do not lie in [{first_free}, {len(prompt)}), "
            f"the part of the prompt behind the image before it"
        )
    line = [vision.image_token_id] * num_columns
    for start in range(image.start, end, num_columns + 1):
        closing = start + num_columns
        if prompt[start:closing] != line or prompt[closing] == vision.image_token_id:
            return (
                f"the prompt's tokens [{start}, {closing}] are not {num_columns} times "
                f"{vision.image_token_id} and one other token"
            )
    return None
