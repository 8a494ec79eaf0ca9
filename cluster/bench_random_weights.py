"""Random weights of a whole model, drawn on the GPU in the precision of an official checkpoint.

FP8 has linear layers and experts in FP8; NVFP4 has experts in NVFP4 and linear layers in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ostro.actors.model.draft_head import HeadWeights
from ostro.actors.model.weights import (
    AttentionLayerWeights,
    AttentionWeights,
    ExpertLayer,
    ExpertWeights,
    LayerWeights,
)
from ostro.configs.model import ModelConfig
from ostro.configs.quantization import WeightFormat
from ostro.kernels.fp8_experts import Fp8Experts
from ostro.kernels.fp8_linear import Fp8Weight
from ostro.kernels.linear import LinearWeight
from ostro.kernels.nvfp4_experts import Nvfp4Experts, random_nvfp4_stack

_FP8 = torch.float8_e4m3fn
_SIZE_OF_VALUE = 16.0  # of an FP8 weight before its scale, so that few values are subnormal
_INPUT_SCALE = 1 / 32  # inputs are normed: the largest e4m3 is 14 times their size
_CHUNK_VALUES = 1 << 28


def random_weights(
    config: ModelConfig, precision: WeightFormat
) -> tuple[AttentionWeights, ExpertWeights]:
    """Weights that keep rows at about unit size, drawn on the GPU, shared experts among the routed.

    That is how `AttentionShard` holds them there.
    """
    attention = AttentionWeights(
        embed_VD=_plain(config.vocab_size, config.hidden_size, size=1.0),
        layers=tuple(_attention_layer(config, precision) for _ in range(config.num_layers)),
        final_norm_D=_ones(config.hidden_size),
        lm_head_VD=_plain(config.vocab_size, config.hidden_size),
        vision=None,
    )
    experts = ExpertWeights(
        layers=tuple(_expert_layer(config, precision) for _ in range(config.num_layers)),
        local_to_logical=tuple(range(config.num_experts)),
    )
    return attention, experts


def random_head_weights(config: ModelConfig) -> HeadWeights:
    """A draft head's, in FP8; `config` is its own."""
    return HeadWeights(
        joint=_fp8(config.hidden_size, 2 * config.hidden_size),
        layers=tuple(_head_layer(config) for _ in range(config.num_layers)),
        final_norm_D=_ones(config.hidden_size),
    )


def _head_layer(config: ModelConfig) -> LayerWeights:
    hidden, inner = config.hidden_size, config.shared_hidden_size()
    return LayerWeights(
        **_layer_values(config, _fp8),
        shared_gate_up=_fp8(2 * inner, hidden),
        shared_down=_fp8(hidden, inner),
    )


def _attention_layer(config: ModelConfig, precision: WeightFormat) -> AttentionLayerWeights:
    values = _layer_values(config, _fp8 if precision is WeightFormat.FP8 else _plain)
    gate_ED = _plain(config.num_experts, config.hidden_size).float()
    return AttentionLayerWeights(**values, gate_ED=gate_ED, shared_gate_up=None, shared_down=None)


def _layer_values(
    config: ModelConfig, linear: Callable[[int, int], LinearWeight]
) -> dict[str, Any]:
    """All of a layer's but gate and MLP."""
    hidden, heads = config.hidden_size, config.num_heads
    return {
        "input_norm_D": _ones(hidden),
        "q_a": linear(config.q_lora_rank, hidden),
        "q_a_norm": _ones(config.q_lora_rank),
        "q_b": linear(heads * config.qk_head_dim(), config.q_lora_rank),
        "kv_a": linear(config.latent_width(), hidden),
        "kv_a_norm": _ones(config.kv_lora_rank),
        "w_uk_HNC": _plain(heads, config.qk_nope_head_dim, config.kv_lora_rank),
        "w_uv_HVC": _plain(heads, config.v_head_dim, config.kv_lora_rank),
        "o_proj": linear(hidden, heads * config.v_head_dim),
        "post_norm_D": _ones(hidden),
    }


def _expert_layer(config: ModelConfig, precision: WeightFormat) -> ExpertLayer:
    num_slots, hidden = config.num_experts + 1, config.hidden_size
    inner = config.expert_hidden_size
    ones_E = torch.ones(num_slots, device="cuda")
    if precision is WeightFormat.NVFP4:
        gate_up, size_of_gate_up = random_nvfp4_stack(num_slots, 2 * inner, hidden, "cuda")
        down, size_of_down = random_nvfp4_stack(num_slots, hidden, inner, "cuda")
        return Nvfp4Experts(
            gate_up=gate_up,
            gate_unit_E=ones_E * (hidden**-0.5 / size_of_gate_up),
            up_unit_E=ones_E * (hidden**-0.5 / size_of_gate_up),
            down=down,
            down_unit_E=ones_E * (inner**-0.5 / size_of_down),
        )
    return Fp8Experts(
        gate_up_EHD=_fp8_values(num_slots, 2 * inner, hidden),
        gate_up_scale_E=ones_E * (hidden**-0.5 / _SIZE_OF_VALUE),
        gate_up_input_scale_E=ones_E * _INPUT_SCALE,
        down_EDF=_fp8_values(num_slots, hidden, inner),
        down_scale_E=ones_E * (inner**-0.5 / _SIZE_OF_VALUE),
        down_input_scale_E=ones_E * _INPUT_SCALE,
    )


def _ones(width: int) -> torch.Tensor:
    return torch.ones(width, dtype=torch.bfloat16, device="cuda")


def _plain(*shape: int, size: float | None = None) -> torch.Tensor:
    factor = shape[-1] ** -0.5 if size is None else size
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda") * factor


def _fp8(num_out: int, num_in: int) -> Fp8Weight:
    return Fp8Weight(
        values_OI=_fp8_values(num_out, num_in),
        scale=torch.tensor(num_in**-0.5 / _SIZE_OF_VALUE, device="cuda"),
        input_scale=torch.tensor(_INPUT_SCALE, device="cuda"),
    )


def _fp8_values(*shape: int) -> torch.Tensor:
    values = torch.empty(shape, dtype=_FP8, device="cuda")
    for chunk in values.view(-1).split(_CHUNK_VALUES):
        chunk.copy_(torch.randn(len(chunk), dtype=torch.bfloat16, device="cuda") * _SIZE_OF_VALUE)
    return values
