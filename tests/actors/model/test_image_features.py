"""Image embeddings: kept by digest within a bound, and put where `[IMG]` stands."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pictures
import pytest
import torch

from ostro.actors.engine.request import ImageInput
from ostro.actors.model.batch import ImageSpan
from ostro.actors.model.checkpoint import CheckpointReader
from ostro.actors.model.image_features import ImageFeatures, rows_of_image_tokens
from ostro.actors.model.random_checkpoint import TINY_VISION
from ostro.actors.model.vision import VisionTower
from ostro.actors.model.weights import load_attention_weights
from ostro.configs.model import load_model_config

IMAGES = [pictures.make_image(56, 56, seed=seed) for seed in range(4)]
IMAGE_BYTES = 4 * 64 * 4  # image tokens, hidden size, float32


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> VisionTower:
    directory = tmp_path_factory.mktemp("tiny")
    checkpoints.make_tiny_checkpoint(directory, num_layers=1, vision=TINY_VISION)
    return _tower(directory)


def _tower(directory: Path) -> VisionTower:
    config, reader = load_model_config(directory), CheckpointReader(directory)
    weights = load_attention_weights(reader, config, device="cpu", dtype=torch.float32)
    assert config.vision is not None
    assert weights.vision is not None
    return VisionTower(config, config.vision, weights.vision)


def _encoded(features: ImageFeatures, *images: ImageInput) -> int:
    """How many of the images had to be encoded."""
    before = features.num_encoded
    for image in images:
        features.features(image)
    return features.num_encoded - before


def test_rows_of_image_tokens_worked_example() -> None:
    span = ImageSpan(pictures.make_image(56, 56), slice(5, 8), first=1)
    assert rows_of_image_tokens(span, 2) == ([5, 7], [1, 2])


@pytest.mark.parametrize(("height", "width"), [(28, 28), (84, 56), (28, 140), (112, 28)])
def test_rows_of_image_tokens_are_those_with_the_image_token(height: int, width: int) -> None:
    image = pictures.make_image(height, width)
    ids = pictures.image_token_ids(image)
    for first in range(len(ids)):
        for last in range(first + 1, len(ids) + 1):
            rows, image_rows = rows_of_image_tokens(
                ImageSpan(image, slice(3, 3 + last - first), first), width // 28
            )
            assert rows == [3 + i for i, token in enumerate(ids[first:last]) if token == 10]
            start = ids[:first].count(10)
            assert image_rows == list(range(start, start + len(rows)))


def test_place_leaves_other_rows_alone(tower: VisionTower) -> None:
    features = ImageFeatures(tower, 2**20)
    hidden_TD = torch.zeros(8, 64)
    features.place(hidden_TD, ImageSpan(IMAGES[0], slice(1, 7), first=0))
    expected = torch.zeros(8, 64)
    expected[[1, 2, 4, 5]] = features.features(IMAGES[0])
    assert torch.equal(hidden_TD, expected)


def test_a_span_of_closing_tokens_alone_needs_no_encoding(tower: VisionTower) -> None:
    features = ImageFeatures(tower, 2**20)
    features.place(torch.zeros(2, 64), ImageSpan(IMAGES[0], slice(0, 1), first=5))
    assert features.num_encoded == 0


def test_an_image_is_encoded_again_only_after_others_took_its_room(tower: VisionTower) -> None:
    features = ImageFeatures(tower, 2 * IMAGE_BYTES)
    a, b, c, _ = IMAGES
    assert _encoded(features, a, b, a, b) == 2
    assert _encoded(features, a, c) == 1  # b was used longest ago
    assert _encoded(features, a, c) == 0
    assert _encoded(features, b) == 1


@pytest.mark.parametrize("max_bytes", [0, IMAGE_BYTES - 1])
def test_the_last_image_is_kept_whatever_its_size(tower: VisionTower, max_bytes: int) -> None:
    features = ImageFeatures(tower, max_bytes)
    assert _encoded(features, IMAGES[0], IMAGES[0]) == 1
    assert _encoded(features, IMAGES[1], IMAGES[1]) == 1
    assert _encoded(features, IMAGES[0]) == 1


def test_equal_images_of_two_requests_are_one(tower: VisionTower) -> None:
    features = ImageFeatures(tower, 2**20)
    assert _encoded(features, IMAGES[0], pictures.make_image(56, 56, start=9, seed=0)) == 1
