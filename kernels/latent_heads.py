"""How one layer's heads read latents: queries into latent space, weighted latents to values.

    q_latent[h] = q_nope[h] Wuk[h];   out[h] = weighted latents[h] Wuv[h]^T

Shape legend: T queries, H heads, Q = N + P query width (N nope, P rope), V value
width, C latent, W = C + P.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ostro.kernels.linear import is_packed, pack_linear
from ostro.kernels.rotary import rotary_

_LATENTS_AT_ONCE = 32  # of the CPU operator


@dataclass(frozen=True, slots=True)
class LatentHeads:
    """How one layer's heads read latents.

    Attributes:
        w_uk_HNC: Keys' half of kv_b: nope query to latent, or latent to nope key.
        w_uv_HVC: Values' half of kv_b: latent to value.
        scale: Softmax scale.
        packed: The same for the CPU operators, where they serve; see `pack_heads`.
    """

    w_uk_HNC: torch.Tensor
    w_uv_HVC: torch.Tensor
    scale: float
    packed: PackedHeads | None = None

    def some(self, heads: slice) -> LatentHeads:
        """Views of some of the heads."""
        packed = self.packed
        if packed is not None:
            packed = PackedHeads(
                packed.absorb_H[heads], packed.keys_H[heads], packed.values_H[heads]
            )
        return LatentHeads(self.w_uk_HNC[heads], self.w_uv_HVC[heads], self.scale, packed)


@dataclass(frozen=True, slots=True)
class PackedHeads:
    """Packed weights of one layer's heads, stacked.

    Attributes:
        absorb_H: Nope queries to latents, each head's [C, N] packed.
        keys_H: Latents to nope keys, each head's [N, C] packed.
        values_H: Latents to values, each head's [V, C] packed.
    """

    absorb_H: torch.Tensor
    keys_H: torch.Tensor
    values_H: torch.Tensor


def pack_heads(heads: LatentHeads) -> LatentHeads:
    """With packed weights beside the plain ones, if the CPU operators take this dtype and shape."""
    if heads.w_uk_HNC.shape[2] % _LATENTS_AT_ONCE:
        return heads
    absorb_H = pack_linear(heads.w_uk_HNC.transpose(1, 2))
    keys_H, values_H = pack_linear(heads.w_uk_HNC), pack_linear(heads.w_uv_HVC)
    if not all(map(is_packed, (absorb_H, keys_H, values_H))):
        return heads
    return replace(heads, packed=PackedHeads(absorb_H, keys_H, values_H))


def turn_queries_(
    q_THQ: torch.Tensor, nope: int, turn_TJ: torch.Tensor | None, scale_T: torch.Tensor | None
) -> None:
    """Turn the rope part and apply the llama-4 scale, in place; None leaves either out."""
    if turn_TJ is not None:
        rotary_(q_THQ[..., nope:], turn_TJ)
    if scale_T is not None:
        q_THQ.mul_(scale_T.to(q_THQ.dtype)[:, None, None])


def absorb_queries(q_THQ: torch.Tensor, w_uk_HNC: torch.Tensor) -> torch.Tensor:
    """Queries [T, H, C + P] that meet cached rows directly: q_nope Wuk, then q_rope as it is."""
    num_tokens, num_heads, query_width = q_THQ.shape
    nope, latent_width = w_uk_HNC.shape[1:]
    q_THW = q_THQ.new_empty(num_tokens, num_heads, latent_width + query_width - nope)
    latent_HTC = torch.bmm(q_THQ[..., :nope].transpose(0, 1), w_uk_HNC)
    q_THW[..., :latent_width] = latent_HTC.transpose(0, 1)
    q_THW[..., latent_width:] = q_THQ[..., nope:]
    return q_THW


def expand_values(out_THC: torch.Tensor, w_uv_HVC: torch.Tensor) -> torch.Tensor:
    """Weighted latents to weighted values, [T, H, V]."""
    return torch.bmm(out_THC.transpose(0, 1), w_uv_HVC.transpose(1, 2)).transpose(0, 1)


def expand_values_reference(out_THC: torch.Tensor, w_uv_HVC: torch.Tensor) -> torch.Tensor:
    """Meaning of `expand_values` in float32."""
    value_THV = torch.einsum("thc,hvc->thv", out_THC.float(), w_uv_HVC.float())
    return value_THV.to(out_THC.dtype)
