"""Pictures of digits, random images made ready for the vision tower, prompts that show them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ostro.actors.engine.request import ImageInput

IMG, IMG_BREAK, IMG_END = 10, 12, 13
SIDE = 28  # pixels of an image token, in both directions


def make_image(height: int, width: int, *, start: int = 0, seed: int = 0) -> ImageInput:
    """An image of random pixels; the seed is what is on it."""
    values = np.random.default_rng(seed).standard_normal((3, height, width))
    pixels = values.astype("<f2").tobytes()
    num_rows, num_columns = height // SIDE, width // SIDE
    return ImageInput(
        start=start,
        num_tokens=num_rows * (num_columns + 1),
        height=height,
        width=width,
        pixels=pixels,
        digest=blake2b(pixels + bytes([num_rows, num_columns]), digest_size=16).digest(),
    )


def image_token_ids(image: ImageInput) -> list[int]:
    """The tokens that stand for an image."""
    num_columns = image.width // SIDE
    lines = [[*[IMG] * num_columns, IMG_BREAK] for _ in range(image.height // SIDE)]
    return [*[token for line in lines for token in line][:-1], IMG_END]


def pixel_values(image: ImageInput) -> torch.Tensor:
    """float32 [3, height, width]."""
    values = np.frombuffer(image.pixels, "<f2").astype(np.float32)
    return torch.from_numpy(values).view(3, image.height, image.width)


def prompt_of(parts: Sequence[int | ImageInput]) -> tuple[list[int], tuple[ImageInput, ...]]:
    """(token ids, images in their places) of a prompt given as text tokens and images."""
    tokens: list[int] = []
    images: list[ImageInput] = []
    for part in parts:
        if isinstance(part, int):
            tokens.append(part)
            continue
        images.append(
            ImageInput(
                start=len(tokens),
                num_tokens=part.num_tokens,
                height=part.height,
                width=part.width,
                pixels=part.pixels,
                digest=part.digest,
            )
        )
        tokens += image_token_ids(part)
    return tokens, tuple(images)


def digit_picture(text: str) -> bytes:
    """A PNG of printed digits or signs, one in each 28 pixels."""
    picture, font = Image.new("L", (SIDE * len(text), SIDE), 255), ImageFont.load_default(24)
    for place, char in enumerate(text):
        left, top, right, bottom = font.getbbox(char)
        at = (SIDE * place + (SIDE - right - left) / 2, (SIDE - bottom - top) / 2)
        ImageDraw.Draw(picture).text(at, char, fill=0, font=font)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
