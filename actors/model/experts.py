"""The routed experts of one shard, and how many rows each of them has computed.

Shape letters: L layers, E local experts, R rows, K experts per row, D hidden.
"""

from __future__ import annotations

import torch

from ostro.actors.model.weights import ExpertWeights
from ostro.configs.model import ModelConfig
from ostro.kernels.grouped_gemm import count_pairs, expert_mlp
from ostro.kernels.linear import pack_linear


class LocalExperts:
    """Runs rows through the experts of this shard. Stateless but for its counters."""

    def __init__(self, config: ModelConfig, weights: ExpertWeights) -> None:
        """Takes `weights` over: where they are repacked, their own memory is freed on the way."""
        self._gate_up_LE = [_take_over(layer.gate_up) for layer in weights.layers]
        self._down_LE = [_take_over(layer.down) for layer in weights.layers]
        self._num_local = len(weights.local_to_logical)
        device = weights.layers[0].gate_up.device
        self._rows_LE = torch.zeros(
            config.num_layers, self._num_local + 1, dtype=torch.int64, device=device
        )

    @torch.inference_mode()
    def forward(
        self, layer: int, rows_RD: torch.Tensor, expert_RK: torch.Tensor, weight_RK: torch.Tensor
    ) -> torch.Tensor:
        """Sum of each row's local experts, weighted.

        Args:
            layer: Which layer's experts.
            rows_RD: Hidden states in the model's dtype.
            expert_RK: int64 local slots, -1 where the k-th expert is not here.
            weight_RK: float32 gate weights.

        Returns:
            out_RD in the dtype of `rows_RD`; zeros for a row without a local expert.
        """
        counts = count_pairs(expert_RK, self._num_local)
        self._rows_LE[layer] += counts
        return expert_mlp(
            rows_RD,
            expert_RK,
            weight_RK,
            self._gate_up_LE[layer],
            self._down_LE[layer],
            counts=counts,
        )

    def take_counts(self) -> list[list[int]]:
        """Rows per layer and local expert since last asked."""
        rows_LE: list[list[int]] = self._rows_LE[:, 1:].tolist()
        self._rows_LE.zero_()
        return rows_LE


def _take_over(weight_EOI: torch.Tensor) -> list[torch.Tensor]:
    """Each expert's weight as `linear` reads it fastest; a repacked stack is emptied.

    Tensor by tensor, so that a shard never holds its experts twice.
    """
    packed = [pack_linear(weight_OI) for weight_OI in weight_EOI]
    if packed and packed[0].is_mkldnn:
        weight_EOI.set_(weight_EOI.new_empty(0).untyped_storage())
    return packed
