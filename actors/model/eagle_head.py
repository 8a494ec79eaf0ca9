"""The draft head of EAGLE-1: what a model's hidden states tell of the tokens after the next one.

    x_i = joint (embedding of token i + 1, H_i);   g_i = norm of the layers over x_0 .. x_i
    token i + 2 is guessed from the model's vocabulary matrix over g_i

H_i is the model's hidden state of token i after its final norm; where the model has not been yet,
the head's own g takes its place. The layers are those of the model with an MLP in place of experts,
and attend over a latent cache of their own in the same pages and slots.

Shape letters: T tokens of a micro-batch, R rows of it, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch

from ostro.actors.model.attention import Attention
from ostro.actors.model.batch import Batch, ImageSpan, moved
from ostro.actors.model.decoder import pack_layer, shared_mlp
from ostro.actors.model.draft_head import HeadWeights
from ostro.actors.model.latent_cache import LatentCache
from ostro.actors.model.packed_copy import send_together
from ostro.configs.model import ModelConfig
from ostro.kernels.combine import combine_norm
from ostro.kernels.linear import linear, pack_linear
from ostro.kernels.rms_norm import rms_norm

# Gives the embeddings [T, D] of tokens, with those of images in their places.
Embed: TypeAlias = Callable[[torch.Tensor, Sequence[ImageSpan]], torch.Tensor]


class EagleHead:
    """The head of one attention shard; experts take no part in it.

    Attributes:
        cache: Latents of its layers.
        hidden_size: D.
        dtype: Of hidden states.
    """

    def __init__(
        self, config: ModelConfig, weights: HeadWeights, cache: LatentCache, embed: Embed
    ) -> None:
        """As for a `Decoder`: drop `weights` afterwards to free their memory.

        Args:
            config: The head's.
            weights: Likewise.
            cache: For the head's config, of as many pages as the model's.
            embed: The model's `Decoder.embed`.
        """
        self.cache = cache
        self.hidden_size = config.hidden_size
        self.dtype = weights.final_norm_D.dtype
        self._embed = embed
        self._eps = config.rms_norm_eps
        layers = tuple(pack_layer(w) for w in weights.layers)
        self._weights = replace(weights, joint=pack_linear(weights.joint), layers=layers)
        self._attention = Attention(config, layers, cache)

    @torch.inference_mode()
    def forward(
        self,
        hidden_TD: torch.Tensor,
        batch: Batch,
        rows_R: torch.Tensor | None = None,
        tokens_T: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Keep the latents of a micro-batch's tokens, and guess after some of them.

        Args:
            hidden_TD: H of each, or the head's own g.
            batch: Where they stand, on the host or not; its tokens and images are those that come
                next.
            rows_R: int64 rows to guess after, on the host; None is all of them.
            tokens_T: The tokens that come next, where they are known on the device alone.

        Returns:
            g_RD in the order of `rows_R`.
        """
        if not batch.num_tokens:
            return hidden_TD
        device = self.cache.layers[0].device
        (batch,) = moved([batch], device)
        num_rows = batch.num_tokens if rows_R is None else len(rows_R)
        if rows_R is not None:
            (rows_R,) = send_together([rows_R], device)
        embedded_TD = self._embed(
            batch.tokens_T if tokens_T is None else tokens_T, batch.image_spans
        )
        x_TD = linear(torch.cat((embedded_TD, hidden_TD), dim=1), self._weights.joint)
        layers, eps, terms = self._weights.layers, self._eps, self._attention.position_terms(batch)
        next_norms = [w.input_norm_D for w in layers[1:]] + [self._weights.final_norm_D]
        residual_TD, x_TD = x_TD, rms_norm(x_TD, layers[0].input_norm_D, eps)
        for layer, (w, next_norm_D) in enumerate(zip(layers, next_norms, strict=True)):
            is_last = layer == len(layers) - 1
            if is_last and not num_rows:
                self._attention.store(layer, x_TD, batch, terms)
                return x_TD[:0]
            attended_TD = self._attention.forward(layer, x_TD, batch, terms)
            if is_last and rows_R is not None:  # nobody asks for the others
                attended_TD = attended_TD.index_select(0, rows_R)
                residual_TD = residual_TD.index_select(0, rows_R)
            residual_TD, x_TD = combine_norm((), attended_TD, residual_TD, w.post_norm_D, eps)
            residual_TD, x_TD = combine_norm((), shared_mlp(x_TD, w), residual_TD, next_norm_D, eps)
        return x_TD
