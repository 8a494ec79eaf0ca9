"""The weights of the vision tower and of its projector.

Shape letters: W width of the tower, F its MLP's hidden width, D hidden of the text model, P pixel
values of a patch (channels, rows, columns), M patches that become one image token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ostro.configs.vision import VisionConfig

# Reads the tensor of a parameter and layer, as in `weight_names.VISION_TABLE`.
TakeTensor = Callable[[str, int | None], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionLayerWeights:
    """One layer of the tower.

    Attributes:
        qkv: [3W, W]; query rows, then key rows, then value rows, each head by head.
        gate_up: [2F, W]; gate rows, then up.
    """

    attention_norm_W: torch.Tensor
    qkv: torch.Tensor
    o_proj_WW: torch.Tensor
    mlp_norm_W: torch.Tensor
    gate_up: torch.Tensor
    down_WF: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionWeights:
    """The tower and the projector, in the model's dtype.

    Attributes:
        merge: [W, W * M]; the M patches of a square vary fastest, row by row.
    """

    patch_WP: torch.Tensor
    pre_norm_W: torch.Tensor
    layers: tuple[VisionLayerWeights, ...]
    projector_norm_W: torch.Tensor
    merge: torch.Tensor
    project_in_DW: torch.Tensor
    project_out_DD: torch.Tensor


def gather_vision_weights(vision: VisionConfig, take: TakeTensor) -> VisionWeights:
    """Take every tensor of `weight_names.VISION_TABLE` once."""
    return VisionWeights(
        patch_WP=take("patch_conv", None).flatten(1),
        pre_norm_W=take("vision_pre_norm", None),
        layers=tuple(_gather_layer(layer, take) for layer in range(vision.num_layers)),
        projector_norm_W=take("projector_norm", None),
        merge=take("projector_merge", None),
        project_in_DW=take("projector_in", None),
        project_out_DD=take("projector_out", None),
    )


def _gather_layer(layer: int, take: TakeTensor) -> VisionLayerWeights:
    return VisionLayerWeights(
        attention_norm_W=take("vision_attention_norm", layer),
        qkv=torch.cat([take(f"vision_{part}", layer) for part in "qkv"]),
        o_proj_WW=take("vision_o", layer),
        mlp_norm_W=take("vision_mlp_norm", layer),
        gate_up=torch.cat((take("vision_gate", layer), take("vision_up", layer))),
        down_WF=take("vision_down", layer),
    )
