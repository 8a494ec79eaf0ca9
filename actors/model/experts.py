"""The routed experts of one shard, and how many rows each of them has computed.

The shared expert may stand behind them as one more, which every row goes to; it is not counted.

Shape letters: L layers, E local experts, R rows, K experts per row, D hidden.
"""

from __future__ import annotations

import torch

from ostro.actors.model.weights import (
    ExpertLayer,
    ExpertLayerWeights,
    ExpertWeights,
    num_slots,
)
from ostro.configs.model import ModelConfig
from ostro.kernels.combine import PairRows
from ostro.kernels.fp8_experts import Fp8Experts, expert_mlp_fp8
from ostro.kernels.grouped_gemm import expert_mlp
from ostro.kernels.linear import is_packed, pack_linear
from ostro.kernels.nvfp4_experts import Nvfp4Experts, expert_mlp_nvfp4


class LocalExperts:
    """Runs rows through the experts of this shard. Stateless but for its counters.

    Attributes:
        has_shared: Whether the local slot after the last is the shared expert's.
    """

    def __init__(self, config: ModelConfig, weights: ExpertWeights) -> None:
        """Takes `weights` over: where packing is faster, they are packed where they stand."""
        self._layers = [_take_over(layer) for layer in weights.layers]
        self._num_local = len(weights.local_to_logical)
        self.has_shared = weights.num_extra() == 1
        first = weights.layers[0]
        self._rows_LE = torch.zeros(
            config.num_layers, num_slots(first) + 1, dtype=torch.int64, device=_device(first)
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
        experts, counts = self._layers[layer], self._rows_LE[layer]
        if isinstance(experts, Fp8Experts):
            return expert_mlp_fp8(rows_RD, expert_RK, weight_RK, experts, counts=counts)
        if isinstance(experts, Nvfp4Experts):
            return expert_mlp_nvfp4(rows_RD, expert_RK, weight_RK, experts, counts=counts)
        return expert_mlp(
            rows_RD, expert_RK, weight_RK, experts.gate_up, experts.down, counts=counts
        )

    @torch.inference_mode()
    def forward_pairs(
        self, layer: int, rows_RD: torch.Tensor, expert_RK: torch.Tensor, weight_RK: torch.Tensor
    ) -> torch.Tensor | PairRows:
        """As `forward`; but on a GPU who adds the residual may add up the experts as well."""
        if not rows_RD.is_cuda or not len(rows_RD):
            return self.forward(layer, rows_RD, expert_RK, weight_RK)
        from ostro.kernels.gpu import expert_mlp as gpu

        experts, counts = self._layers[layer], self._rows_LE[layer]
        routed = (rows_RD, expert_RK, weight_RK)
        if isinstance(experts, Fp8Experts):
            rows_AD = gpu.expert_pairs_fp8_triton(*routed, experts, counts)
        elif isinstance(experts, Nvfp4Experts):
            rows_AD = gpu.expert_pairs_nvfp4_triton(*routed, experts, counts)
        else:
            rows_AD = gpu.expert_pairs_triton(*routed, experts.gate_up, experts.down, counts)
        return PairRows(rows_AD, expert_RK)

    def take_counts(self) -> list[list[int]]:
        """Rows per layer and local routed expert since last asked."""
        rows_LE: list[list[int]] = self._rows_LE[:, 1 : 1 + self._num_local].tolist()
        self._rows_LE.zero_()
        return rows_LE


def _device(layer: ExpertLayer) -> torch.device:
    if isinstance(layer, Nvfp4Experts):
        return layer.down_unit_E.device
    return layer.gate_up_EHD.device if isinstance(layer, Fp8Experts) else layer.gate_up.device


def _take_over(layer: ExpertLayer) -> ExpertLayer:
    """The layer as `expert_mlp` reads it fastest; FP8 and NVFP4 stay as they are."""
    if isinstance(layer, Fp8Experts | Nvfp4Experts):
        return layer
    return ExpertLayerWeights(gate_up=_packed(layer.gate_up), down=_packed(layer.down))


def _packed(weight_EOI: torch.Tensor) -> torch.Tensor:
    """The stack, packed expert by expert in its own memory: a shard never holds experts twice."""
    for weight_OI in weight_EOI:
        packed = pack_linear(weight_OI)
        if not is_packed(packed):
            return weight_EOI
        weight_OI.copy_(packed.view_as(weight_OI))
    return weight_EOI.view(len(weight_EOI), *packed.shape)
