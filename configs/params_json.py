"""Mistral's own `params.json`, read under the names that `config.json` has for the same things.

One parser then serves both files, and its errors still name the key of the file that was read.
Knows no dataclass of the model: what the values mean is `configs.model`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ostro.configs.config_sections import ConfigSections
from ostro.configs.hugging_face_config import TEXT_ARCHITECTURE, WRAPPER_ARCHITECTURE
from ostro.configs.quantization import load_quantization
from ostro.configs.section import Section, read_json

# Our name, which is config.json's -> where it stands in params.json.
TEXT_KEYS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "tie_word_embeddings": "tied_embeddings",
    "hidden_act": "activation",
    "n_routed_experts": "moe.num_experts",
    "num_experts_per_tok": "moe.num_experts_per_tok",
    "moe_intermediate_size": "moe.expert_hidden_dim",
    "n_shared_experts": "moe.num_shared_experts",
    "routed_scaling_factor": "moe.routed_scale",
    "n_group": "moe.num_expert_groups",
    "topk_group": "moe.num_expert_groups_per_tok",
    "first_k_dense_replace": "moe.first_k_dense_replace",
    "moe_layer_freq": "moe.route_every_n",
}
# Of a draft head, whose layers have in place of experts one MLP that every token passes.
# Embedding and vocabulary matrix are the model's, so whether they are tied is no matter.
HEAD_KEYS = {
    ours: path
    for ours, path in TEXT_KEYS.items()
    if not path.startswith("moe.") and ours != "tie_word_embeddings"
}
HEAD_KEYS |= {"moe_intermediate_size": "hidden_dim"}
ROPE_KEYS = {
    "rope_theta": "rope_theta",
    "factor": "yarn.factor",
    "original_max_position_embeddings": "yarn.original_max_position_embeddings",
    "beta_fast": "yarn.beta",
    "beta_slow": "yarn.alpha",
    "apply_scale": "yarn.apply_scale",
    "llama_4_scaling_beta": "llama_4_scaling.beta",
    "llama_4_original_max_position_embeddings": "llama_4_scaling.original_max_position_embeddings",
}
TOWER_KEYS = {
    "hidden_size": "vision_encoder.hidden_size",
    "num_hidden_layers": "vision_encoder.num_hidden_layers",
    "num_attention_heads": "vision_encoder.num_attention_heads",
    "intermediate_size": "vision_encoder.intermediate_size",
    "patch_size": "vision_encoder.patch_size",
    "image_size": "vision_encoder.image_size",
    "num_channels": "vision_encoder.num_channels",
    "rope_theta": "vision_encoder.rope_theta",
}
PROJECTOR_KEYS = {
    "spatial_merge_size": "vision_encoder.spatial_merge_size",
    "image_token_index": "vision_encoder.image_token_id",
}
# What the projector must be, said outright: elsewhere an absent key means something else.
PROJECTOR_REQUIRED = {
    "mm_projector_id": "patch_merge",
    "add_pre_mm_projector_layer_norm": True,
    "adapter_bias": False,
}
# Where an absent key would leave a doubt that no default should settle.
_NEEDED = ("moe", "llama_4_scaling")
HEAD_ARCHITECTURE = "EagleMistralLarge3ForCausalLM"  # as vLLM calls it; params.json names none


def read_params_json(file: Path) -> ConfigSections:
    """Read a `params.json`.

    Raises:
        ConfigError: No such file, or no mixture of experts, no llama-4 scale, or another projector
            than Pixtral's with a patch merger.
    """
    params = Section(file, "", read_json(file))
    _need(params, _NEEDED)
    has_tower = params.values.get("vision_encoder") is not None
    if has_tower:
        _check_projector(params.section("vision_encoder"))
    return ConfigSections(
        architecture=WRAPPER_ARCHITECTURE if has_tower else TEXT_ARCHITECTURE,
        top=_renamed(params, PROJECTOR_KEYS, {}),
        text=_renamed(params, TEXT_KEYS, {}),
        rope=_rope(params),
        tower=_renamed(params, TOWER_KEYS, {"hidden_act": "silu"}) if has_tower else None,
        quantization=load_quantization(params, _quantization_key(params)),
    )


def read_head_params(file: Path) -> ConfigSections:
    """Read the `params.json` of a draft head: as a model's, without experts and images.

    Raises:
        ConfigError: No such file, or experts, or no llama-4 scale.
    """
    params = Section(file, "", read_json(file))
    if params.values.get("moe") is not None:
        raise params.error("moe", "is there, but the layers of a draft head have no experts")
    _need(params, ("llama_4_scaling",))
    return ConfigSections(
        architecture=HEAD_ARCHITECTURE,
        top=Section(file, "", {}),
        text=_renamed(params, HEAD_KEYS, {"n_shared_experts": 1}),
        rope=_rope(params),
        tower=None,
        quantization=load_quantization(params, _quantization_key(params)),
    )


def _need(params: Section, keys: Sequence[str]) -> None:
    for key in keys:
        if params.values.get(key) is None:
            raise params.error(key, "missing; every layer of the served model has it")
        params.section(key)  # raises if it is no mapping


def _quantization_key(params: Section) -> str:
    return "quantization_config" if params.values.get("quantization_config") else "quantization"


def _rope(params: Section) -> Section:
    if params.values.get("yarn") is None:
        return _renamed(params, ROPE_KEYS, {"rope_type": "default"})
    if "apply_scale" not in params.section("yarn").values:
        raise params.error("yarn.apply_scale", "missing; say whether the softmax is scaled")
    # These weights say that cos and sin are not scaled, as in config.json.
    constants = {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0}
    return _renamed(params, ROPE_KEYS, constants)


def _check_projector(encoder: Section) -> None:
    for key, needed in PROJECTOR_REQUIRED.items():
        if encoder.values.get(key) != needed:
            found = encoder.values.get(key)
            raise encoder.error(key, f"is {found!r}, but only {needed!r} is served")


def _renamed(params: Section, keys: Mapping[str, str], constants: Mapping[str, Any]) -> Section:
    found = {ours: _at(params, path) for ours, path in keys.items()}
    present = {ours: value for ours, value in found.items() if value is not None}
    return Section(params.file, "", {**constants, **present}, keys)


def _at(params: Section, path: str) -> Any:
    holder, _, key = path.rpartition(".")
    values = params.values.get(holder) if holder else params.values
    return values.get(key) if values is not None else None
