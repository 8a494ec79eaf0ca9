"""One checkpoint in every official layout and precision, written from what is known of the files.

Shares no code and no table with the loader or the converter, so that a mistake in one shows.
`write_variant` rounds to a format; `write_twin` writes the rounded values in float32, in the
Hugging Face layout, so that both must give the same logits. "nvfp4_linears" is what others than the
authors may make: NVFP4 attention too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
LAYOUTS = ("hf", "mistral")
INPUT_SCALE = 0.02

_NVFP4 = ("nvfp4", "nvfp4_linears")
_CODES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
_CODES = torch.cat((_CODES, -_CODES))
_NATIVE = {
    "lm_head.": "output.",
    "model.embed_tokens.": "tok_embeddings.",
    "model.norm.": "norm.",
    "model.layers.": "layers.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
    ".self_attn.q_a_proj.": ".attention.wq_a.",
    ".self_attn.q_a_layernorm.": ".attention.q_a_norm.",
    ".self_attn.q_b_proj.": ".attention.wq_b.",
    ".self_attn.kv_a_proj_with_mqa.": ".attention.wkv_a_with_mqa.",
    ".self_attn.kv_a_layernorm.": ".attention.kv_a_norm.",
    ".self_attn.kv_b_proj.": ".attention.wkv_b.",
    ".self_attn.o_proj.": ".attention.wo.",
    ".mlp.gate.": ".gate.",
    ".mlp.shared_experts.": ".shared_experts.",
    ".mlp.experts.": ".experts.",
    "vision_tower.": "vision_encoder.",
    ".attention.q_proj.": ".attention.wq.",
    ".attention.k_proj.": ".attention.wk.",
    ".attention.v_proj.": ".attention.wv.",
    ".attention.o_proj.": ".attention.wo.",
    ".gate_proj.": ".w1.",
    ".down_proj.": ".w2.",
    ".up_proj.": ".w3.",
    "multi_modal_projector.norm.": "pre_mm_projector_norm.",
    "multi_modal_projector.patch_merger.": "patch_merger.",
    "multi_modal_projector.linear_1.": "vision_language_adapter.w_in.",
    "multi_modal_projector.linear_2.": "vision_language_adapter.w_out.",
}


def write_variant(source: Path, target: Path, layout: str, precision: str) -> Path:
    """Write a checkpoint's values in a layout and precision; `source` is Hugging Face's, plain."""
    target.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    tensors: Tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        tensors |= _variant(name, weight, layout, precision)
    if layout == "mistral":
        tensors = {_native_name(name): weight for name, weight in tensors.items()}
        heads = config.get("vision_config", {}).get("num_attention_heads")
        for name in tensors:
            if name.startswith("vision_encoder.") and (".wq." in name or ".wk." in name):
                tensors[name] = _rotated_pairs(tensors[name], heads)
        _write_json(
            target / "params.json", {**params_json(config), **_native_quantization(precision)}
        )
    else:
        _write_json(target / "config.json", {**config, **_hf_quantization(precision)})
    shutil.copy(source / "generation_config.json", target)
    stem = "consolidated" if layout == "mistral" else "model"
    save_file(tensors, target / f"{stem}.safetensors", metadata={"format": "pt"})
    return target


def write_twin(source: Path, target: Path, precision: str) -> Path:
    """Write what a precision makes of a checkpoint's values, in float32."""
    target.mkdir(parents=True)
    for name in ("config.json", "generation_config.json"):
        shutil.copy(source / name, target)
    tensors = {
        name: _rounded(name, weight, precision)
        for name, weight in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def params_json(config: dict[str, Any]) -> dict[str, Any]:
    """The `params.json` that says what a `config.json` says."""
    text = config.get("text_config", config)
    rope, scaled = text["rope_parameters"], "original_max_position_embeddings"
    params = {
        "dim": text["hidden_size"],
        "n_layers": text["num_hidden_layers"],
        "head_dim": text["head_dim"],
        "hidden_dim": text["intermediate_size"],
        "n_heads": text["num_attention_heads"],
        "n_kv_heads": text["num_key_value_heads"],
        "rope_theta": rope["rope_theta"],
        "norm_eps": text["rms_norm_eps"],
        "vocab_size": text["vocab_size"],
        "tied_embeddings": text["tie_word_embeddings"],
        "max_position_embeddings": text["max_position_embeddings"],
        "llama_4_scaling": {scaled: rope[scaled], "beta": rope["llama_4_scaling_beta"]},
        "yarn": {
            scaled: rope[scaled],
            "factor": rope["factor"],
            "apply_scale": False,
            "beta": rope["beta_fast"],
            "alpha": rope["beta_slow"],
        },
        "moe": {
            "expert_parallel": 1,
            "expert_model_parallel": 1,
            "route_every_n": 1,
            "first_k_dense_replace": 0,
            "num_experts": text["n_routed_experts"],
            "num_experts_per_tok": text["num_experts_per_tok"],
            "num_expert_groups": 1,
            "num_expert_groups_per_tok": 1,
            "routed_scale": text["routed_scaling_factor"],
            "expert_hidden_dim": text["moe_intermediate_size"],
            "num_shared_experts": text["n_shared_experts"],
        },
    }
    for key in "q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim".split():
        params[key] = text[key]
    if "vision_config" in config:
        params["vision_encoder"] = _vision_encoder(config)
    return params


def _vision_encoder(config: dict[str, Any]) -> dict[str, Any]:
    tower = config["vision_config"]
    same = (
        "hidden_size num_hidden_layers num_attention_heads intermediate_size patch_size image_size"
    )
    return {
        **{key: tower[key] for key in [*same.split(), "num_channels"]},
        "max_image_size": tower["image_size"],
        "rope_theta": tower["rope_parameters"]["rope_theta"],
        "image_token_id": config["image_token_index"],
        "image_break_token_id": 12,
        "image_end_token_id": 13,
        "spatial_merge_size": config["spatial_merge_size"],
        "mm_projector_id": "patch_merge",
        "add_pre_mm_projector_layer_norm": True,
        "adapter_bias": False,
    }


def _hf_quantization(precision: str) -> dict[str, Any]:
    fp8 = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    declared = {"fp8": fp8, **dict.fromkeys(_NVFP4, _compressed_tensors())}
    return {"quantization_config": declared[precision]} if precision in declared else {}


def _native_quantization(precision: str) -> dict[str, Any]:
    fp8 = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    declared = {"fp8": fp8, **dict.fromkeys(_NVFP4, _compressed_tensors())}
    return {"quantization": declared[precision]} if precision in declared else {}


def _compressed_tensors() -> dict[str, Any]:
    scheme = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    inputs = {**scheme, "dynamic": "local"}
    group = {"targets": ["Linear"], "weights": {**scheme, "dynamic": False}}
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": {**group, "input_activations": inputs}},
    }


# ---- names


def _native_name(name: str) -> str:
    name = name.removeprefix("language_model.")
    for theirs, ours in _NATIVE.items():
        name = name.replace(theirs, ours)
    return name


def _rotated_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows [first half | second half] of each head as pairs (first[i], second[i])."""
    heads = weight.view(num_heads, -1, weight.shape[1])
    half = heads.shape[1] // 2
    pairs = [row for i in range(half) for row in (heads[:, i], heads[:, half + i])]
    return torch.stack(pairs, dim=1).reshape(weight.shape).contiguous()


# ---- values


def _is_quantized(name: str, precision: str) -> bool:
    if ".layers." not in name or name.startswith("vision_tower."):
        return False
    in_experts = ".mlp.experts." in name or ".shared_experts." in name
    in_attention = ".self_attn." in name and "layernorm" not in name
    if precision == "nvfp4":
        return in_experts
    return precision != "bf16" and (in_experts or in_attention)


def _variant(name: str, weight: torch.Tensor, layout: str, precision: str) -> Tensors:
    """The tensors that a plain Hugging Face tensor becomes; names are still Hugging Face's."""
    stacked = ".mlp.experts." in name
    if layout == "hf" and stacked and precision not in _NVFP4:
        return _stacked(name, weight, precision)
    if stacked:
        parts: Tensors = {}
        for module, expert, pair in _single_experts(name, weight):
            # Gate and up of one expert share their FP8 scale, as in the official checkpoint.
            shared = _fp8_scale(pair)
            parts |= _module(module, expert, layout, precision, shared)
        return parts
    if not _is_quantized(name, precision):
        return {name: weight}
    module = name.removesuffix(".weight")
    return _module(module, weight, layout, precision, _fp8_scale(weight))


def _single_experts(
    name: str, weight: torch.Tensor
) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(module, its weight, the weight that it shares a scale with) of every expert."""
    base, _, kind = name.rpartition(".")
    found = []
    for index, expert in enumerate(weight):
        if kind == "down_proj":
            found.append((f"{base}.{index}.down_proj", expert, expert))
        else:
            gate, up = expert.chunk(2)
            found += [
                (f"{base}.{index}.{part}_proj", half, expert)
                for part, half in (("gate", gate), ("up", up))
            ]
    return found


def _stacked(name: str, weight: torch.Tensor, precision: str) -> Tensors:
    if precision == "bf16":
        return {name: weight}
    scales = torch.stack([_fp8_scale(expert) for expert in weight])
    values = torch.stack(
        [_fp8(expert, scale) for expert, scale in zip(weight, scales, strict=True)]
    )
    return {
        name: values,
        name + "_scale_inv": scales.view(-1, 1, 1),
        name + "_activation_scale": torch.full((len(weight),), INPUT_SCALE, dtype=torch.bfloat16),
    }


def _module(
    module: str, weight: torch.Tensor, layout: str, precision: str, scale: torch.Tensor
) -> Tensors:
    if precision == "bf16":
        return {module + ".weight": weight.contiguous()}
    if precision in _NVFP4:
        packed, scales, global_scale = _nvfp4(weight)
        return {
            module + ".weight_packed": packed,
            module + ".weight_scale": scales,
            module + ".weight_global_scale": global_scale,
            module + ".input_global_scale": torch.tensor([1 / INPUT_SCALE]),
        }
    names = (
        ("weight_scale_inv", "activation_scale")
        if layout == "hf"
        else ("qscale_weight", "qscale_act")
    )
    return {
        module + ".weight": _fp8(weight, scale),
        f"{module}.{names[0]}": scale.clone(),
        f"{module}.{names[1]}": torch.tensor(INPUT_SCALE, dtype=torch.bfloat16),
    }


def _fp8_scale(weight: torch.Tensor) -> torch.Tensor:
    return (weight.float().abs().max() / 448).to(torch.bfloat16)


def _fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    scaled = weight.float() / scale.float()
    return scaled.clamp(-448, 448).to(torch.float8_e4m3fn).contiguous()


def _nvfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(packed values, scale of every 16, global scale)."""
    rows, width = weight.shape
    global_scale = 2688 / weight.float().abs().max()
    groups = weight.float().view(rows, width // 16, 16)
    scales = (groups.abs().amax(-1) / 6 * global_scale).to(torch.float8_e4m3fn)
    ratios = groups / (scales.float() / global_scale)[..., None]
    codes = (ratios[..., None] - _CODES).abs().argmin(-1).view(rows, width).to(torch.uint8)
    packed = codes[:, 0::2] + 16 * codes[:, 1::2]
    return packed.contiguous(), scales, global_scale.view(1)


def _rounded(name: str, weight: torch.Tensor, precision: str) -> torch.Tensor:
    """What the format makes of a plain Hugging Face tensor, in float32."""
    if not _is_quantized(name, precision):
        return weight.float()
    if precision == "fp8":
        matrices = weight if weight.dim() == 3 else weight[None]
        rounded = torch.stack(
            [_fp8(m, _fp8_scale(m)).float() * _fp8_scale(m).float() for m in matrices]
        )
        return rounded.view(weight.shape)
    if weight.dim() == 2:
        return _nvfp4_values(weight)
    halves = 2 if name.endswith("gate_up_proj") else 1  # gate and up have scales of their own
    return torch.stack(
        [torch.cat([_nvfp4_values(part) for part in expert.chunk(halves)]) for expert in weight]
    )


def _nvfp4_values(weight: torch.Tensor) -> torch.Tensor:
    packed, scales, global_scale = _nvfp4(weight)
    codes = torch.stack((packed % 16, packed // 16), dim=-1).flatten(1)
    steps = (scales.float() / global_scale).repeat_interleave(16, dim=1)
    return _CODES[codes.long()] * steps


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=1))
