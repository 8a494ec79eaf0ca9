"""Pictures of digits: handwritten ones from scikit-learn's `load_digits`, printed ones drawn.

Two ways to lay them out: a *strip*, one character in about 28 pixels, and *free*, any size and
place on a larger canvas. The last `_NUM_HELD_OUT` handwritten digits are held out; the set seems to
keep its writers in order, so most of these are of people that training never sees.
"""

from __future__ import annotations

import functools
import random

import cv2
import numpy as np
import tasks
from PIL import Image, ImageDraw, ImageFont
from tasks import Example, draw

CELL = 28  # patch size times merge size: what one [IMG] token covers
MAX_SIDE = 224
_NUM_HELD_OUT = 360
_HERSHEY = (
    cv2.FONT_HERSHEY_SIMPLEX,
    cv2.FONT_HERSHEY_PLAIN,
    cv2.FONT_HERSHEY_DUPLEX,
    cv2.FONT_HERSHEY_COMPLEX,
    cv2.FONT_HERSHEY_TRIPLEX,
)
_READ = (
    "Read the digits.",
    "What number is this?",
    "What is in the picture?",
    "What is in the image?",
    "Read the number.",
    "Which digits do you see?",
    "What digits are in this image?",
    "What number is in the picture?",
    "What does the image say?",
    "Read this.",
)
_SOLVE = (
    "Solve it.",
    "What is the result?",
    "Compute this.",
    "Calculate.",
    "Solve this.",
    "What is the answer?",
    "Solve the problem in the image.",
)


@functools.cache
def _handwriting(held_out: bool) -> list[list[np.ndarray]]:
    """Pictures [8, 8], 0 to 255 with ink bright, by digit."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    split = len(digits.target) - _NUM_HELD_OUT
    chosen = slice(split, None) if held_out else slice(None, split)
    images, labels = digits.images[chosen] * (255 / 16), digits.target[chosen]
    return [[image.astype(np.float32) for image in images[labels == n]] for n in range(10)]


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _glyph(rng: random.Random, char: str, size: int, hand: bool, held_out: bool) -> np.ndarray:
    """One character, ink bright, [size, about size]."""
    if hand and char.isdigit():
        small = rng.choice(_handwriting(held_out)[int(char)])
        glyph = cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC)
        if not held_out:
            glyph = _bent(rng, glyph)
        turn, shear = rng.uniform(-8, 8), rng.uniform(-0.1, 0.1)
        matrix = cv2.getRotationMatrix2D((size / 2, size / 2), turn, 1.0)
        matrix[0, 1] += shear
        matrix[0, 2] -= shear * size / 2
        glyph = cv2.warpAffine(glyph, matrix, (size, size))
        return glyph.clip(0, 255)
    if rng.random() < 0.5:
        face, thickness = rng.choice(_HERSHEY), rng.choice([1, 1, 2])
        scale = size / 30 * (1.6 if face == cv2.FONT_HERSHEY_PLAIN else 1.0)
        thickness = max(1, round(thickness * size / 26))
        canvas = np.zeros((size, size), np.uint8)
        (w, h), _ = cv2.getTextSize(char, face, scale, thickness)
        at = ((size - w) // 2, (size + h) // 2)
        cv2.putText(canvas, char, at, face, scale, 255, thickness, cv2.LINE_AA)
        return canvas.astype(np.float32)
    canvas_image = Image.new("L", (size, size), 0)
    font = _font(max(8, round(size * rng.uniform(0.75, 1.05))))
    left, top, right, bottom = font.getbbox(char)
    at_xy = ((size - right - left) / 2, (size - bottom - top) / 2)
    ImageDraw.Draw(canvas_image).text(at_xy, char, fill=255, font=font)
    return np.asarray(canvas_image, np.float32)


def _bent(rng: random.Random, glyph: np.ndarray) -> np.ndarray:
    """The same digit in another hand: each ninth pulled elsewhere, wider or narrower, bolder."""
    size = len(glyph)
    seeded = np.random.default_rng(rng.getrandbits(32))
    pull = seeded.normal(0, 0.045 * size, (2, 3, 3)).astype(np.float32)
    place = np.arange(size, dtype=np.float32)
    width, slant = rng.uniform(0.85, 1.15), rng.uniform(-0.15, 0.15)
    middle = (size - 1) / 2
    x = (place[None, :] - middle) * width + (place[:, None] - middle) * slant + middle
    y = np.broadcast_to(place[:, None], x.shape)
    dx, dy = (cv2.resize(part, (size, size), interpolation=cv2.INTER_CUBIC) for part in pull)
    bent = cv2.remap(glyph, (x + dx).astype(np.float32), y + dy, cv2.INTER_LINEAR)
    return 255 * (bent.clip(0, 255) / 255) ** rng.uniform(0.7, 1.3)


def _paste(canvas: np.ndarray, glyph: np.ndarray, y: int, x: int) -> None:
    h, w = glyph.shape
    top, left = max(y, 0), max(x, 0)
    bottom, right = min(y + h, canvas.shape[0]), min(x + w, canvas.shape[1])
    part = glyph[top - y : bottom - y, left - x : right - x]
    region = canvas[top:bottom, left:right]
    np.maximum(region, part, out=region)


def strip(rng: random.Random, text: str, *, hand: bool, held_out: bool) -> np.ndarray:
    """One character in each 28 pixels, a little off its place: ink [28, 28 * len(text)]."""
    canvas = np.zeros((CELL, CELL * len(text)), np.float32)
    for index, char in enumerate(text):
        size = rng.randint(20, 27)
        glyph = _glyph(rng, char, size, hand, held_out)
        slack = CELL - size
        x = index * CELL + rng.randint(-1, slack + 1)
        _paste(canvas, glyph, rng.randint(0, slack), x)
    return canvas


def free(rng: random.Random, text: str, *, hand: bool, held_out: bool) -> np.ndarray:
    """Characters of one size anywhere on a canvas of up to 224 x 84 pixels."""
    tallest = min(72, int(MAX_SIDE / (len(text) + 0.3)))
    size = rng.randint(min(22, tallest), tallest)
    pitch = max(1, round(size * rng.uniform(0.72, 1.0)))
    width = pitch * (len(text) - 1) + size
    w = min(MAX_SIDE, -(-rng.randint(width, max(width, min(MAX_SIDE, 2 * width))) // CELL) * CELL)
    h = -(-rng.randint(size, min(84, 2 * size)) // CELL) * CELL
    canvas = np.zeros((h, w), np.float32)
    x, y = rng.randint(0, max(0, w - width)), rng.randint(0, h - size)
    for char in text:
        glyph = _glyph(rng, char, size, hand, held_out)
        _paste(canvas, glyph, y + rng.randint(-1, 1), x)
        x += pitch
    return canvas


def paint(rng: random.Random, ink: np.ndarray) -> np.ndarray:
    """Ink and paper of some contrast and colour, a little noise: uint8 RGB."""
    dark, light = rng.randrange(0, 70), rng.randrange(200, 256)
    back, front = (dark, light) if rng.random() < 0.15 else (light, dark)
    tint = np.array([rng.uniform(0.85, 1.0) for _ in range(3)] if rng.random() < 0.3 else [1.0] * 3)
    gray = back + (front - back) * (ink[..., None] / 255.0) * np.ones(3)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.choice([0, 0, 4]), ink.shape)
    return np.asarray((gray * tint + noise[..., None]).round().clip(0, 255), np.uint8)


def image_example(
    rng: random.Random, held_out: bool, kind: str | None = None, layout: str | None = None
) -> Example:
    """Kinds: "read" one to five digits, "sum" a+b, "multiply" a*b; layouts "strip" and "free"."""
    kind = kind or rng.choices(["read", "sum", "multiply"], [54, 16, 30])[0]
    layout = layout or rng.choices(["strip", "free"], [86, 14])[0]
    if kind == "read":
        text = "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 5)))
        working, answer, questions = " ".join(text), text, _READ
    else:
        sign = "+" if kind == "sum" else "*"
        a, b = draw(
            held_out,
            lambda: (rng.randrange(2, 100), rng.randrange(2, 100)),
            lambda pair: f"{min(pair)}{sign}{max(pair)}",
        )
        text, questions = f"{a}{sign}{b}", _SOLVE
        working = tasks.add_working(a, b) if kind == "sum" else tasks.multiply_working(a, b)
        answer = str(a + b if kind == "sum" else a * b)
    hand = rng.random() < 0.65
    make = strip if layout == "strip" else free
    return Example(
        task=f"image_{kind}",
        level=f"{layout}/{'hand' if hand else 'print'}",
        question=rng.choice(questions),
        working=working,
        answer=answer,
        image=paint(rng, make(rng, text, hand=hand, held_out=held_out)),
    )
