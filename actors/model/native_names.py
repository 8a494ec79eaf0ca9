"""Mistral's own tensor names (`consolidated*.safetensors`), and which scheme a checkpoint follows.

A draft head has no embedding and no vocabulary matrix, which are the model's; the MLP of its layers
stands in the place of a shared expert.

The text model's values are those of the Hugging Face layout; the vision tower's queries and keys
lie in interleaved pairs instead of halves.
Source: vLLM's `mistral_large_3.py` and `pixtral.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from ostro.actors.errors import CheckpointError
from ostro.actors.model.weight_names import (
    COMMON_TABLE,
    HEAD_JOINT,
    SINGLE_EXPERTS,
    TEXT_SCHEME,
    TEXT_SINGLE_SCHEME,
    VISION_TABLE,
    WRAPPER_SCHEME,
    WRAPPER_SINGLE_SCHEME,
    NamingScheme,
    Role,
)
from ostro.configs.checkpoint_layout import CheckpointLayout

# Parameters whose rows native checkpoints order otherwise.
INTERLEAVED = ("vision_q", "vision_k")

_LAYER = "layers.{layer}."
_ATTENTION = _LAYER + "attention."
_SHARED = _LAYER + "shared_experts."
_EXPERT = _LAYER + "experts.{expert}."
_BLOCK = "vision_encoder.transformer.layers.{layer}."

_NATIVE_NAMES = {
    "embed": "tok_embeddings.weight",
    "final_norm": "norm.weight",
    "lm_head": "output.weight",
    "input_norm": _LAYER + "attention_norm.weight",
    "post_norm": _LAYER + "ffn_norm.weight",
    "q_a": _ATTENTION + "wq_a.weight",
    "q_a_norm": _ATTENTION + "q_a_norm.weight",
    "q_b": _ATTENTION + "wq_b.weight",
    "kv_a": _ATTENTION + "wkv_a_with_mqa.weight",
    "kv_a_norm": _ATTENTION + "kv_a_norm.weight",
    "kv_b": _ATTENTION + "wkv_b.weight",
    "o_proj": _ATTENTION + "wo.weight",
    "gate": _LAYER + "gate.weight",
    "shared_gate": _SHARED + "w1.weight",
    "shared_up": _SHARED + "w3.weight",
    "shared_down": _SHARED + "w2.weight",
    "expert_gate": _EXPERT + "w1.weight",
    "expert_up": _EXPERT + "w3.weight",
    "expert_down": _EXPERT + "w2.weight",
    "patch_conv": "vision_encoder.patch_conv.weight",
    "vision_pre_norm": "vision_encoder.ln_pre.weight",
    "vision_attention_norm": _BLOCK + "attention_norm.weight",
    "vision_q": _BLOCK + "attention.wq.weight",
    "vision_k": _BLOCK + "attention.wk.weight",
    "vision_v": _BLOCK + "attention.wv.weight",
    "vision_o": _BLOCK + "attention.wo.weight",
    "vision_mlp_norm": _BLOCK + "ffn_norm.weight",
    "vision_gate": _BLOCK + "feed_forward.w1.weight",
    "vision_up": _BLOCK + "feed_forward.w3.weight",
    "vision_down": _BLOCK + "feed_forward.w2.weight",
    "projector_norm": "pre_mm_projector_norm.weight",
    "projector_merge": "patch_merger.merging_layer.weight",
    "projector_in": "vision_language_adapter.w_in.weight",
    "projector_out": "vision_language_adapter.w_out.weight",
}

NATIVE_SCHEME = NamingScheme(
    layout=CheckpointLayout.MISTRAL,
    prefix="",
    unserved_prefixes=(
        "vision_encoder.",
        "pre_mm_projector_norm.",
        "patch_merger.",
        "vision_language_adapter.",
    ),
    table=tuple(
        replace(row, tensor=_NATIVE_NAMES[row.parameter]) for row in COMMON_TABLE + SINGLE_EXPERTS
    ),
    vision_table=tuple(replace(row, tensor=_NATIVE_NAMES[row.parameter]) for row in VISION_TABLE),
)

_HEAD_NAMES = {
    "shared_gate": _LAYER + "feed_forward.w1.weight",
    "shared_up": _LAYER + "feed_forward.w3.weight",
    "shared_down": _LAYER + "feed_forward.w2.weight",
}

HEAD_SCHEME = NamingScheme(
    layout=CheckpointLayout.MISTRAL,
    prefix="",
    unserved_prefixes=(),
    table=(
        HEAD_JOINT,
        *(
            replace(row, tensor=_HEAD_NAMES.get(row.parameter, row.tensor))
            for row in NATIVE_SCHEME.table
            if row.role is Role.ATTENTION and row.parameter not in ("embed", "lm_head", "gate")
        ),
    ),
    vision_table=(),
)


def choose_naming(names: Collection[str]) -> NamingScheme:
    """The scheme that a checkpoint's tensor names follow, told by the embedding and an expert.

    Raises:
        CheckpointError: No known scheme.
    """
    known = (
        (WRAPPER_SCHEME, WRAPPER_SINGLE_SCHEME),
        (TEXT_SCHEME, TEXT_SINGLE_SCHEME),
        (NATIVE_SCHEME, NATIVE_SCHEME),
    )
    for stacked, single in known:
        if stacked.tensor("embed") in names:
            first = single.tensor("expert_gate", 0, 0).removesuffix("weight")
            return single if any(name.startswith(first) for name in names) else stacked
    embeddings = [scheme.tensor("embed") for scheme, _ in known]
    raise CheckpointError(f"none of {embeddings} is among the {len(names)} tensors")
