"""The weights of each role, and how they are filled from a checkpoint.

`check_checkpoint` holds every tensor name, shape and dtype against the config before any memory is
taken; the loaders then fill every parameter exactly once, through `WeightSource`, which hides
layout and precision. After-load changes stand in one place each: splitting kv_b in `_split_kv_b`,
the order in which kernels read NVFP4 in `nvfp4_weights`.

`precision` says what the quantised weights are held in: PLAIN dequantises them, FP8 and NVFP4 keep
those of linear layers and experts in their own precision. kv_b alone is dequantised in any: it is
3 % of a layer's attention and shared expert, and is multiplied from both sides.

A shared expert of the shape of a routed one can stand behind them as the last of their stack, so
that both are multiplied in the same launches: experts are then loaded first, with a slot to spare.

Shape letters: D hidden, H heads, N nope dim, P rope dim, C latent, E experts, F expert hidden,
V vocabulary; in w_uv V is the value dim of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ostro.actors.model.checkpoint import CheckpointReader, ReadProgress
from ostro.actors.model.stored_weights import match_tensors
from ostro.actors.model.vision_weights import VisionWeights, gather_vision_weights
from ostro.actors.model.weight_names import Role
from ostro.actors.model.weight_source import WeightSource
from ostro.configs.model import ModelConfig, load_model_config
from ostro.configs.quantization import WeightFormat
from ostro.kernels.fp8_experts import Fp8Experts
from ostro.kernels.fp8_linear import Fp8Weight
from ostro.kernels.linear import LinearWeight
from ostro.kernels.nvfp4_experts import Nvfp4Experts


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """Attention of one layer, and its MLP that every token passes.

    Linear layers are in the model's dtype, FP8 or NVFP4.

    Attributes:
        q_a: [q_lora, D]; `kv_a`'s rows follow where that is None.
        q_a_norm: [q_lora].
        q_b: [H * (N + P), q_lora]; per head nope rows, then rope rows.
        kv_a: [C + P, D]; latent rows, then rope-key rows.
        kv_a_norm: [C].
        w_uk_HNC: Takes a nope query into latent space, or a latent to its nope key.
        w_uv_HVC: Takes a latent to a head's value.
        o_proj: [D, H * V].
        shared_gate_up: [2F, D] with F = `ModelConfig.shared_hidden_size()`; gate rows, then up.
            None where the routed experts' stack holds the shared one.
        shared_down: [D, F]; None likewise.
    """

    input_norm_D: torch.Tensor
    q_a: LinearWeight
    q_a_norm: torch.Tensor
    q_b: LinearWeight
    kv_a: LinearWeight | None
    kv_a_norm: torch.Tensor
    w_uk_HNC: torch.Tensor
    w_uv_HVC: torch.Tensor
    o_proj: LinearWeight
    post_norm_D: torch.Tensor
    shared_gate_up: LinearWeight | None
    shared_down: LinearWeight | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayerWeights(LayerWeights):
    """One layer's share of the attention role.

    Attributes:
        gate_ED: float32.
    """

    gate_ED: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWeights:
    """Everything but the routed experts; a tied `lm_head_VD` is `embed_VD` itself.

    Attributes:
        vision: None if the checkpoint takes no images.
    """

    embed_VD: torch.Tensor
    layers: tuple[AttentionLayerWeights, ...]
    final_norm_D: torch.Tensor
    lm_head_VD: torch.Tensor
    vision: VisionWeights | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayerWeights:
    """One layer's routed experts on this shard, by local slot.

    Attributes:
        gate_up: [E, 2F, D]; gate rows, then up.
        down: [E, D, F].
    """

    gate_up: torch.Tensor
    down: torch.Tensor


ExpertLayer: TypeAlias = ExpertLayerWeights | Fp8Experts | Nvfp4Experts


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """The routed experts of one shard.

    Attributes:
        layers: May have one slot more than there are local experts, for the shared one.
        local_to_logical: The logical expert in each local slot, the same in every layer.
    """

    layers: tuple[ExpertLayer, ...]
    local_to_logical: tuple[int, ...]

    def num_extra(self) -> int:
        """Slots behind those of routed experts."""
        return num_slots(self.layers[0]) - len(self.local_to_logical)


def num_slots(layer: ExpertLayer) -> int:
    """Experts that a layer has room for."""
    if isinstance(layer, Nvfp4Experts):
        return len(layer.down_unit_E)
    return len(layer.gate_up_EHD if isinstance(layer, Fp8Experts) else layer.gate_up)


def check_checkpoint(directory: Path) -> ModelConfig:
    """Check a checkpoint as far as headers tell, taking no memory for weights.

    Raises:
        ConfigError: From `load_model_config`.
        CheckpointError: A file or tensor is missing, truncated, unknown, of the wrong shape or of
            an unserved dtype. One error tells all of it.
    """
    config = load_model_config(directory)
    reader = CheckpointReader(directory)
    match_tensors(reader, config).check(directory)
    return config


def load_attention_weights(
    reader: CheckpointReader,
    config: ModelConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    precision: WeightFormat = WeightFormat.PLAIN,
    progress: ReadProgress | None = None,
    shared_into: ExpertWeights | None = None,
) -> AttentionWeights:
    """Read all that the attention role needs; what `progress` is told is `attention_bytes` in all.

    Args:
        reader: The checkpoint.
        config: Its config.
        device: Where to.
        dtype: As what, if not in `precision`.
        precision: See the module.
        progress: Told the bytes filled.
        shared_into: Takes the shared expert of each layer into its last slot; one layer's is held
            twice meanwhile.

    Raises:
        CheckpointError: As `check_checkpoint`.
        ValueError: The checkpoint's weights cannot be multiplied in `precision`, or `shared_into`
            has no slot to spare.
        TypeError: Shared and routed experts are in different formats (see `can_stack_shared`).
    """
    if shared_into is not None and shared_into.num_extra() != 1:
        raise ValueError("experts that take the shared one must be loaded with num_extra=1")
    source = WeightSource(
        reader, config, Role.ATTENTION, device=device, precision=precision, progress=progress
    )
    source.tell_dequantized(dtype)
    embed_VD = source.take("embed", None, dtype)
    tied = config.tie_word_embeddings
    weights = AttentionWeights(
        embed_VD=embed_VD,
        layers=tuple(
            _attention_layer(source, i, dtype, shared_into) for i in range(config.num_layers)
        ),
        final_norm_D=source.take("final_norm", None, dtype),
        lm_head_VD=embed_VD if tied else source.take("lm_head", None, dtype),
        vision=_vision(source, dtype),
    )
    source.verify()
    return weights


def load_expert_weights(
    reader: CheckpointReader,
    config: ModelConfig,
    local_to_logical: Sequence[int],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    precision: WeightFormat = WeightFormat.PLAIN,
    progress: ReadProgress | None = None,
    num_extra: int = 0,
) -> ExpertWeights:
    """Read these experts of every layer, and no other byte.

    Args:
        reader: The checkpoint.
        config: Its config.
        local_to_logical: The logical expert for each local slot; repeats are replicas.
        device: Where to.
        dtype: As what, if not in `precision`.
        precision: See the module.
        progress: Told the bytes filled; in the end they add up to `expert_bytes`.
        num_extra: Slots behind those, not filled: 1 for `load_attention_weights`'s `shared_into`.

    Raises:
        CheckpointError: As `check_checkpoint`.
        ValueError: No such expert, or weights that cannot be multiplied in `precision`.
    """
    if not all(0 <= expert < config.num_experts for expert in local_to_logical):
        raise ValueError(f"local_to_logical={local_to_logical}: {config.num_experts} experts exist")
    source = WeightSource(
        reader, config, Role.EXPERT, device=device, precision=precision, progress=progress
    )
    source.tell_dequantized(dtype)
    layers = tuple(
        _expert_layer(source, layer, local_to_logical, dtype, num_extra)
        for layer in range(config.num_layers)
    )
    source.verify()
    return ExpertWeights(layers=layers, local_to_logical=tuple(local_to_logical))


def can_stack_shared(
    reader: CheckpointReader, config: ModelConfig, precision: WeightFormat = WeightFormat.PLAIN
) -> bool:
    """Whether shared experts have the shape and the format of routed ones, as `shared_into` asks.

    Raises:
        CheckpointError: The names follow no known scheme.
    """
    if config.shared_hidden_size() != config.expert_hidden_size:
        return False
    return precision is WeightFormat.PLAIN or all(
        weight.weight_format is precision
        for weight in match_tensors(reader, config).weights.values()
        if weight.expected.parameter.startswith(("shared_", "expert"))
    )


def _expert_layer(
    source: WeightSource,
    layer: int,
    local_to_logical: Sequence[int],
    dtype: torch.dtype,
    num_extra: int,
) -> ExpertLayer:
    held = source.expert_format(layer)
    if held is WeightFormat.FP8:
        return source.take_fp8_experts(layer, local_to_logical, num_extra)
    if held is WeightFormat.NVFP4:
        return source.take_nvfp4_experts(layer, local_to_logical, num_extra)
    gate_up, down = source.take_experts(layer, local_to_logical, dtype, num_extra)
    return ExpertLayerWeights(gate_up=gate_up, down=down)


def _stack_shared(
    experts: ExpertLayerWeights | Fp8Experts, gate_up: LinearWeight, down: LinearWeight
) -> None:
    """Copy a shared expert into the last slot."""
    if isinstance(experts, Fp8Experts):
        if not isinstance(gate_up, Fp8Weight) or not isinstance(down, Fp8Weight):
            raise TypeError("routed experts are FP8 and the shared one is not; load it apart")
        experts.gate_up_EHD[-1].copy_(gate_up.values_OI)
        experts.gate_up_scale_E[-1] = gate_up.scale
        experts.gate_up_input_scale_E[-1] = gate_up.input_scale
        experts.down_EDF[-1].copy_(down.values_OI)
        experts.down_scale_E[-1] = down.scale
        experts.down_input_scale_E[-1] = down.input_scale
        return
    if not isinstance(gate_up, torch.Tensor) or not isinstance(down, torch.Tensor):
        raise TypeError("the shared expert is quantised and routed ones are not; load it apart")
    experts.gate_up[-1].copy_(gate_up)
    experts.down[-1].copy_(down)


def _attention_layer(
    source: WeightSource, layer: int, dtype: torch.dtype, shared_into: ExpertWeights | None
) -> AttentionLayerWeights:
    held = take_layer(source, layer, dtype, shared_into)
    values: dict[str, Any] = {field.name: getattr(held, field.name) for field in fields(held)}
    return AttentionLayerWeights(**values, gate_ED=source.take("gate", layer, torch.float32))


def take_layer(
    source: WeightSource,
    layer: int,
    dtype: torch.dtype,
    shared_into: ExpertWeights | None = None,
) -> LayerWeights:
    """Read one layer; arguments as `load_attention_weights`'s."""

    def take(parameter: str) -> torch.Tensor:
        return source.take(parameter, layer, dtype)

    def take_linear(*parameters: str) -> LinearWeight:
        return source.take_linear(parameters, layer, dtype)

    w_uk_HNC, w_uv_HVC = _split_kv_b(source.config, take("kv_b"))
    shared_gate_up = shared_down = None
    stack = None if shared_into is None else shared_into.layers[layer]
    if isinstance(stack, Nvfp4Experts):
        source.take_shared_nvfp4(layer, stack)
    else:
        shared_gate_up = take_linear("shared_gate", "shared_up")
        shared_down = take_linear("shared_down")
        if stack is not None:
            _stack_shared(stack, shared_gate_up, shared_down)
            shared_gate_up = shared_down = None
    return LayerWeights(
        input_norm_D=take("input_norm"),
        q_a=take_linear("q_a"),
        q_a_norm=take("q_a_norm"),
        q_b=take_linear("q_b"),
        kv_a=take_linear("kv_a"),
        kv_a_norm=take("kv_a_norm"),
        w_uk_HNC=w_uk_HNC,
        w_uv_HVC=w_uv_HVC,
        o_proj=take_linear("o_proj"),
        post_norm_D=take("post_norm"),
        shared_gate_up=shared_gate_up,
        shared_down=shared_down,
    )


def _vision(source: WeightSource, dtype: torch.dtype) -> VisionWeights | None:
    def take(parameter: str, layer: int | None) -> torch.Tensor:
        return source.take(parameter, layer, dtype)

    vision = source.config.vision
    return None if vision is None else gather_vision_weights(vision, take)


def _split_kv_b(config: ModelConfig, kv_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """kv_b holds, head by head, the nope-key rows and then the value rows."""
    nope = config.qk_nope_head_dim
    by_head = kv_b.view(config.num_heads, nope + config.v_head_dim, config.kv_lora_rank)
    return by_head[:, :nope].contiguous(), by_head[:, nope:].contiguous()
