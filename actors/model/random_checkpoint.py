"""Seeded random checkpoints in the Hugging Face layout, for tests, benchmarks and the first run.

A draft head for one is in Mistral's own layout, the only one that heads come in.

Every value is a function of (seed, tensor name, index on axis 0 of stacked experts) through raw
Philox words, which numpy defines by algorithm: the same seed gives the same bytes on every
machine and version. Written as a stream, so a checkpoint may be larger than memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ostro.actors.model.checkpoint_writer import TensorSpec, tensor_bytes, write_header
from ostro.actors.model.native_names import HEAD_SCHEME
from ostro.actors.model.weight_names import TEXT_SCHEME, WRAPPER_SCHEME, ExpectedTensor
from ostro.configs.checkpoint_layout import CheckpointLayout
from ostro.configs.config_writer import write_config_values
from ostro.configs.hugging_face_config import TEXT_ARCHITECTURE, WRAPPER_ARCHITECTURE
from ostro.configs.model import ModelConfig, load_model_config

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 11}
_IMAGE_TOKEN_ID = 10
_HEAD_MLP = 3  # its hidden width over the model's, as the official head has it
_NORM_SPREAD = 0.1  # norms are not exactly one, so that a loader that forgets them is noticed


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomVision:
    """Shape of a random vision tower; defaults are what Mistral Small 4 has."""

    hidden_size: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    intermediate_size: int = 4096
    patch_size: int = 14
    image_size: int = 1540
    hidden_act: str = "silu"
    spatial_merge_size: int = 2


TINY_VISION = RandomVision(
    hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, image_size=168
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomModel:
    """Shape of a random checkpoint; defaults are what Mistral Small 4 has.

    Attributes:
        std: Standard deviation of all weights but the norms.
        dtype: "bfloat16" or "float32".
        vision: Makes it a checkpoint that takes images, with the config and the tensor names of
            the wrapper; None makes it the bare text model.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    expert_hidden_size: int
    std: float
    num_experts: int = 128
    num_experts_per_token: int = 4
    num_shared_experts: int = 1
    rope_factor: float = 128.0
    original_max_positions: int = 8192
    max_positions: int = 1_048_576
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"
    vision: RandomVision | None = None


TINY = RandomModel(
    vocab_size=1024,
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=32,
    expert_hidden_size=32,
    num_experts=16,
    std=0.08,
    dtype="float32",
)

# Mistral Small 4 itself.
SMALL_4 = RandomModel(
    vocab_size=131_072,
    hidden_size=4096,
    num_layers=36,
    num_heads=32,
    q_lora_rank=1024,
    kv_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=128,
    expert_hidden_size=2048,
    std=0.02,
    vision=RandomVision(),
)

# The benchmark's checkpoint: 898 M values, per-head geometry as in Mistral Small 4.
MID = RandomModel(
    vocab_size=32_768,
    hidden_size=1024,
    num_layers=8,
    num_heads=8,
    q_lora_rank=256,
    kv_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=128,
    expert_hidden_size=256,
    std=0.04,
)


def write_random_checkpoint(directory: Path, model: RandomModel, seed: int = 0) -> None:
    """Write config.json, generation_config.json and model.safetensors into a directory.

    transformers' `Mistral4ForCausalLM.from_pretrained` reads it too, and with a vision tower
    `Mistral3ForConditionalGeneration.from_pretrained`.

    Raises:
        ConfigError: The model's numbers contradict each other.
    """
    write_config(directory, model)
    scheme = TEXT_SCHEME if model.vision is None else WRAPPER_SCHEME
    tensors = scheme.expected(load_model_config(directory)).values()
    _write_tensors(directory / "model.safetensors", tensors, model, seed)


def write_random_head(
    directory: Path, model: RandomModel, config: ModelConfig, *, num_layers: int = 2, seed: int = 0
) -> None:
    """Write params.json and consolidated.safetensors of a draft head into a directory.

    Args:
        directory: Made if it is not there.
        model: The checkpoint that the head is for.
        config: The config that was written of it.
        num_layers: Of the head.
        seed: Same seed, same bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    head = replace(
        config,
        num_layers=num_layers,
        num_experts=0,
        num_experts_per_token=0,
        expert_hidden_size=_HEAD_MLP * config.hidden_size,
        num_shared_experts=1,
        vision=None,
    )
    layout = CheckpointLayout.MISTRAL
    _write_json(directory / layout.config_name, write_config_values(head, layout, None))
    tensors = HEAD_SCHEME.expected(head).values()
    _write_tensors(directory / f"{layout.weights_stem}.safetensors", tensors, model, seed)


def _write_tensors(
    path: Path, tensors: Collection[ExpectedTensor], model: RandomModel, seed: int
) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        dtype = _DTYPES[model.dtype]
        write_header(file, [TensorSpec(tensor.name, dtype, tensor.shape) for tensor in tensors])
        for tensor in tensors:
            for values in _values(tensor, model, seed):
                file.write(tensor_bytes(values))
    partial.replace(path)


def write_config(directory: Path, model: RandomModel) -> None:
    """Write config.json and generation_config.json only."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", _config_json(model))
    _write_json(directory / "generation_config.json", _TOKEN_IDS)


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="ascii")


def _config_json(model: RandomModel) -> dict[str, Any]:
    text = _text_json(model)
    if model.vision is None:
        return {"architectures": [TEXT_ARCHITECTURE], **text}
    return {
        "architectures": [WRAPPER_ARCHITECTURE],
        "model_type": "mistral3",
        "dtype": model.dtype,
        "tie_word_embeddings": model.tie_word_embeddings,
        "text_config": text,
        "vision_config": _vision_json(model.vision),
        "image_token_index": _IMAGE_TOKEN_ID,
        "spatial_merge_size": model.vision.spatial_merge_size,
        "vision_feature_layer": -1,
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
    }


def _vision_json(vision: RandomVision) -> dict[str, Any]:
    return {
        "model_type": "pixtral",
        "hidden_size": vision.hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "head_dim": vision.hidden_size // vision.num_heads,
        "intermediate_size": vision.intermediate_size,
        "patch_size": vision.patch_size,
        "image_size": vision.image_size,
        "num_channels": 3,
        "hidden_act": vision.hidden_act,
        "attention_dropout": 0.0,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},
    }


def _text_json(model: RandomModel) -> dict[str, Any]:
    qk_head_dim = model.qk_nope_head_dim + model.qk_rope_head_dim
    return {
        "model_type": "mistral4",
        "dtype": model.dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": 3 * model.hidden_size,
        "moe_intermediate_size": model.expert_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_heads,
        "n_routed_experts": model.num_experts,
        "n_shared_experts": model.num_shared_experts,
        "num_experts_per_tok": model.num_experts_per_token,
        "q_lora_rank": model.q_lora_rank,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_nope_head_dim": model.qk_nope_head_dim,
        "qk_rope_head_dim": model.qk_rope_head_dim,
        "qk_head_dim": qk_head_dim,
        "head_dim": qk_head_dim,
        "v_head_dim": model.v_head_dim,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": model.std,
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": 1e-6,
        "rope_interleave": True,
        "rope_parameters": _rope_json(model),
        "tie_word_embeddings": model.tie_word_embeddings,
        "use_cache": True,
        **_TOKEN_IDS,
    }


def _rope_json(model: RandomModel) -> dict[str, Any]:
    qk_head_dim = model.qk_nope_head_dim + model.qk_rope_head_dim
    return {
        "type": "yarn",
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": model.rope_factor,
        "original_max_position_embeddings": model.original_max_positions,
        "max_position_embeddings": model.max_positions,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
        "partial_rotary_factor": model.qk_rope_head_dim / qk_head_dim,
    }


def _values(tensor: ExpectedTensor, model: RandomModel, seed: int) -> Iterator[torch.Tensor]:
    """The tensor's values in order; stacked experts one by one."""
    dtype = _DTYPES[model.dtype]
    if len(tensor.shape) == 3:
        for index in range(tensor.shape[0]):
            yield _uniform(f"{seed}/{tensor.name}/{index}", tensor.shape[1:], model.std).to(dtype)
        return
    if len(tensor.shape) == 1:
        yield (1.0 + _uniform(f"{seed}/{tensor.name}/0", tensor.shape, _NORM_SPREAD)).to(dtype)
        return
    yield _uniform(f"{seed}/{tensor.name}/0", tensor.shape, model.std).to(dtype)


def _uniform(key: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
    """Zero-mean uniform float32 values made of 16 raw bits each."""
    count = math.prod(shape)
    digest = hashlib.blake2b(key.encode("ascii"), digest_size=16).digest()
    words = np.random.Philox(key=np.frombuffer(digest, "<u8")).random_raw((count + 3) // 4)
    bits = words.astype("<u8", copy=False).view("<i2")[:count]
    return torch.from_numpy(bits.astype(np.float32)).view(shape) * (std * math.sqrt(3.0) / 32768)
