"""Image files as callers send them -> upright pixels, within limits that hold beforehand.

Knows files, not models: `prompt` gives the pixels to the tokenizer. Fetches nothing: what is to be
fetched, `image_fetch` has brought. Every refusal is an InvalidRequestError whose `param` is the
place of the image in the request.
"""

from __future__ import annotations

import binascii
import io
import struct
import zlib
from collections.abc import Iterable
from typing import NoReturn

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base

from ostro.actors.errors import InvalidRequestError
from ostro.cluster.generation import ChatMessage, ImageFile, ImageUrl
from ostro.configs.deployment import ServingConfig

MAX_ASPECT_RATIO = 200  # beyond it one side would be a fraction of a patch
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # Pillow tries these readers and no other
_MAX_HEADER_CHARS = 256  # of a data URI, before its comma
_WAY_OUT = "send the file as a data URI, as in 'data:image/png;base64,...'"
# A JPEG of 10 MB can have a million scans, each of which is a pass over all pixels.
_JPEG_SCAN = b"\xff\xda"
_MAX_JPEG_SCANS = 64  # progressive files have about ten
# EXIF orientation -> what puts the image upright; 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's readers raise on broken files.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)


def image_of_uri(uri: str, where: str, *, at: int) -> ImageFile:
    """The image in a data URI, or at an https URL.

    Args:
        uri: As in "data:image/png;base64,iVBORw0" or "https://example.com/a.png".
        where: Its place in the request, for refusals.
        at: Characters of the message's text that stand before it.

    Raises:
        InvalidRequestError: It is neither, or the data is not in base64.
    """
    scheme, colon, rest = uri[:_MAX_HEADER_CHARS].partition(":")
    if colon and scheme.lower() == "https":
        return ImageFile(data=ImageUrl(uri), where=where, at=at)
    if not colon or scheme.lower() != "data":
        _refuse(
            where, f"this is neither a data URI nor an https URL: {_WAY_OUT}", "unsupported_value"
        )
    header, comma, _ = rest.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        _refuse(where, "the data URI must begin as in 'data:image/png;base64,'", "invalid_image")
    return ImageFile(data=uri[len("data:") + len(header) + 1 :], where=where, at=at)


def not_fetched(image: ImageFile) -> InvalidRequestError:
    """Why an image that is named by its URL is not taken."""
    return InvalidRequestError(
        f"{image.where}: nothing is fetched unless serving.image_fetch allows it: {_WAY_OUT}",
        code="unsupported_value",
        param=image.where,
    )


def no_vision(message: ChatMessage) -> InvalidRequestError:
    """Why a model without vision does not take a message with an image."""
    where = message.images[0].where
    return InvalidRequestError(
        f"{where}: this model reads no images: send text alone",
        code="unsupported_value",
        param=where,
    )


def check_images(messages: Iterable[ChatMessage], serving: ServingConfig) -> None:
    """Refuse images by their number and their messages; cheap, as nothing is decoded.

    Raises:
        InvalidRequestError: Too many, or in a message that cannot have any.
    """
    num_images = 0
    for message in messages:
        for image in message.images:
            if message.role not in ("user", "tool"):
                _refuse(
                    image.where,
                    f"a message of role {message.role!r} takes no image: put it in a user message",
                    "unsupported_value",
                )
            num_images += 1
            if num_images > serving.max_images:
                _refuse(
                    image.where,
                    f"a request takes at most {serving.max_images} images: leave earlier ones out",
                    "too_many_images",
                )


def read_image(file: ImageFile, serving: ServingConfig) -> Image.Image:
    """The pixels of a file, upright, in mode RGB or RGBA; of an animation the first frame.

    Takes milliseconds, for the largest files seconds: not for an event loop.

    Raises:
        InvalidRequestError: Too large, of no known format, or broken.
    """
    data = _file_bytes(file, serving.max_image_bytes)
    image = _open(file, data)
    _check_size(file, image.size, serving.max_image_pixels)
    if image.format in ("JPEG", "MPO") and data.count(_JPEG_SCAN) > _MAX_JPEG_SCANS:
        _refuse(file.where, "the JPEG has too many scans: save it anew", "invalid_image")
    try:
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        image = _eight_bits(image)
        return image if turn is None else image.transpose(turn)
    except _BROKEN:
        _refuse(file.where, "the image file is cut short or broken", "invalid_image")


def _file_bytes(file: ImageFile, max_bytes: int) -> bytes:
    if isinstance(file.data, ImageUrl):
        raise not_fetched(file)
    num_bytes = len(file.data) if isinstance(file.data, bytes) else len(file.data) // 4 * 3 - 2
    if num_bytes > max_bytes:
        _refuse(
            file.where,
            f"the image file is larger than {max_bytes} bytes, the most that is taken: scale the "
            f"image down or save it as JPEG",
            "image_too_large",
        )
    if isinstance(file.data, bytes):
        return file.data
    try:
        return binascii.a2b_base64(file.data, strict_mode=True)
    except ValueError:
        _refuse(
            file.where,
            "the data URI is no valid base64: A-Z, a-z, 0-9, + and /, padded with =, in one line",
            "invalid_image",
        )


def _open(file: ImageFile, data: bytes) -> Image.Image:
    """Reads the header alone."""
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        _refuse(file.where, "the image has far too many pixels: scale it down", "image_too_large")
    except (UnidentifiedImageError, *_BROKEN):
        _refuse(
            file.where,
            f"this is no image file that can be read: send {', '.join(_FORMATS[:-1])} or "
            f"{_FORMATS[-1]}",
            "invalid_image",
        )


def _check_size(file: ImageFile, size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if min(size) < 1:
        _refuse(file.where, f"the image has {width} x {height} pixels", "invalid_image")
    if width * height > max_pixels:
        _refuse(
            file.where,
            f"the image has {width} x {height} pixels, {max_pixels} in all are the most that is "
            f"taken: scale it down",
            "image_too_large",
        )
    if max(size) > MAX_ASPECT_RATIO * min(size):
        _refuse(
            file.where,
            f"the image has {width} x {height} pixels; one side may be at most "
            f"{MAX_ASPECT_RATIO} times the other: crop it or cut it in pieces",
            "invalid_image",
        )


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow clips 16 bits of grey where it should scale them; all else it converts well."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    return image if image.mode in ("RGB", "RGBA") else image.convert("RGBA")


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(Base.Orientation)
    except _BROKEN:  # a camera's mistake; the pixels are sound
        return 1
    return value if isinstance(value, int) else 1


def _refuse(where: str, why: str, code: str) -> NoReturn:
    raise InvalidRequestError(f"{where}: {why}", code=code, param=where)
