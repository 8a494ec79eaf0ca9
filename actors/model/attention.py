"""Attention of one layer over the latent cache: projections, rotary, cache write, MLA, output.

Decode rows attend absorbed; a prefill span attends absorbed or expanded, whichever takes fewer
FLOPs. Both forms give the same result.

A cache of FP8 rows holds latents without their norm's weight, which the heads take up instead: so
their size is known, whatever the checkpoint (`kernels.latent_cache`).

Shape letters: T tokens, D hidden, H heads, Q = N + P query width (N nope, P rope), C latent,
J = P / 2 rotary pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ostro.actors.model.batch import Batch, PrefillSpan
from ostro.actors.model.latent_cache import LatentCache
from ostro.actors.model.weights import LayerWeights
from ostro.configs.model import ModelConfig
from ostro.kernels.latent_cache import FP8_ROWS
from ostro.kernels.latent_heads import LatentHeads, pack_heads, turn_queries_
from ostro.kernels.linear import linear
from ostro.kernels.mla_decode import mla_decode
from ostro.kernels.mla_prefill import absorbed_is_cheaper, mla_prefill
from ostro.kernels.mla_prologue import (
    PrologueInputs,
    PrologueNorms,
    mla_prologue,
    project_queries,
)
from ostro.kernels.rotary import (
    inverse_frequencies,
    llama4_query_scale,
    rotations,
    yarn_inverse_frequencies,
)


@dataclass(frozen=True, slots=True)
class PositionTerms:
    """What a micro-batch's positions do to queries and keys; the same in every layer.

    Attributes:
        turn_TJ: Rotations of the rope pairs.
        scale_T: Llama-4 scale in the model's dtype; None where it is 1 for every token.
    """

    turn_TJ: torch.Tensor
    scale_T: torch.Tensor | None


class Attention:
    """The attention half of every layer of one shard, without norm and residual around it."""

    def __init__(
        self, config: ModelConfig, layers: Sequence[LayerWeights], cache: LatentCache
    ) -> None:
        """`layers` are packed for `linear` already, where that is faster."""
        self._config = config
        self._layers = layers
        self._cache = cache
        self._dtype = layers[0].input_norm_D.dtype
        self._inv_freq_J = _frequencies(config).to(layers[0].input_norm_D.device)
        scale = config.softmax_scale()
        if cache.dtype == FP8_ROWS:
            for w in layers:
                _move_norm_to_heads_(w)
        self._heads = [pack_heads(LatentHeads(w.w_uk_HNC, w.w_uv_HVC, scale)) for w in layers]

    def position_terms(self, batch: Batch) -> PositionTerms:
        """Compute once per step what all layers share."""
        config = self._config
        factor = config.rope.cos_sin_factor()
        turn_TJ = rotations(batch.positions_T, self._inv_freq_J, factor)
        original = config.llama4_original_max_positions
        if batch.last_position < original or not config.llama4_beta:
            return PositionTerms(turn_TJ, None)
        scale_T = llama4_query_scale(batch.positions_T, config.llama4_beta, original)
        return PositionTerms(turn_TJ, scale_T.to(self._dtype))

    def forward(
        self, layer: int, x_TD: torch.Tensor, batch: Batch, terms: PositionTerms
    ) -> torch.Tensor:
        """Write the tokens' latents, attend, project; out_TD to be added to the residual."""
        q_THQ = self._project(layer, x_TD, batch, terms)
        out_THV = self._attend(layer, q_THQ, batch, terms)
        return linear(out_THV.flatten(1), self._layers[layer].o_proj)

    def store(self, layer: int, x_TD: torch.Tensor, batch: Batch, terms: PositionTerms) -> None:
        """Write the tokens' latents alone, where nobody asks what the tokens see."""
        mla_prologue(*self._project_down(layer, x_TD, batch, terms), self._layers[layer].q_b)

    def _project(
        self, layer: int, x_TD: torch.Tensor, batch: Batch, terms: PositionTerms
    ) -> torch.Tensor:
        """Write the tokens' latents; their queries, not yet turned."""
        inputs, config = self._project_down(layer, x_TD, batch, terms), self._config
        q_TX = project_queries(*inputs, self._layers[layer].q_b)
        return q_TX.view(-1, config.num_heads, config.qk_head_dim())

    def _project_down(
        self, layer: int, x_TD: torch.Tensor, batch: Batch, terms: PositionTerms
    ) -> PrologueInputs:
        """Compressed queries, latents and rope keys, with all that `mla_prologue` does to them."""
        w, config = self._layers[layer], self._config
        query_TX = linear(x_TD, w.q_a)
        if w.kv_a is None:
            query_TX, row_TW = query_TX.tensor_split([config.q_lora_rank], dim=1)
        else:
            row_TW = linear(x_TD, w.kv_a)
        norms = PrologueNorms(w.q_a_norm, w.kv_a_norm, config.rms_norm_eps)
        cache_NSW = self._cache.layers[layer]
        return query_TX, row_TW, norms, terms.turn_TJ, batch.slots_T, cache_NSW

    def _attend(
        self, layer: int, q_THQ: torch.Tensor, batch: Batch, terms: PositionTerms
    ) -> torch.Tensor:
        cache_NSW, heads = self._cache.layers[layer], self._heads[layer]
        if batch.decode_plan is not None and not batch.prefill_spans:
            return mla_decode(
                q_THQ, cache_NSW, batch.decode_plan, heads, terms.turn_TJ, terms.scale_T
            )
        turn_queries_(q_THQ, self._config.qk_nope_head_dim, terms.turn_TJ, terms.scale_T)
        out_THV = q_THQ.new_empty(*q_THQ.shape[:2], self._config.v_head_dim)
        if batch.decode_plan is not None:
            rows = batch.decode_rows
            out_THV[rows] = mla_decode(q_THQ[rows], cache_NSW, batch.decode_plan, heads)
        for span in batch.prefill_spans:
            out_THV[span.rows] = mla_prefill(
                q_THQ[span.rows],
                cache_NSW,
                span.pages_n,
                span.start,
                heads,
                absorbed=self._is_absorbed(span),
            )
        return out_THV

    def _is_absorbed(self, span: PrefillSpan) -> bool:
        config = self._config
        num_tokens = span.rows.stop - span.rows.start
        return absorbed_is_cheaper(
            num_tokens,
            span.start + num_tokens,
            nope=config.qk_nope_head_dim,
            rope=config.qk_rope_head_dim,
            value=config.v_head_dim,
            latent=config.kv_lora_rank,
        )


def _move_norm_to_heads_(weights: LayerWeights) -> None:
    """Leave latents at unit size, in place; the layer computes the same, also if called again."""
    weights.w_uk_HNC.mul_(weights.kv_a_norm)
    weights.w_uv_HVC.mul_(weights.kv_a_norm)
    weights.kv_a_norm.fill_(1.0)


def _frequencies(config: ModelConfig) -> torch.Tensor:
    rope, dim = config.rope, config.qk_rope_head_dim
    if rope.kind != "yarn":
        return inverse_frequencies(dim, rope.theta)
    return yarn_inverse_frequencies(
        dim,
        rope.theta,
        factor=rope.factor,
        original_max_positions=rope.original_max_positions,
        beta_fast=rope.beta_fast,
        beta_slow=rope.beta_slow,
    )
