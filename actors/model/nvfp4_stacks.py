"""NVFP4 experts on their way from a checkpoint's tensors into the order that kernels read.

One matrix of one expert at a time, on the device, so that a shard never holds experts twice.
"""

from __future__ import annotations

from typing import Literal

import torch

from ostro.actors.errors import CheckpointError
from ostro.actors.model.weight_formats import RawWeight
from ostro.configs.model import ModelConfig
from ostro.configs.quantization import WeightFormat
from ostro.kernels.nvfp4_experts import (
    SCALE_WORDS,
    WORDS,
    Nvfp4Experts,
    new_nvfp4_stack,
    num_blocks,
    pack_nvfp4,
)

Matrix = Literal["gate", "up", "down"]
MATRICES: tuple[Matrix, ...] = ("gate", "up", "down")
_BLOCK_BYTES = (WORDS + SCALE_WORDS) * torch.int32.itemsize  # of one output
_UNIT_BYTES = torch.float32.itemsize


def new_nvfp4_experts(
    config: ModelConfig, num_slots: int, device: torch.device | str
) -> Nvfp4Experts:
    """Memory for one layer's experts, not filled."""
    hidden, inner = config.hidden_size, config.expert_hidden_size
    gate_unit_E, up_unit_E, down_unit_E = (torch.empty(num_slots, device=device) for _ in range(3))
    return Nvfp4Experts(
        gate_up=new_nvfp4_stack(num_slots, 2 * inner, hidden, device),
        gate_unit_E=gate_unit_E,
        up_unit_E=up_unit_E,
        down=new_nvfp4_stack(num_slots, hidden, inner, device),
        down_unit_E=down_unit_E,
    )


def nvfp4_matrix_bytes(num_outputs: int, num_inputs: int) -> int:
    """Memory of one matrix and its unit."""
    return num_outputs * num_blocks(num_inputs) * _BLOCK_BYTES + _UNIT_BYTES


def nvfp4_expert_bytes(config: ModelConfig) -> int:
    """Memory of one expert of one layer, or of a shared one of its shape."""
    hidden, inner = config.hidden_size, config.expert_hidden_size
    return 2 * nvfp4_matrix_bytes(inner, hidden) + nvfp4_matrix_bytes(hidden, inner)


def put_nvfp4(experts: Nvfp4Experts, slot: int, matrix: Matrix, raw: RawWeight, name: str) -> None:
    """Fill one matrix of one slot.

    Args:
        experts: Of the layer.
        slot: Which expert's.
        matrix: Which.
        raw: As it is stored, on the device of `experts`.
        name: Of its tensor, for errors.

    Raises:
        CheckpointError: A scale is not a number, or the global one is none to divide by.
        ValueError: It is another format's, or lacks a scale.
    """
    is_nvfp4 = raw.weight_format is WeightFormat.NVFP4
    if not is_nvfp4 or raw.scale is None or raw.global_scale is None:
        raise ValueError("only an nvfp4 weight with both of its scales is packed")
    unit = 1.0 / raw.global_scale.float().view(())
    if not bool(torch.isfinite(raw.scale.float()).all() & torch.isfinite(unit)):
        raise CheckpointError(f"{name}: a scale of this nvfp4 weight is not finite; fetch it anew")
    stack = experts.down if matrix == "down" else experts.gate_up
    inner = experts.gate_up.num_outputs() // 2
    first = inner if matrix == "up" else 0
    rows = slice(first, first + len(raw.values))
    words_BOW, scales_BOS = pack_nvfp4(raw.values, raw.scale)
    stack.words_EBOW[slot, :, rows].copy_(words_BOW)
    stack.scales_EBOS[slot, :, rows].copy_(scales_BOS)
    unit_E = {"gate": experts.gate_unit_E, "up": experts.up_unit_E, "down": experts.down_unit_E}
    unit_E[matrix][slot] = unit
