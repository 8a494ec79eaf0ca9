"""`ModelConfig` as a config file of either layout, for checkpoints that change theirs.

What `load_model_config` reads is written, and what other engines need to know the model by; the
keys of `params.json` are those that `params_json` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ostro.configs.checkpoint_layout import CheckpointLayout
from ostro.configs.hugging_face_config import TEXT_ARCHITECTURE, WRAPPER_ARCHITECTURE
from ostro.configs.model import ModelConfig, RopeConfig
from ostro.configs.params_json import (
    HEAD_KEYS,
    PROJECTOR_KEYS,
    PROJECTOR_REQUIRED,
    ROPE_KEYS,
    TEXT_KEYS,
    TOWER_KEYS,
)
from ostro.configs.quantization import Quantization, WeightFormat
from ostro.configs.vision import VisionConfig

_IMAGE_BREAK, _IMAGE_END = 12, 13  # of the tokenizer, in params.json too
_NVFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": 16}
# Modules that stay as they are, by the names that either layout's loaders know them under.
_IGNORED = (
    "lm_head",
    "output",
    "re:.*embed.*",
    "re:.*self_attn.*",
    "re:.*attention.*",
    "re:.*gate$",
    "re:.*vision.*",
    "re:.*patch_merger.*",
    "re:.*multi_modal_projector.*",
)


def write_config_values(
    config: ModelConfig, layout: CheckpointLayout, quantization: Quantization | None
) -> dict[str, Any]:
    """The content of a layout's config file."""
    if layout is CheckpointLayout.MISTRAL:
        return {**_params_json(config), **declare(layout, quantization)}
    return {**_config_json(config), **declare(layout, quantization)}


def declare(layout: CheckpointLayout, quantization: Quantization | None) -> dict[str, Any]:
    """The part of a config file that declares the precision of its weights; empty for plain."""
    if quantization is None:
        return {}
    if layout is CheckpointLayout.MISTRAL:
        return {"quantization": _native_quantization(quantization)}
    return {"quantization_config": _hugging_face_quantization(quantization)}


def _hugging_face_quantization(quantization: Quantization) -> dict[str, Any]:
    if quantization.weight_format is WeightFormat.NVFP4:
        return _compressed_tensors(quantization)
    return {
        "quant_method": "fp8",
        "activation_scheme": "static" if quantization.has_input_scales else "dynamic",
        "weight_block_size": None,
        "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    }


def _native_quantization(quantization: Quantization) -> dict[str, Any]:
    if quantization.weight_format is WeightFormat.NVFP4:
        return _compressed_tensors(quantization)
    scheme = "TENSOR" if quantization.has_input_scales else "NO_SCALES"
    return {"qformat_weight": "fp8_e4m3", "qscheme_act": scheme}


def _compressed_tensors(quantization: Quantization) -> dict[str, Any]:
    weights = {**_NVFP4, "strategy": "tensor_group", "dynamic": False}
    inputs = {**weights, "dynamic": "local"} if quantization.has_input_scales else None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(_IGNORED),
    }


def _config_json(config: ModelConfig) -> dict[str, Any]:
    rope = {"rope_type": config.rope.kind, **_rope_values(config)}
    partial = config.qk_rope_head_dim / config.qk_head_dim()
    text = {
        "model_type": "mistral4",
        "dtype": config.dtype,
        **_text_values(config),
        "head_dim": config.qk_head_dim(),
        "qk_head_dim": config.qk_head_dim(),
        "norm_topk_prob": config.norm_topk_prob,
        "attention_bias": False,
        "rope_interleave": True,
        "rope_parameters": {**rope, "partial_rotary_factor": partial},
        "bos_token_id": config.bos_token_id,
        "eos_token_id": _one_or_all(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
    }
    if config.vision is None:
        return {"architectures": [TEXT_ARCHITECTURE], **text}
    return {
        "architectures": [WRAPPER_ARCHITECTURE],
        "model_type": "mistral3",
        "dtype": config.dtype,
        "tie_word_embeddings": config.tie_word_embeddings,
        "text_config": text,
        "vision_config": _tower_json(config.vision),
        **_projector_values(config.vision),
        "vision_feature_layer": -1,
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
    }


def _tower_json(vision: VisionConfig) -> dict[str, Any]:
    values = _tower_values(vision)
    theta = values.pop("rope_theta")
    return {
        "model_type": "pixtral",
        **values,
        "head_dim": vision.head_dim,
        "hidden_act": vision.hidden_act,
        "rope_parameters": {"rope_theta": theta, "rope_type": "axial"},
    }


def _params_json(config: ModelConfig) -> dict[str, Any]:
    params: dict[str, Any] = {}
    _spell(params, _text_values(config), HEAD_KEYS if config.is_draft_head() else TEXT_KEYS)
    _spell(params, _rope_values(config), ROPE_KEYS)
    params["head_dim"] = config.qk_head_dim()
    if config.vision is not None:
        _spell(params, _tower_values(config.vision), TOWER_KEYS)
        _spell(params, _projector_values(config.vision), PROJECTOR_KEYS)
        params["vision_encoder"] |= {
            "max_image_size": config.vision.image_size,
            "image_break_token_id": _IMAGE_BREAK,
            "image_end_token_id": _IMAGE_END,
            **PROJECTOR_REQUIRED,
        }
    return params


def _spell(params: dict[str, Any], values: Mapping[str, Any], keys: Mapping[str, str]) -> None:
    """Put values where params.json has them; those that it has no place for are left out."""
    for ours, path in keys.items():
        if ours not in values:
            continue
        holder, _, key = path.rpartition(".")
        (params.setdefault(holder, {}) if holder else params)[key] = values[ours]


# ---- values under the keys of config.json


def _text_values(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "n_routed_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_token,
        "moe_intermediate_size": config.expert_hidden_size,
        "n_shared_experts": config.num_shared_experts,
        "routed_scaling_factor": config.routed_scaling_factor,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_context,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def _rope_values(config: ModelConfig) -> dict[str, Any]:
    rope, original = config.rope, "original_max_position_embeddings"
    values: dict[str, Any] = {"rope_theta": rope.theta, "llama_4_scaling_beta": config.llama4_beta}
    values[f"llama_4_{original}"] = config.llama4_original_max_positions
    return values if rope.kind == "default" else {**values, **_yarn_values(rope)}


def _yarn_values(rope: RopeConfig) -> dict[str, Any]:
    return {
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_positions,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
        "apply_scale": rope.apply_scale,
    }


def _tower_values(vision: VisionConfig) -> dict[str, Any]:
    return {
        "hidden_size": vision.hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "intermediate_size": vision.intermediate_size,
        "patch_size": vision.patch_size,
        "image_size": vision.image_size,
        "num_channels": vision.num_channels,
        "rope_theta": vision.rope_theta,
    }


def _projector_values(vision: VisionConfig) -> dict[str, Any]:
    return {
        "spatial_merge_size": vision.spatial_merge_size,
        "image_token_index": vision.image_token_id,
    }


def _one_or_all(ids: tuple[int, ...]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else list(ids)
