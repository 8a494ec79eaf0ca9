"""The vision tower and projector against transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from model_rig import load_image_oracle, relative_error

from ostro.actors.model.checkpoint import CheckpointReader
from ostro.actors.model.random_checkpoint import TINY_VISION
from ostro.actors.model.vision import VisionTower
from ostro.actors.model.weights import load_attention_weights
from ostro.configs.model import load_model_config


def _checkpoint(directory: Path, hidden_act: str = "silu") -> Path:
    vision = replace(TINY_VISION, hidden_act=hidden_act)
    return checkpoints.make_tiny_checkpoint(directory, num_layers=1, vision=vision)


def _tower(directory: Path, dtype: torch.dtype = torch.float32) -> VisionTower:
    config, reader = load_model_config(directory), CheckpointReader(directory)
    weights = load_attention_weights(reader, config, device="cpu", dtype=dtype)
    assert config.vision is not None
    assert weights.vision is not None
    return VisionTower(config, config.vision, weights.vision)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def tower(directory: Path) -> VisionTower:
    return _tower(directory)


@pytest.fixture(scope="module")
def oracle(directory: Path) -> Any:
    return load_image_oracle(directory)


def _pixels(height: int, width: int) -> torch.Tensor:
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(height + width))


@torch.no_grad()
def _expected(oracle: Any, *pixels: torch.Tensor) -> list[torch.Tensor]:
    """What transformers makes of a batch of images, padded to one size."""
    sizes = [list(image.shape[1:]) for image in pixels]
    height, width = (max(side) for side in zip(*sizes, strict=True))
    batch = torch.zeros(len(pixels), 3, height, width)
    for place, image in zip(batch, pixels, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return list(oracle.model.get_image_features(batch, torch.tensor(sizes)).pooler_output)


@pytest.mark.parametrize(
    ("height", "width"), [(28, 56), (56, 28), (84, 112), (140, 28), (168, 168)]
)
def test_features_equal_those_of_transformers(
    tower: VisionTower, oracle: Any, height: int, width: int
) -> None:
    pixels = _pixels(height, width)
    found = tower.encode(pixels)
    (expected,) = _expected(oracle, pixels)
    assert found.shape == (height * width // 28**2, 64)
    assert relative_error(found, expected) < 1e-5


def test_images_of_one_batch_do_not_see_each_other(tower: VisionTower, oracle: Any) -> None:
    images = [_pixels(56, 84), _pixels(28, 140), _pixels(112, 56)]
    for pixels, expected in zip(images, _expected(oracle, *images), strict=True):
        assert relative_error(tower.encode(pixels), expected) < 1e-5


def test_an_image_of_a_single_token_is_encoded(tower: VisionTower, oracle: Any) -> None:
    # Alone in its batch it breaks transformers, which squeezes its only token away.
    single, other = _pixels(28, 28), _pixels(56, 56)
    expected, _ = _expected(oracle, single, other)
    assert relative_error(tower.encode(single), expected) < 1e-5


def test_gelu_of_the_tower_is_honoured(tmp_path: Path) -> None:
    directory = _checkpoint(tmp_path, "gelu")
    pixels = _pixels(84, 56)
    (expected,) = _expected(load_image_oracle(directory), pixels)
    assert relative_error(_tower(directory).encode(pixels), expected) < 1e-5


def test_bfloat16_stays_near_float32(directory: Path, tower: VisionTower) -> None:
    pixels = _pixels(168, 168)
    found = _tower(directory, torch.bfloat16).encode(pixels)
    assert found.dtype == torch.bfloat16
    assert relative_error(found.float(), tower.encode(pixels)) < 0.05
