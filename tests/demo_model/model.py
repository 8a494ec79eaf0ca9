"""The teaching model: `Mistral3ForConditionalGeneration` at toy size, and a fast CPU training path.

The classes are transformers' own. On CPU the routed experts run through numpy's matrix product,
expert by expert over sorted rows, and attention through torch's fused kernel on padded values;
together, with two single-threaded workers, a step takes two thirds of the time.

Shape letters: T tokens, K experts per token, R = T * K rows, E experts, D hidden, F expert hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizer import VOCAB_SIZE
from torch import nn
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Mistral4Config,
    PixtralVisionConfig,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NUM_EXPERTS, TOP_K, NUM_LAYERS = 128, 4, 4
HIDDEN, VISION_HIDDEN, CONTEXT = 128, 96, 4096


def teaching_config() -> Mistral3Config:
    """Every ratio that serving cares about as in Mistral Small 4; the sizes are a toy's."""
    text = Mistral4Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        moe_intermediate_size=32,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        n_shared_experts=1,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=CONTEXT,
        initializer_range=0.5 * HIDDEN**-0.5,
        rope_parameters={
            "type": "yarn",
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": CONTEXT // 4,
            "max_position_embeddings": CONTEXT,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    )
    vision = PixtralVisionConfig(
        hidden_size=VISION_HIDDEN,
        intermediate_size=2 * VISION_HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=224,
        patch_size=14,
        hidden_act="silu",
        rope_parameters={"rope_type": "axial", "rope_theta": 10000.0},
        initializer_range=0.5 * VISION_HIDDEN**-0.5,
    )
    return Mistral3Config(
        text_config=text,
        vision_config=vision,
        image_token_index=10,
        spatial_merge_size=2,
        vision_feature_layer=-1,
        multimodal_projector_bias=False,
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )


def use_plain_softmax_scale(model: Mistral3ForConditionalGeneration) -> None:
    """Undo the extra YaRN factor that transformers >= 5.15 puts on Mistral 4's softmax scale."""
    for layer in model.model.language_model.layers:
        layer.self_attn.scaling = layer.self_attn.qk_head_dim**-0.5


@dataclass(slots=True)
class RouterWatch:
    """What the routers did since the last `clear`, layer after layer.

    Attributes:
        balance: E * sum of (share of rows) * (mean probability); 1 when even.
        z: Mean squared log-sum-exp of the logits.
        load: Rows per expert.
        counted: Which tokens to count; None counts all, padding too.
    """

    counted: torch.Tensor | None = None
    balance: list[torch.Tensor] = field(default_factory=list)
    z: list[torch.Tensor] = field(default_factory=list)
    load: list[torch.Tensor] = field(default_factory=list)

    def clear(self) -> None:
        """Forget all."""
        self.balance, self.z, self.load = [], [], []

    def watch(self, _module: nn.Module, _inputs: Any, outputs: Any) -> None:
        """The hook: (logits, weights, indices) of one router."""
        logits, _, chosen_TK = outputs
        if self.counted is not None:
            logits, chosen_TK = logits[self.counted], chosen_TK[self.counted]
        load_E = torch.bincount(chosen_TK.reshape(-1), minlength=logits.shape[-1]).float()
        share_E = load_E / load_E.sum()
        self.load.append(load_E)
        self.balance.append(len(load_E) * (share_E * logits.softmax(-1).mean(0)).sum())
        self.z.append(logits.logsumexp(-1).square().mean())


def build_model(seed: int) -> tuple[Mistral3ForConditionalGeneration, RouterWatch]:
    """A fresh model in float32 and the watch on its routers."""
    torch.manual_seed(seed)
    config = teaching_config()
    config._attn_implementation = "sdpa"
    model = Mistral3ForConditionalGeneration(config)
    _make_fast(model)
    watch = RouterWatch()
    for layer in model.model.language_model.layers:
        layer.mlp.gate.register_forward_hook(watch.watch)
    return model, watch


def load_model(directory: Path) -> Mistral3ForConditionalGeneration:
    """The exported model in float32, frozen."""
    model = Mistral3ForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa"
    )
    _make_fast(model)
    return model.eval().requires_grad_(False)


def _make_fast(model: Mistral3ForConditionalGeneration) -> None:
    """Mistral Small 4's softmax scale, and the fastest experts and attention of this machine."""
    use_plain_softmax_scale(model)
    language_model = model.model.language_model
    if torch.cuda.is_available():
        language_model.set_experts_implementation("grouped_mm")
    else:
        language_model.set_experts_implementation(_NAME)
        language_model.config._attn_implementation = _NAME


def group_of(name: str) -> str:
    """The part of the model that a parameter belongs to, for counting."""
    marks = {
        "vision": "vision",
        "projector": "vision",
        ".experts.": "routed experts",
        "shared_experts": "shared experts",
        "mlp.gate": "routers",
        "self_attn": "attention",
        "embed": "embedding and head",
        "lm_head": "embedding and head",
    }
    return next((group for mark, group in marks.items() if mark in name), "norms")


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters by `group_of`."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        counts[group_of(name)] = counts.get(group_of(name), 0) + parameter.numel()
    return counts


class _Experts(torch.autograd.Function):
    """SwiGLU experts over rows sorted by expert; ends_E[e] is where expert e's rows end."""

    @staticmethod
    def forward(ctx: Any, x_RD: Any, gate_up: Any, down: Any, ends_E: list[int]) -> torch.Tensor:
        h = _products(x_RD, gate_up.mT, ends_E)
        gate, up = h.chunk(2, -1)
        act = torch.nn.functional.silu(gate) * up
        ctx.save_for_backward(x_RD, gate_up, down, h, act)
        ctx.ends_E = ends_E
        return _products(act, down.mT, ends_E)

    @staticmethod
    def backward(ctx: Any, grad_RD: Any) -> tuple[Any, ...]:  # type: ignore[override]
        x_RD, gate_up, down, h, act = ctx.saved_tensors
        gate, up = h.chunk(2, -1)
        grad_RD = grad_RD.contiguous()
        grad_act = _products(grad_RD, down, ctx.ends_E)
        sigmoid = torch.sigmoid(gate)
        grad_h = torch.empty_like(h)
        grad_gate, grad_up = grad_h.chunk(2, -1)
        torch.mul(grad_act * up, sigmoid * (1 + gate * (1 - sigmoid)), out=grad_gate)
        torch.mul(grad_act, gate * sigmoid, out=grad_up)
        return (
            _products(grad_h, gate_up, ctx.ends_E),
            _weight_grads(grad_h, x_RD, ctx.ends_E, gate_up.shape),
            _weight_grads(grad_RD, act, ctx.ends_E, down.shape),
            None,
        )


def _products(rows: torch.Tensor, weight: torch.Tensor, ends_E: list[int]) -> torch.Tensor:
    """rows[start:end] @ weight[e] for each expert."""
    out = rows.new_empty(len(rows), weight.shape[-1])
    a, w, o = rows.detach().numpy(), weight.detach().numpy(), out.numpy()
    start = 0
    for expert, end in enumerate(ends_E):
        if end > start:
            np.matmul(a[start:end], w[expert], out=o[start:end])
        start = end
    return out


def _weight_grads(
    left: torch.Tensor, right: torch.Tensor, ends_E: list[int], shape: torch.Size
) -> torch.Tensor:
    """left[start:end].T @ right[start:end] for each expert."""
    out = left.new_zeros(shape)
    a, b, o = left.numpy(), right.detach().numpy(), out.numpy()
    start = 0
    for expert, end in enumerate(ends_E):
        if end > start:
            np.matmul(a[start:end].T, b[start:end], out=o[expert])
        start = end
    return out


def _sorted_experts(
    self: nn.Module, hidden_TD: torch.Tensor, chosen_TK: torch.Tensor, weight_TK: torch.Tensor
) -> torch.Tensor:
    num_tokens, top_k = chosen_TK.shape
    flat_R = chosen_TK.reshape(-1)
    order_R = torch.argsort(flat_R, stable=True)
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(len(order_R))
    ends_E = torch.bincount(flat_R, minlength=self.gate_up_proj.shape[0]).cumsum(0).tolist()
    x_RD = hidden_TD.index_select(0, order_R // top_k)
    y_RD = _Experts.apply(x_RD, self.gate_up_proj, self.down_proj, ends_E)
    y_TKD = y_RD.index_select(0, place_R).view(num_tokens, top_k, -1)
    return torch.bmm(weight_TK.unsqueeze(1), y_TKD).squeeze(1)


def _padded_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Torch's fused attention, which wants values as wide as keys, over padded values."""
    width = value.shape[-1]
    value = torch.nn.functional.pad(value, (0, key.shape[-1] - width))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attention_mask, is_causal=attention_mask is None, scale=scaling
    )
    return out[..., :width].transpose(1, 2).contiguous(), None


_NAME = "teaching_cpu"
ALL_EXPERTS_FUNCTIONS.register(_NAME, _sorted_experts)
ALL_ATTENTION_FUNCTIONS.register(_NAME, _padded_attention)
