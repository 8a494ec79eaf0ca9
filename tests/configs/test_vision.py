"""The vision part of config.json: what is read, and what is refused by file and field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ostro.configs.errors import ConfigError
from ostro.configs.section import Section
from ostro.configs.vision import VisionConfig, load_vision

_TOWER: dict[str, Any] = {
    "model_type": "pixtral",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "head_dim": 64,
    "intermediate_size": 4096,
    "patch_size": 14,
    "image_size": 1540,
    "hidden_act": "silu",
    "rope_parameters": {"rope_theta": 5000.0, "rope_type": "axial"},
}


def _load(top: dict[str, Any] | None = None, **tower: Any) -> VisionConfig:
    """Read the real tower with changes; None deletes a key."""
    values = {key: value for key, value in {**_TOWER, **tower}.items() if value is not None}
    section = Section(Path("config.json"), "", {"vision_config": values, **(top or {})})
    config = load_vision(section, section.section("vision_config"))
    assert config is not None
    return config


def test_load_vision_reads_the_real_tower() -> None:
    assert _load() == VisionConfig(
        num_layers=24,
        hidden_size=1024,
        num_heads=16,
        head_dim=64,
        intermediate_size=4096,
        patch_size=14,
        image_size=1540,
        num_channels=3,
        rope_theta=5000.0,
        hidden_act="silu",
        spatial_merge_size=2,
        image_token_id=10,
    )


def test_load_vision_is_none_without_a_tower() -> None:
    assert load_vision(Section(Path("config.json"), "", {}), None) is None


def test_sides_are_whole_tokens() -> None:
    assert (_load().token_side(), _load().longest_side()) == (28, 1540)
    assert _load(image_size=100).longest_side() == 112


def test_what_transformers_leaves_out_has_its_defaults() -> None:
    config = _load(head_dim=None, hidden_act=None, rope_parameters=None)
    assert (config.head_dim, config.hidden_act, config.rope_theta) == (64, "gelu", 10000.0)
    assert _load(rope_parameters=None, rope_theta=7.0).rope_theta == 7.0


def test_token_and_merge_size_stand_in_the_wrapper() -> None:
    config = _load({"image_token_index": 17, "spatial_merge_size": 3})
    assert (config.image_token_id, config.spatial_merge_size) == (17, 3)


@pytest.mark.parametrize(
    ("top", "tower", "told"),
    [
        ({}, {"hidden_act": "relu"}, r"vision_config\.hidden_act: is 'relu'; served are .*silu"),
        ({}, {"head_dim": 32}, r"vision_config\.head_dim: is 32; times num_attention_heads=16"),
        ({}, {"hidden_size": 96, "head_dim": 6}, r"vision_config\.head_dim: is 6; rotation"),
        ({}, {"num_channels": 1}, r"vision_config\.num_channels: is 1, but only 3"),
        ({}, {"patch_size": [14, 14]}, r"vision_config\.patch_size: must be a whole number"),
        ({}, {"hidden_size": None}, r"vision_config\.hidden_size: missing"),
        ({}, {"model_type": "siglip"}, r"vision_config\.model_type: is 'siglip'"),
        ({}, {"rope_parameters": {"rope_type": "yarn"}}, r"rope_parameters\.rope_type: is 'yarn'"),
        ({"vision_feature_layer": -2}, {}, r"config\.json: vision_feature_layer: is -2"),
        ({"multimodal_projector_bias": True}, {}, r"multimodal_projector_bias: is True"),
        ({"projector_hidden_act": "silu"}, {}, r"projector_hidden_act: is 'silu'"),
    ],
)
def test_what_the_engine_cannot_honour_is_refused(
    top: dict[str, Any], tower: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        _load(top, **tower)
