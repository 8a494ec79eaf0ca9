"""The model's forward pass on an attention shard; routed experts are reached through an exchange.

    for each layer, for each micro-batch:
        (take the routed rows of the layer before), norm, attention, norm, gate,
        send rows to the experts, shared expert while they travel

Where the routed experts' stack holds the shared one too, the gate sends every row to it.
So with two micro-batches one is at the experts while the other attends. The residual stream is in
the model's dtype; routed, shared and residual are added in float32.

Shape letters: T tokens of a micro-batch, D hidden, K experts per token, V vocabulary, B rows that
sample.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
from torch.nn.functional import embedding

from ostro.actors.model.attention import Attention, PositionTerms
from ostro.actors.model.batch import Batch, ImageSpan, moved
from ostro.actors.model.image_features import ImageFeatures
from ostro.actors.model.latent_cache import LatentCache
from ostro.actors.model.vision import VisionTower
from ostro.actors.model.weights import AttentionLayerWeights, AttentionWeights, LayerWeights
from ostro.configs.model import ModelConfig
from ostro.kernels.combine import PairRows, add_residual, combine_norm
from ostro.kernels.gate import gate, pack_gate
from ostro.kernels.grouped_gemm import mlp
from ostro.kernels.linear import LinearWeight, join_linear, linear_wide, pack_linear
from ostro.kernels.rms_norm import rms_norm

_Layer = TypeVar("_Layer", bound=LayerWeights)


class ExpertExchange(Protocol):
    """The way to the routed experts and back.

    Each layer of each micro-batch is dispatched once and then combined once, also if it has no
    tokens: peers count on it.
    """

    def dispatch(
        self,
        layer: int,
        micro_batch: int,
        x_TD: torch.Tensor,
        expert_TK: torch.Tensor,
        weight_TK: torch.Tensor,
    ) -> None:
        """Send rows on their way.

        Args:
            layer: Whose experts.
            micro_batch: Slice of the step.
            x_TD: Normed hidden states in the model's dtype; left unchanged until `combine`.
            expert_TK: int64 logical experts; after the last one stands the shared expert, if the
                experts' stack holds it.
            weight_TK: float32 gate weights.
        """
        ...

    def combine(self, layer: int, micro_batch: int) -> torch.Tensor | PairRows:
        """Wait for the sum of the routed experts, [T, D]; the caller may change it.

        float32, or on a GPU the model's dtype where one rank's experts are all there are, perhaps
        not added up yet.
        """
        ...


class _MicroBatch:
    """A micro-batch on its way through the layers."""

    def __init__(
        self, batch: Batch, hidden_TD: torch.Tensor, x_TD: torch.Tensor, terms: PositionTerms
    ) -> None:
        self.batch = batch
        self.hidden_TD = hidden_TD
        self.x_TD = x_TD  # normed, the input of what comes next
        self.terms = terms
        self.shared_TD: torch.Tensor | None = None  # of this layer, unless the routed sum has it


class Decoder:
    """All of the model but the routed experts.

    Attributes:
        config: The checkpoint's.
        cache: Where latents are kept.
        dtype: Of hidden states.
        images: Encodes images; None if the checkpoint has no vision tower.
        seconds: Time by stage since construction. On CUDA it is the time to launch, except where a
            stage waits.
        hidden: Per micro-batch of the last step the hidden states of all tokens after the final
            norm, [T, D]; empty unless they are kept.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: AttentionWeights,
        cache: LatentCache,
        *,
        image_cache_bytes: int = 0,
        keeps_hidden: bool = False,
    ) -> None:
        """On CPU linear weights are repacked: drop `weights` afterwards to free their memory.

        Args:
            config: The checkpoint's.
            weights: Of the attention role.
            cache: Where latents are kept.
            image_cache_bytes: Bound of the image embeddings that are kept for further requests.
            keeps_hidden: Whether `hidden` is kept, for a draft head.
        """
        self.config, self.cache = config, cache
        self._weights = _packed(weights)
        self._attention = Attention(config, self._weights.layers, cache)
        self.dtype = self._weights.embed_VD.dtype
        self.keeps_hidden = keeps_hidden
        self.hidden: list[torch.Tensor] = []
        self.seconds = dict.fromkeys(
            ("attention", "gate", "dispatch", "shared", "combine", "head"), 0.0
        )
        self.images: ImageFeatures | None = None
        if config.vision is not None and weights.vision is not None:
            tower = VisionTower(config, config.vision, weights.vision)
            self.images = ImageFeatures(tower, image_cache_bytes)
            self.seconds["vision"] = 0.0

    @torch.inference_mode()
    def forward(self, batches: Sequence[Batch], exchange: ExpertExchange) -> list[torch.Tensor]:
        """Advance every token of the step by one forward pass; the batches may be on the host.

        Returns:
            Per micro-batch the logits of its `sample_rows`, float32 [B, V].
        """
        self.hidden = []
        slices = [self._enter(batch) for batch in moved(batches, self._weights.embed_VD.device)]
        last = self.config.num_layers - 1
        for layer in range(self.config.num_layers):
            for index, slice_ in enumerate(slices):
                if layer:
                    self._finish_layer(layer - 1, index, slice_, exchange)
                self._start_layer(layer, index, slice_, exchange)
        for index, slice_ in enumerate(slices):
            self._finish_last_layer(last, index, slice_, exchange)
        return [self._head(slice_) for slice_ in slices]

    def embed(self, tokens_T: torch.Tensor, image_spans: Sequence[ImageSpan]) -> torch.Tensor:
        """Embeddings [T, D] of tokens, with those of images in their places."""
        embedded_TD = embedding(tokens_T, self._weights.embed_VD)
        if image_spans:
            self._place_images(embedded_TD, image_spans)
        return embedded_TD

    def logits(self, rows_BD: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] of hidden states after the final norm, float32."""
        return linear_wide(rows_BD, self._weights.lm_head_VD)

    def _enter(self, batch: Batch) -> _MicroBatch:
        vision_s = self.seconds.get("vision", 0.0)
        began_s = time.perf_counter()
        hidden_TD = self.embed(batch.tokens_T, batch.image_spans)
        norm_D, eps = self._weights.layers[0].input_norm_D, self.config.rms_norm_eps
        terms = self._attention.position_terms(batch)
        micro_batch = _MicroBatch(batch, hidden_TD, rms_norm(hidden_TD, norm_D, eps), terms)
        vision_s = self.seconds.get("vision", 0.0) - vision_s
        self.seconds["attention"] += time.perf_counter() - began_s - vision_s
        return micro_batch

    def _place_images(self, hidden_TD: torch.Tensor, spans: Sequence[ImageSpan]) -> None:
        if self.images is None:
            raise RuntimeError("a step has images, but the model has no vision tower")
        began_s = time.perf_counter()
        for span in spans:
            self.images.place(hidden_TD, span)
        self.seconds["vision"] += time.perf_counter() - began_s

    def _start_layer(
        self, layer: int, index: int, slice_: _MicroBatch, exchange: ExpertExchange
    ) -> None:
        w, seconds, clock = self._weights.layers[layer], self.seconds, time.perf_counter
        began_s = clock()
        self._attend(layer, w, slice_)
        x_TD = slice_.x_TD
        attended_s = clock()
        expert_TK, weight_TK = gate(
            x_TD,
            w.gate_ED,
            self.config.num_experts_per_token,
            self.config.routed_scaling_factor,
            slice_.batch.num_live,
            always=self.config.num_experts if w.shared_down is None else None,
        )
        gated_s = clock()
        exchange.dispatch(layer, index, x_TD, expert_TK, weight_TK)
        dispatched_s = clock()
        slice_.shared_TD = shared_mlp(x_TD, w)
        seconds["attention"] += attended_s - began_s
        seconds["gate"] += gated_s - attended_s
        seconds["dispatch"] += dispatched_s - gated_s
        seconds["shared"] += clock() - dispatched_s

    def _attend(self, layer: int, w: AttentionLayerWeights, slice_: _MicroBatch) -> None:
        """Attention and its residual; then the normed input of the experts."""
        eps = self.config.rms_norm_eps
        if not slice_.batch.num_tokens:
            return
        attended_TD = self._attention.forward(layer, slice_.x_TD, slice_.batch, slice_.terms)
        slice_.hidden_TD, slice_.x_TD = combine_norm(
            (), attended_TD, slice_.hidden_TD, w.post_norm_D, eps
        )

    def _finish_layer(
        self, layer: int, index: int, slice_: _MicroBatch, exchange: ExpertExchange
    ) -> None:
        """Take the experts' rows; then the normed input of the next layer."""
        began_s = time.perf_counter()
        sum_TD = exchange.combine(layer, index)
        norm_D, eps = self._weights.layers[layer + 1].input_norm_D, self.config.rms_norm_eps
        slice_.hidden_TD, slice_.x_TD = combine_norm(
            (sum_TD,), slice_.shared_TD, slice_.hidden_TD, norm_D, eps
        )
        self.seconds["combine"] += time.perf_counter() - began_s

    def _finish_last_layer(
        self, layer: int, index: int, slice_: _MicroBatch, exchange: ExpertExchange
    ) -> None:
        """Without a norm, which only the rows that sample need."""
        began_s = time.perf_counter()
        sum_TD = exchange.combine(layer, index)
        slice_.hidden_TD = add_residual(sum_TD, slice_.shared_TD, slice_.hidden_TD)
        self.seconds["combine"] += time.perf_counter() - began_s

    def _head(self, slice_: _MicroBatch) -> torch.Tensor:
        began_s = time.perf_counter()
        rows_BD, sample_rows = slice_.hidden_TD, slice_.batch.sample_rows
        norm_D, eps = self._weights.final_norm_D, self.config.rms_norm_eps
        if self.keeps_hidden:
            self.hidden.append(rms_norm(rows_BD, norm_D, eps))
            rows_BD = self.hidden[-1].index_select(0, sample_rows)
        else:
            rows_BD = rms_norm(rows_BD.index_select(0, sample_rows), norm_D, eps)
        logits_BV = self.logits(rows_BD)
        self.seconds["head"] += time.perf_counter() - began_s
        return logits_BV


def shared_mlp(x_TD: torch.Tensor, w: LayerWeights) -> torch.Tensor | None:
    """What every token passes; None where the routed experts' stack has it."""
    if w.shared_gate_up is None or w.shared_down is None:
        return None
    return mlp(x_TD, w.shared_gate_up, w.shared_down)


def _packed(weights: AttentionWeights) -> AttentionWeights:
    """The same weights, with linear layers in the form that `linear` reads fastest."""
    dtype = weights.embed_VD.dtype
    layers = tuple(
        replace(pack_layer(w), gate_ED=pack_gate(w.gate_ED, dtype)) for w in weights.layers
    )
    return replace(weights, layers=layers, lm_head_VD=pack_linear(weights.lm_head_VD), vision=None)


def pack_layer(w: _Layer) -> _Layer:
    """The same layer, with linear weights in the form that `linear` reads fastest."""
    q_a, kv_a = w.q_a, w.kv_a
    if kv_a is not None and w.input_norm_D.is_cuda:  # there a launch more costs more than the bytes
        joined = join_linear(q_a, kv_a)
        q_a, kv_a = (q_a, kv_a) if joined is None else (joined, None)
    return replace(
        w,
        q_a=pack_linear(q_a),
        q_b=pack_linear(w.q_b),
        kv_a=_packed_if_there(kv_a),
        o_proj=pack_linear(w.o_proj),
        shared_gate_up=_packed_if_there(w.shared_gate_up),
        shared_down=_packed_if_there(w.shared_down),
    )


def _packed_if_there(weight_OI: LinearWeight | None) -> LinearWeight | None:
    return None if weight_OI is None else pack_linear(weight_OI)
