"""params.json to ModelConfig: the same as config.json says, and errors in the file's own words."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import checkpoint_variants
import pytest

from ostro.actors.model.random_checkpoint import SMALL_4, write_config
from ostro.configs.errors import ConfigError
from ostro.configs.model import ModelConfig, load_model_config


@pytest.fixture(scope="module")
def config_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hf")
    write_config(directory, SMALL_4)
    return directory


@pytest.fixture
def params(config_json: Path) -> dict[str, Any]:
    config = json.loads((config_json / "config.json").read_text())
    return checkpoint_variants.params_json(config)


def _load(directory: Path, params: dict[str, Any]) -> ModelConfig:
    (directory / "params.json").write_text(json.dumps(params))
    return load_model_config(directory)


def test_real_params_say_what_the_real_config_says(
    tmp_path: Path, params: dict[str, Any], config_json: Path
) -> None:
    found = _load(tmp_path, params)
    assert found == load_model_config(config_json)
    assert found.softmax_scale() == pytest.approx(0.08838834764831845, rel=1e-15)
    assert found.rope.cos_sin_factor() == 1.0


def test_params_without_a_tower_are_the_text_model(tmp_path: Path, params: dict[str, Any]) -> None:
    del params["vision_encoder"]
    config = _load(tmp_path, params)
    assert (config.architecture, config.vision) == ("Mistral4ForCausalLM", None)


def test_llama_4_scale_has_an_own_original_length(tmp_path: Path, params: dict[str, Any]) -> None:
    params["llama_4_scaling"]["original_max_position_embeddings"] = 16384
    config = _load(tmp_path, params)
    assert config.llama4_original_max_positions == 16384
    assert config.rope.original_max_positions == 8192


def test_apply_scale_is_obeyed(tmp_path: Path, params: dict[str, Any]) -> None:
    params["yarn"]["apply_scale"] = True
    assert _load(tmp_path, params).softmax_scale() == pytest.approx(0.194969494733, rel=1e-9)


def test_params_without_yarn_are_plain_rotary(tmp_path: Path, params: dict[str, Any]) -> None:
    del params["yarn"]
    assert _load(tmp_path, params).rope.kind == "default"


def test_token_ids_come_from_the_generation_config(tmp_path: Path, params: dict[str, Any]) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert _load(tmp_path, params).eos_token_ids == (2, 7)


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_compressed_tensors_may_stand_under_either_key(
    tmp_path: Path, params: dict[str, Any], key: str
) -> None:
    params[key] = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    found = _load(tmp_path, params).quantization
    assert found is not None
    assert not found.has_input_scales


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("dim", None),
        ("n_layers", 0),
        ("n_layers", 10**9),
        ("n_kv_heads", 8),
        ("norm_eps", "small"),
        ("norm_eps", math.inf),
        ("rope_theta", 10**400),
        ("activation", "gelu"),
        ("tied_embeddings", "no"),
        ("moe", None),
        ("moe", 3),
        ("moe.num_experts", None),
        ("moe.num_experts", 10**6),
        ("moe.num_experts_per_tok", 129),
        ("moe.num_expert_groups", 4),
        ("moe.first_k_dense_replace", 1),
        ("moe.route_every_n", 2),
        ("llama_4_scaling", None),
        ("llama_4_scaling.beta", math.nan),
        ("yarn.factor", None),
        ("yarn.apply_scale", None),
        ("yarn.apply_scale", "yes"),
        ("yarn.beta", -1),
        ("vision_encoder.hidden_size", None),
        ("vision_encoder.num_hidden_layers", 10**9),
        ("vision_encoder.mm_projector_id", None),
        ("vision_encoder.mm_projector_id", "mlp"),
        ("vision_encoder.add_pre_mm_projector_layer_norm", False),
        ("vision_encoder.adapter_bias", None),
        ("quantization.qformat_weight", "fp8_e5m2"),
        ("quantization.qscheme_act", "CHANNEL"),
    ],
)
def test_what_cannot_be_served_is_named_in_the_words_of_the_file(
    tmp_path: Path, params: dict[str, Any], path: str, value: Any
) -> None:
    params["quantization"] = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    holder, _, key = path.rpartition(".")
    section = params[holder] if holder else params
    section[key] = value
    if value is None:
        del section[key]
    with pytest.raises(ConfigError) as error:
        _load(tmp_path, params)
    assert str(error.value).startswith(f"{tmp_path / 'params.json'}: {path}: ")


def test_a_missing_key_is_told_as_missing(tmp_path: Path, params: dict[str, Any]) -> None:
    del params["dim"]
    with pytest.raises(ConfigError, match=r"params\.json: dim: missing"):
        _load(tmp_path, params)
