"""config.json to ModelConfig: what is read, and what is refused by file and field."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ostro.configs.errors import ConfigError
from ostro.configs.model import ModelConfig, RopeConfig, load_model_config
from ostro.configs.quantization import Quantization, WeightFormat

_TEXT: dict[str, Any] = {
    "architectures": ["Mistral4ForCausalLM"],
    "model_type": "mistral4",
    "dtype": "bfloat16",
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "q_lora_rank": 1024,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 128,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "vocab_size": 131072,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1048576,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 128.0,
        "original_max_position_embeddings": 8192,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}

_NVFP4 = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}

_VISION: dict[str, Any] = {
    "model_type": "pixtral",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "head_dim": 64,
    "intermediate_size": 4096,
    "patch_size": 14,
    "image_size": 1540,
    "hidden_act": "silu",
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},
}


def _load(directory: Path, changes: dict[str, Any], *, wrapped: bool = False) -> ModelConfig:
    """Write config.json with changes (None deletes a key) and read it."""
    text = {key: value for key, value in {**_TEXT, **changes}.items() if value is not None}
    values: dict[str, Any] = text
    if wrapped:
        values = {
            "architectures": ["Mistral3ForConditionalGeneration"],
            "model_type": "mistral3",
            "vision_config": _VISION,
            "text_config": {k: v for k, v in text.items() if k != "architectures"},
        }
    (directory / "config.json").write_text(json.dumps(values))
    return load_model_config(directory)


def _rope(**changes: Any) -> dict[str, Any]:
    rope = {**_TEXT["rope_parameters"], **changes}
    return {"rope_parameters": {key: value for key, value in rope.items() if value is not None}}


def test_load_model_config_reads_the_real_dimensions(tmp_path: Path) -> None:
    config = _load(tmp_path, {})
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (36, 4096, 131072)
    assert config.latent_width() == 320
    assert config.qk_head_dim() == 128
    assert config.shared_hidden_size() == 2048
    assert config.softmax_scale() == pytest.approx(0.08838834764831845, rel=1e-15)
    assert (config.llama4_beta, config.llama4_original_max_positions) == (0.1, 8192)
    assert config.rope == RopeConfig(
        kind="yarn",
        theta=10000.0,
        factor=128.0,
        original_max_positions=8192,
        mscale=1.0,
        mscale_all_dim=1.0,
    )
    assert config.rope.cos_sin_factor() == 1.0


def test_wrapper_and_bare_config_say_the_same(tmp_path: Path) -> None:
    bare, wrapped = _load(tmp_path, {}), _load(tmp_path, {}, wrapped=True)
    assert bare.vision is None
    assert wrapped.vision is not None
    assert wrapped.architecture == "Mistral3ForConditionalGeneration"
    assert wrapped.rope == bare.rope
    assert wrapped.num_experts == bare.num_experts


def test_mscale_alone_does_not_scale_the_softmax(tmp_path: Path) -> None:
    assert not _load(tmp_path, {}).rope.apply_scale


def test_apply_scale_of_the_checkpoint_scales_the_softmax(tmp_path: Path) -> None:
    config = _load(tmp_path, _rope(apply_scale=True))
    assert config.softmax_scale() == pytest.approx(0.194969494733, rel=1e-9)


def test_missing_mscale_stretches_cos_and_sin(tmp_path: Path) -> None:
    config = _load(tmp_path, _rope(mscale=None, mscale_all_dim=None))
    assert config.rope.cos_sin_factor() == pytest.approx(0.1 * math.log(128) + 1)


def test_old_spelling_of_rope_is_read(tmp_path: Path) -> None:
    scaling = {k: v for k, v in _TEXT["rope_parameters"].items() if k != "rope_theta"}
    changes = {"rope_parameters": None, "rope_scaling": scaling, "rope_theta": 5000.0}
    assert _load(tmp_path, changes).rope.theta == 5000.0


def test_plain_rope_needs_no_stretching(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = _load(tmp_path, {"rope_parameters": rope})
    assert (config.rope.kind, config.llama4_beta) == ("default", 0.0)
    assert config.rope.cos_sin_factor() == 1.0


def test_token_ids_come_from_the_generation_config(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    config = _load(tmp_path, {"bos_token_id": 5, "eos_token_id": 9})
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (5, (2, 7), 11)


def test_token_ids_default_to_those_of_tekken(tmp_path: Path) -> None:
    config = _load(tmp_path, {})
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2,), 11)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"n_group": 8}, "n_group"),
        ({"topk_group": 4}, "topk_group"),
        ({"first_k_dense_replace": 1}, "first_k_dense_replace"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"model_type": "mistral"}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim"),
        ({"num_key_value_heads": 8}, "num_key_value_heads"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"rope_parameters": None}, "rope_parameters"),
        ({"rope_parameters": "yarn"}, "rope_parameters"),
        (_rope(rope_type="llama3"), "rope_parameters.rope_type"),
        (_rope(factor=None), "rope_parameters.factor"),
        (_rope(factor=-1), "rope_parameters.factor"),
        (_rope(apply_scale=1), "rope_parameters.apply_scale"),
        (_rope(attention_factor=1.0), "rope_parameters.attention_factor"),
        (_rope(truncate=False), "rope_parameters.truncate"),
        ({"quantization_config": "fp8"}, "quantization_config"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.quant_method"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
            "quantization_config.weight_block_size",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "activation_scheme": "tensor"}},
            "quantization_config.activation_scheme",
        ),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "dense"}},
            "quantization_config.format",
        ),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapper"])
def test_what_cannot_be_served_is_named(
    tmp_path: Path, changes: dict[str, Any], field: str, wrapped: bool
) -> None:
    path = f"text_config.{field}" if wrapped else field
    with pytest.raises(ConfigError) as error:
        _load(tmp_path, changes, wrapped=wrapped)
    assert f"{tmp_path / 'config.json'}: {path}: " in str(error.value)


def test_another_architecture_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: architectures: is LlamaForCausalLM"):
        _load(tmp_path, {"architectures": ["LlamaForCausalLM"]})


def test_wrapper_around_another_text_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"text_config\.model_type: is 'mistral'"):
        _load(tmp_path, {"model_type": "mistral"}, wrapped=True)


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapper"])
@pytest.mark.parametrize(
    ("declared", "meant"),
    [
        ({"quant_method": "fp8"}, (WeightFormat.FP8, False)),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, (WeightFormat.FP8, False)),
        ({"quant_method": "fp8", "activation_scheme": "static"}, (WeightFormat.FP8, True)),
        (_NVFP4, (WeightFormat.NVFP4, False)),
        ({**_NVFP4, "config_groups": {"g": {"weights": {}}}}, (WeightFormat.NVFP4, False)),
        (
            {**_NVFP4, "config_groups": {"g": {"input_activations": {"dynamic": "local"}}}},
            (WeightFormat.NVFP4, True),
        ),
    ],
)
def test_declared_quantization_is_read(
    tmp_path: Path, declared: dict[str, Any], meant: tuple[WeightFormat, bool], wrapped: bool
) -> None:
    found = _load(tmp_path, {"quantization_config": declared}, wrapped=wrapped).quantization
    assert found == Quantization(weight_format=meant[0], has_input_scales=meant[1])


def test_plain_weights_declare_no_quantization(tmp_path: Path) -> None:
    assert _load(tmp_path, {}).quantization is None


def test_missing_directory_and_missing_config_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such checkpoint directory"):
        load_model_config(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json: missing"):
        load_model_config(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\xff", "[" * 100_000], ids=range(4))
def test_config_that_is_no_json_object_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_model_config(tmp_path)
