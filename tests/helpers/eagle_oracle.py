"""A draft head in plain torch, written from the description of the official one alone.

Reads the files itself and keeps no cache: every call computes all positions anew, in float32.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


class EagleOracle:
    """The head in a directory, over a model's embedding and vocabulary matrix."""

    def __init__(self, directory: Path, embed_VD: torch.Tensor, lm_head_VD: torch.Tensor) -> None:
        self._params = json.loads((directory / "params.json").read_text())
        self._tensors = {
            name: _value(name, tensors)
            for tensors in [load_file(directory / "consolidated.safetensors")]
            for name in tensors
            if not name.endswith(("qscale_weight", "qscale_act"))
        }
        self._embed_VD, self._lm_head_VD = embed_VD.float(), lm_head_VD.float()

    def embed(self, tokens: list[int]) -> torch.Tensor:
        return self._embed_VD[torch.tensor(tokens, dtype=torch.int64)]

    def logits(self, states_TD: torch.Tensor) -> torch.Tensor:
        return states_TD @ self._lm_head_VD.T

    def states(
        self, next_embedded_TD: torch.Tensor, hidden_TD: torch.Tensor, position_offset: int = 0
    ) -> torch.Tensor:
        """G of every position, given H of each and the embedding of the token after it."""
        get, params = self._tensors.__getitem__, self._params
        x = torch.cat((next_embedded_TD, hidden_TD), dim=1) @ get("eagle_linear.weight").T
        positions = torch.arange(len(x)) + position_offset
        for layer in range(params["n_layers"]):
            name = f"layers.{layer}."
            normed = self._norm(x, name + "attention_norm.weight")
            x = x + self._attention(normed, positions, name + "attention.")
            normed = self._norm(x, name + "ffn_norm.weight")
            gate = normed @ get(name + "feed_forward.w1.weight").T
            up = normed @ get(name + "feed_forward.w3.weight").T
            swiglu = gate * torch.sigmoid(gate) * up
            x = x + swiglu @ get(name + "feed_forward.w2.weight").T
        return self._norm(x, "norm.weight")

    def drafts(
        self, next_embedded_TD: torch.Tensor, hidden_TD: torch.Tensor, num_drafts: int
    ) -> list[int]:
        """Greedy drafts after the last position: each goes back in with the head's own state."""
        chosen: list[int] = []
        for _ in range(num_drafts):
            states_TD = self.states(next_embedded_TD, hidden_TD)
            chosen.append(int(self.logits(states_TD[-1:]).argmax()))
            next_embedded_TD = torch.cat((next_embedded_TD, self.embed(chosen[-1:])))
            hidden_TD = torch.cat((hidden_TD, states_TD[-1:]))
        return chosen

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        x = x * (x.pow(2).mean(-1, keepdim=True) + self._params["norm_eps"]).rsqrt()
        return x * self._tensors[name]

    def _attention(self, x: torch.Tensor, positions: torch.Tensor, name: str) -> torch.Tensor:
        get, params = self._tensors.__getitem__, self._params
        heads, rope = params["n_heads"], params["qk_rope_head_dim"]
        nope, value, latent = (
            params["qk_nope_head_dim"],
            params["v_head_dim"],
            params["kv_lora_rank"],
        )
        query = self._norm(x @ get(name + "wq_a.weight").T, name + "q_a_norm.weight")
        query = (query @ get(name + "wq_b.weight").T).view(len(x), heads, nope + rope)
        compressed, rope_key = (x @ get(name + "wkv_a_with_mqa.weight").T).split([latent, rope], -1)
        compressed = self._norm(compressed, name + "kv_a_norm.weight")
        angles = positions[:, None] * self._frequencies()
        rope_key = _rotate(rope_key, angles)
        query = torch.cat(
            (query[..., :nope], _rotate(query[..., nope:], angles[:, None])), dim=-1
        ) * self._llama4_scale(positions)
        both = (compressed @ get(name + "wkv_b.weight").T).view(len(x), heads, nope + value)
        keys = torch.cat((both[..., :nope], rope_key[:, None].expand(-1, heads, -1)), dim=-1)
        scores = torch.einsum("qhd,khd->hqk", query, keys) * (nope + rope) ** -0.5
        scores = scores.masked_fill(positions[:, None] < positions, -math.inf)
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), both[..., nope:])
        return out.flatten(1) @ get(name + "wo.weight").T

    def _frequencies(self) -> torch.Tensor:
        params, yarn = self._params, self._params["yarn"]
        dim, theta = params["qk_rope_head_dim"], params["rope_theta"]
        plain = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)

        def turning(rotations: float) -> float:
            reach = yarn["original_max_position_embeddings"] / (rotations * 2 * math.pi)
            return dim * math.log(reach) / (2 * math.log(theta))

        low, high = math.floor(turning(yarn["beta"])), math.ceil(turning(yarn["alpha"]))
        low, high = max(low, 0), min(high, dim - 1)
        ramp = ((torch.arange(dim // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
        return (plain * (1 - ramp) + plain / yarn["factor"] * ramp).float()

    def _llama4_scale(self, positions: torch.Tensor) -> torch.Tensor:
        scaling: dict[str, Any] = self._params["llama_4_scaling"]
        original = scaling["original_max_position_embeddings"]
        return (1 + scaling["beta"] * torch.log1p(positions // original))[:, None, None]


def _rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (2i, 2i + 1)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def _value(name: str, tensors: Tensors) -> torch.Tensor:
    scale = tensors.get(name.removesuffix("weight") + "qscale_weight")
    value = tensors[name].float()
    return value if scale is None else value * scale.float()


def write_fp8_head(source: Path, target: Path, input_scale: float = 0.02) -> Path:
    """A plain head rounded as the official one is, static FP8 with one scale for each weight."""
    target.mkdir(parents=True)
    tensors: Tensors = {}
    for name, weight in load_file(source / "consolidated.safetensors").items():
        if weight.dim() < 2:
            tensors[name] = weight.to(torch.bfloat16)
            continue
        module = name.removesuffix("weight")
        scale = (weight.float().abs().max() / 448).to(torch.bfloat16)
        scaled = (weight.float() / scale.float()).clamp(-448, 448)
        tensors[name] = scaled.to(torch.float8_e4m3fn).contiguous()
        tensors[module + "qscale_weight"] = scale
        tensors[module + "qscale_act"] = torch.tensor(input_scale, dtype=torch.bfloat16)
    save_file(tensors, target / "consolidated.safetensors", metadata={"format": "pt"})
    params = json.loads((source / "params.json").read_text())
    params["quantization"] = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    (target / "params.json").write_text(json.dumps(params))
    return target
