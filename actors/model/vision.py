"""The Pixtral vision tower and its projector: pixels to embeddings of the text model.

    patches -> norm -> layers of (norm, attention, norm, gated MLP) -> norm, merge squares, MLP

Each image runs by itself, so its patches attend to each other and to nothing else. A patch's place
turns its queries and keys: the even frequencies by its row, the odd ones by its column, in the
rotate-half form that the Hugging Face layout permutes q and k for.
Source: transformers' `modeling_pixtral.py` and `modeling_mistral3.py`.

Shape letters: N patches of the image, W width of the tower, H heads, A head dim, P pixel values of
a patch, I image tokens, D hidden of the text model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from ostro.actors.model.vision_weights import VisionLayerWeights, VisionWeights
from ostro.configs.model import ModelConfig
from ostro.configs.vision import VisionConfig
from ostro.kernels.linear import linear, pack_linear
from ostro.kernels.rms_norm import rms_norm

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": gelu, "silu": silu}


class VisionTower:
    """Encodes images one by one."""

    def __init__(self, config: ModelConfig, vision: VisionConfig, weights: VisionWeights) -> None:
        """On CPU linear weights are repacked: drop `weights` afterwards to free their memory."""
        self.vision = vision
        self.dtype = weights.pre_norm_W.dtype
        self.device = weights.pre_norm_W.device
        self._projector_eps = config.rms_norm_eps
        self._activation = _ACTIVATIONS[vision.hidden_act]
        self._weights = _packed(weights)
        self._frequencies_row, self._frequencies_column = _frequencies(vision, self.device)

    @torch.inference_mode()
    def encode(self, pixels_CHW: torch.Tensor) -> torch.Tensor:
        """The embeddings of an image's tokens, in the model's dtype.

        Args:
            pixels_CHW: Normalised values; both sides are multiples of `VisionConfig.token_side`.

        Returns:
            features_ID, row by row of the image.
        """
        side = self.vision.patch_size
        num_rows, num_columns = pixels_CHW.shape[1] // side, pixels_CHW.shape[2] // side
        w, eps = self._weights, self.vision.norm_eps
        patches_NP = _patches(pixels_CHW.to(self.device, self.dtype), side)
        hidden_NW = rms_norm(linear(patches_NP, w.patch_WP), w.pre_norm_W, eps)
        cos_NA, sin_NA = self._rotation(num_rows, num_columns)
        for layer in w.layers:
            x_NW = rms_norm(hidden_NW, layer.attention_norm_W, eps)
            hidden_NW = hidden_NW + self._attend(x_NW, layer, cos_NA, sin_NA)
            x_NW = rms_norm(hidden_NW, layer.mlp_norm_W, eps)
            hidden_NW = hidden_NW + self._mlp(x_NW, layer)
        return self._project(hidden_NW, num_rows, num_columns)

    def _rotation(self, num_rows: int, num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines by which each patch's queries and keys turn."""
        rows_N = torch.arange(num_rows, device=self.device).repeat_interleave(num_columns)
        columns_N = torch.arange(num_columns, device=self.device).repeat(num_rows)
        by_row = rows_N[:, None].float() * self._frequencies_row
        by_column = columns_N[:, None].float() * self._frequencies_column
        angles_NA = torch.cat((by_row, by_column, by_row, by_column), dim=-1)
        return angles_NA.cos().to(self.dtype), angles_NA.sin().to(self.dtype)

    def _attend(
        self,
        x_NW: torch.Tensor,
        layer: VisionLayerWeights,
        cos_NA: torch.Tensor,
        sin_NA: torch.Tensor,
    ) -> torch.Tensor:
        num_heads, head_dim = self.vision.num_heads, self.vision.head_dim
        qkv = linear(x_NW, layer.qkv).view(-1, 3, num_heads, head_dim)
        q_HNA, k_HNA, v_HNA = qkv.permute(1, 2, 0, 3)
        out_1HNA = scaled_dot_product_attention(
            _rotate(q_HNA, cos_NA, sin_NA)[None], _rotate(k_HNA, cos_NA, sin_NA)[None], v_HNA[None]
        )
        return linear(out_1HNA[0].transpose(0, 1).flatten(1), layer.o_proj_WW)

    def _mlp(self, x_NW: torch.Tensor, layer: VisionLayerWeights) -> torch.Tensor:
        gate, up = linear(x_NW, layer.gate_up).chunk(2, dim=-1)
        return linear(self._activation(gate) * up, layer.down_WF)

    def _project(self, hidden_NW: torch.Tensor, num_rows: int, num_columns: int) -> torch.Tensor:
        w = self._weights
        x_NW = rms_norm(hidden_NW, w.projector_norm_W, self._projector_eps)
        squares = _squares(x_NW, num_rows, num_columns, self.vision.spatial_merge_size)
        return linear(gelu(linear(linear(squares, w.merge), w.project_in_DW)), w.project_out_DD)


def _frequencies(vision: VisionConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Those that rows turn by and those that columns turn by, a quarter of the head dim each."""
    dim = vision.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    frequencies = 1.0 / vision.rope_theta**exponents
    return frequencies[0::2], frequencies[1::2]


def _patches(pixels_CHW: torch.Tensor, side: int) -> torch.Tensor:
    """[N, channels * side * side], patches in reading order."""
    channels, height, width = pixels_CHW.shape
    cut = pixels_CHW.reshape(channels, height // side, side, width // side, side)
    return cut.permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)


def _squares(x_NW: torch.Tensor, num_rows: int, num_columns: int, merge: int) -> torch.Tensor:
    """[I, W * merge * merge]: each square of patches as one row, its patches varying fastest."""
    grid = x_NW.view(num_rows // merge, merge, num_columns // merge, merge, -1)
    return grid.permute(0, 2, 4, 1, 3).flatten(2).flatten(0, 1)


def _rotate(x_HNA: torch.Tensor, cos_NA: torch.Tensor, sin_NA: torch.Tensor) -> torch.Tensor:
    first, second = x_HNA.chunk(2, dim=-1)
    return x_HNA * cos_NA + torch.cat((-second, first), dim=-1) * sin_NA


def _packed(weights: VisionWeights) -> VisionWeights:
    """The same weights, with linear layers in the form that `linear` reads fastest."""
    layers = tuple(
        replace(
            layer,
            qkv=pack_linear(layer.qkv),
            o_proj_WW=pack_linear(layer.o_proj_WW),
            gate_up=pack_linear(layer.gate_up),
            down_WF=pack_linear(layer.down_WF),
        )
        for layer in weights.layers
    )
    return replace(
        weights,
        patch_WP=pack_linear(weights.patch_WP),
        layers=layers,
        merge=pack_linear(weights.merge),
        project_in_DW=pack_linear(weights.project_in_DW),
        project_out_DD=pack_linear(weights.project_out_DD),
    )
