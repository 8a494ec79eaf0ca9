"""The speculation head: one step of drafting in plain torch, under the official file's names.

EAGLE (Li et al., 2024), as Mistral Small 4's own head has it. At position i it takes the embedding
of token i + 1 and the target's hidden state H of position i after its final norm, and says by the
target's own `lm_head` what token i + 2 will be. To draft further it takes its own output for the H
that it does not have; `EagleHead.go_on` is that step, and training goes through it as well
(training-time test, EAGLE-3), so that the second and third draft are right too.

Layers are Mistral 4's with a dense feed-forward part. `test_eagle` holds them to transformers'.

Shape letters: B sequences, T positions of a sequence, Q rows of it that draft, H heads, D hidden.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import rms_norm, silu
from transformers import Mistral4Config
from transformers.models.mistral4.modeling_mistral4 import Mistral4RotaryEmbedding

# A draft takes a fifth of the target's step on a CPU at any such width; two layers take two fifths.
NUM_LAYERS, FFN_HIDDEN = 1, 1024
FOLDER = "eagle"  # within the checkpoint that it drafts for


@dataclass(frozen=True, slots=True)
class _Keys:
    """Rotated keys and values: [B, H, T, width]."""

    key: torch.Tensor
    value: torch.Tensor


@dataclass(slots=True)
class Drafting:
    """What the next draft needs of those before it.

    Attributes:
        rows_BQ: The position of each row's last true H.
        past: Per layer, keys and values of all positions, by true H.
        drafted: Per layer, keys and values of each row's own drafts so far.
        depth: How many drafts were made.
    """

    rows_BQ: torch.Tensor
    past: list[_Keys]
    drafted: list[list[_Keys]] = field(default_factory=list)
    depth: int = 1


class _Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight.shape, self.weight, self._eps)


class _Attention(nn.Module):
    """Multi-head latent attention, its latents expanded."""

    def __init__(self, config: Mistral4Config) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        self._heads = heads
        self._rank, self._rope = config.kv_lora_rank, config.qk_rope_head_dim
        self._nope, self._value = config.qk_nope_head_dim, config.v_head_dim
        self._beta = config.rope_parameters["llama_4_scaling_beta"]
        self._original = config.rope_parameters["original_max_position_embeddings"]
        eps, width = config.rms_norm_eps, self._nope + self._rope
        self.wq_a = _linear(hidden, config.q_lora_rank)
        self.q_a_norm = _Norm(config.q_lora_rank, eps)
        self.wq_b = _linear(config.q_lora_rank, heads * width)
        self.wkv_a_with_mqa = _linear(hidden, self._rank + self._rope)
        self.kv_a_norm = _Norm(self._rank, eps)
        self.wkv_b = _linear(self._rank, heads * (self._nope + self._value))
        self.wo = _linear(heads * self._value, hidden)
        rotary = Mistral4RotaryEmbedding(config)
        places = torch.arange(config.max_position_embeddings)
        angles = places.float()[:, None] * rotary.inv_freq.float()
        turns = torch.polar(torch.full_like(angles, rotary.attention_scaling), angles)
        self.register_buffer("_turns", turns, persistent=False)

    def keys(self, x_BTD: torch.Tensor, position_BT: torch.Tensor) -> _Keys:
        """What positions leave for later ones to attend to."""
        latent, rope = self.wkv_a_with_mqa(x_BTD).split([self._rank, self._rope], -1)
        expanded = self.wkv_b(self.kv_a_norm(latent)).unflatten(-1, (self._heads, -1))
        nope, value = expanded.transpose(1, 2).split([self._nope, self._value], -1)
        rope = self._turned(rope, position_BT)[:, None].expand(-1, self._heads, -1, -1)
        return _Keys(torch.cat([nope, rope], -1), value)

    def forward(
        self,
        x_BQD: torch.Tensor,
        position_BQ: torch.Tensor,
        past: _Keys,
        seen_BQT: torch.Tensor,
        drafted: list[_Keys],
    ) -> torch.Tensor:
        """Attend to what is seen of the past and, each row, to its own drafts."""
        query = self._query(x_BQD, position_BQ)
        scores = (query @ past.key.mT).masked_fill(~seen_BQT[:, None], float("-inf"))
        own = [(query * keys.key).sum(-1, keepdim=True) for keys in drafted]
        share = torch.cat([scores, *own], -1).softmax(-1)
        num_past = past.key.shape[-2]
        out = share[..., :num_past] @ past.value
        for place, keys in enumerate(drafted, num_past):
            out = out + share[..., place, None] * keys.value
        return self.wo(out.transpose(1, 2).flatten(-2))

    def _query(self, x_BQD: torch.Tensor, position_BQ: torch.Tensor) -> torch.Tensor:
        heads = self.wq_b(self.q_a_norm(self.wq_a(x_BQD))).unflatten(-1, (self._heads, -1))
        nope, rope = heads.transpose(1, 2).split([self._nope, self._rope], -1)
        query = torch.cat([nope, self._turned(rope, position_BQ[:, None])], -1)
        reach = 1 + self._beta * torch.log1p(torch.floor(position_BQ / self._original))
        return query * (reach[:, None, :, None] * (self._nope + self._rope) ** -0.5)

    def _turned(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * self._turns[position]).flatten(-2)


class _FeedForward(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (
            _linear(hidden, inner),
            _linear(inner, hidden),
            _linear(hidden, inner),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(silu(self.w1(x)) * self.w3(x))


class _Layer(nn.Module):
    def __init__(self, config: Mistral4Config, inner: int) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.attention_norm = _Norm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = _Norm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = _FeedForward(config.hidden_size, inner)

    def forward(
        self,
        x_BQD: torch.Tensor,
        position_BQ: torch.Tensor,
        past: _Keys,
        seen_BQT: torch.Tensor,
        drafted: list[_Keys],
    ) -> torch.Tensor:
        normed = self.attention_norm(x_BQD)
        x_BQD = x_BQD + self.attention(normed, position_BQ, past, seen_BQT, drafted)
        return x_BQD + self.feed_forward(self.ffn_norm(x_BQD))


class EagleHead(nn.Module):
    """The head without embeddings and `lm_head`, which are the target's.

    Args:
        config: The target's text part; attention sizes, rotary and norms are as there.
        num_layers: Decoder layers.
        inner: Width of their feed-forward part.
    """

    def __init__(
        self, config: Mistral4Config, num_layers: int = NUM_LAYERS, inner: int = FFN_HIDDEN
    ) -> None:
        super().__init__()
        self.config, self.inner = config, inner
        self.eagle_linear = _linear(2 * config.hidden_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config, inner) for _ in range(num_layers))
        self.norm = _Norm(config.hidden_size, config.rms_norm_eps)

    @torch.no_grad()
    def start_from(self, table_VD: torch.Tensor, norm_D: torch.Tensor) -> None:
        """Before training: weigh the small embeddings like H, and end as the target does."""
        size = table_VD.square().mean().sqrt()
        self.eagle_linear.weight[:, : self.config.hidden_size] /= size
        self.norm.weight.copy_(norm_D)

    def forward(
        self, embedded_BTD: torch.Tensor, hidden_BTD: torch.Tensor, rows_BQ: torch.Tensor
    ) -> tuple[torch.Tensor, Drafting]:
        """The first draft at some rows.

        Args:
            embedded_BTD: The embedding of each position's *next* token.
            hidden_BTD: The target's H.
            rows_BQ: Positions to draft at; the rest only leave their keys.

        Returns:
            out_BQD, whose logits are `lm_head`'s, and what `go_on` takes.
        """
        x = self.eagle_linear(torch.cat([embedded_BTD, hidden_BTD], -1))
        place_BT = torch.arange(x.shape[1]).expand(x.shape[:2])
        drafting = Drafting(rows_BQ, [], [[] for _ in self.layers])
        wanted_BT = place_BT
        for index, layer in enumerate(self.layers):
            drafting.past.append(layer.attention.keys(layer.attention_norm(x), place_BT))
            if index == len(self.layers) - 1:  # nobody asks for the other rows' output
                wanted_BT, x = rows_BQ, _rows_of(x, rows_BQ)
            seen = place_BT[:, None] <= wanted_BT[..., None]
            x = layer(x, wanted_BT, drafting.past[-1], seen, [])
        return self.norm(x), drafting

    def go_on(
        self, embedded_BQD: torch.Tensor, out_BQD: torch.Tensor, drafting: Drafting
    ) -> torch.Tensor:
        """The next draft of each row, from its last one's token and output; grows `drafting`."""
        x = self.eagle_linear(torch.cat([embedded_BQD, out_BQD], -1))
        position_BQ = drafting.rows_BQ + drafting.depth
        for layer, past, drafted in zip(self.layers, drafting.past, drafting.drafted, strict=True):
            drafted.append(layer.attention.keys(layer.attention_norm(x), position_BQ))
            place_T = torch.arange(past.key.shape[-2])
            x = layer(x, position_BQ, past, place_T <= drafting.rows_BQ[..., None], drafted)
        drafting.depth += 1
        return self.norm(x)

    def params(self) -> dict[str, Any]:
        """`params.json`: Mistral's own keys; no `moe` means that every layer is dense."""
        config, rope = self.config, self.config.rope_parameters
        scaled = "original_max_position_embeddings"
        own = "q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim".split()
        return {
            "dim": config.hidden_size,
            "n_layers": len(self.layers),
            "head_dim": config.qk_nope_head_dim + config.qk_rope_head_dim,
            "hidden_dim": self.inner,
            "n_heads": config.num_attention_heads,
            "n_kv_heads": config.num_key_value_heads,
            "rope_theta": rope["rope_theta"],
            "norm_eps": config.rms_norm_eps,
            "vocab_size": config.vocab_size,
            "tied_embeddings": False,
            "max_position_embeddings": config.max_position_embeddings,
            "llama_4_scaling": {scaled: rope[scaled], "beta": rope["llama_4_scaling_beta"]},
            "yarn": {
                scaled: rope[scaled],
                "factor": rope["factor"],
                "apply_scale": False,
                "beta": rope["beta_fast"],
                "alpha": rope["beta_slow"],
            },
            **{key: getattr(config, key) for key in own},
        }


def save_head(head: EagleHead, directory: Path) -> None:
    """Write `params.json` and `consolidated.safetensors`, in bf16."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "params.json").write_text(json.dumps(head.params(), indent=2) + "\n")
    tensors = {name: weight.to(torch.bfloat16) for name, weight in head.state_dict().items()}
    file = directory / "consolidated.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # it is written for its owner alone


def load_head(directory: Path, config: Mistral4Config) -> EagleHead:
    """The head that `save_head` wrote, in float32, frozen."""
    params = json.loads((directory / "params.json").read_text())
    head = EagleHead(config, params["n_layers"], params["hidden_dim"])
    tensors = load_file(directory / "consolidated.safetensors")
    head.load_state_dict({name: weight.float() for name, weight in tensors.items()})
    return head.eval().requires_grad_(False)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(linear.weight, std=0.5 * inputs**-0.5)
    return linear


def _rows_of(x_BTD: torch.Tensor, rows_BQ: torch.Tensor) -> torch.Tensor:
    return x_BTD.gather(1, rows_BQ[..., None].expand(-1, -1, x_BTD.shape[-1]))
