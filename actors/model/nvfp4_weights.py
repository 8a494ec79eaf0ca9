"""NVFP4 weights on their way from a checkpoint's tensors into the order that kernels read.

One matrix at a time, on the device, so that a shard never holds its weights twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from ostro.actors.model.weight_formats import RawWeight
from ostro.configs.model import ModelConfig
from ostro.configs.quantization import WeightFormat
from ostro.kernels.nvfp4_experts import Nvfp4Experts, new_nvfp4_stack
from ostro.kernels.nvfp4_linear import SCALE_WORDS, WORDS, Nvfp4Weight, num_blocks, pack_nvfp4

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


def nvfp4_linear_bytes(num_outputs: int, num_inputs: int) -> int:
    """Memory of a linear layer's weight, each of whose outputs has its unit."""
    return num_outputs * (num_blocks(num_inputs) * _BLOCK_BYTES + _UNIT_BYTES)


def nvfp4_matrix_bytes(num_outputs: int, num_inputs: int) -> int:
    """Memory of one matrix of an expert and its unit."""
    return num_outputs * num_blocks(num_inputs) * _BLOCK_BYTES + _UNIT_BYTES


def nvfp4_expert_bytes(config: ModelConfig) -> int:
    """Memory of one expert of one layer, or of a shared one of its shape."""
    hidden, inner = config.hidden_size, config.expert_hidden_size
    return 2 * nvfp4_matrix_bytes(inner, hidden) + nvfp4_matrix_bytes(hidden, inner)


def nvfp4_weight(parts: Sequence[RawWeight]) -> Nvfp4Weight:
    """A linear layer's weight, on the device of its parts.

    Args:
        parts: Weights of the same inputs as they are stored; the outputs of each stand after those
            of the one before, with its own unit.

    Raises:
        ValueError: As `put_nvfp4`.
    """
    packed = [_packed(raw) for raw in parts]
    return Nvfp4Weight(
        words_BOW=torch.cat([words_BOW for words_BOW, _, _ in packed], dim=1),
        scales_BOS=torch.cat([scales_BOS for _, scales_BOS, _ in packed], dim=1),
        unit_O=torch.cat([unit.repeat(scales_BOS.shape[1]) for _, scales_BOS, unit in packed]),
        num_inputs=2 * parts[0].values.shape[1],
    )


def put_nvfp4(experts: Nvfp4Experts, slot: int, matrix: Matrix, raw: RawWeight) -> None:
    """Fill one matrix of one slot.

    Args:
        experts: Of the layer.
        slot: Which expert's.
        matrix: Which.
        raw: As it is stored, on the device of `experts`.

    Raises:
        ValueError: It is another format's, or lacks a scale.
    """
    words_BOW, scales_BOS, unit = _packed(raw)
    stack = experts.down if matrix == "down" else experts.gate_up
    inner = experts.gate_up.num_outputs() // 2
    first = inner if matrix == "up" else 0
    rows = slice(first, first + len(raw.values))
    stack.words_EBOW[slot, :, rows].copy_(words_BOW)
    stack.scales_EBOS[slot, :, rows].copy_(scales_BOS)
    unit_E = {"gate": experts.gate_unit_E, "up": experts.up_unit_E, "down": experts.down_unit_E}
    unit_E[matrix][slot] = unit


def _packed(raw: RawWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words, scales and the one unit of a matrix."""
    is_nvfp4 = raw.weight_format is WeightFormat.NVFP4
    if not is_nvfp4 or raw.scale is None or raw.global_scale is None:
        raise ValueError("only an nvfp4 weight with both of its scales is packed")
    return *pack_nvfp4(raw.values, raw.scale), 1.0 / raw.global_scale.float().view(())
