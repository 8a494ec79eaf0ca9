"""One layer's experts of random weights in each precision, and batches for them.

Shape letters: B tokens, K experts per token, A = B * K pairs, E experts, D hidden, F expert hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import partial

import torch

from ostro.kernels.bench.measure import Launch, poison, relative_error
from ostro.kernels.bench.sizes import Sizes
from ostro.kernels.fp8_experts import Fp8Experts
from ostro.kernels.gpu.expert_mlp import (
    expert_mlp_fp8_triton,
    expert_mlp_nvfp4_triton,
    expert_mlp_triton,
)
from ostro.kernels.gpu.expert_schedule import ExpertSchedule, expert_schedule_triton
from ostro.kernels.gpu.grouped_gemm import (
    down_reference,
    down_triton,
    gate_up_reference,
    gate_up_triton,
)
from ostro.kernels.gpu.nvfp4_gemm import (
    down_nvfp4_reference,
    down_nvfp4_triton,
    gate_up_nvfp4_reference,
    gate_up_nvfp4_triton,
)
from ostro.kernels.gpu.permute import permute_triton
from ostro.kernels.gpu.sum_pairs import sum_pairs_triton
from ostro.kernels.gpu.tiles import FP4, Tile, block_rows
from ostro.kernels.nvfp4_experts import Nvfp4Experts, random_nvfp4_stack

FP8 = torch.float8_e4m3fn
_NUM_VARIANTS = 4  # batches with choices of their own, so that small ones do not find their experts


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows, their experts, and what the products need of them."""

    rows_RD: torch.Tensor
    expert_RK: torch.Tensor
    weight_RK: torch.Tensor
    schedule: ExpertSchedule
    x_AD: torch.Tensor

    def num_hit(self) -> int:
        """Experts that some row chose."""
        return len(self.expert_RK.unique())


def chosen_experts(sizes: Sizes, num_tokens: int, skew: float = 0.0) -> torch.Tensor:
    """Different experts for each token, int64 [B, K], expert i chosen like (i + 1) ** -skew."""
    weight_E = torch.arange(1, sizes.num_experts + 1, device=sizes.device).float() ** -skew
    shuffled_E = weight_E[torch.randperm(sizes.num_experts, device=sizes.device)]
    return torch.multinomial(shuffled_E.expand(num_tokens, -1), sizes.num_chosen)


def no_counts(sizes: Sizes) -> torch.Tensor:
    """Where a schedule adds up how often each expert was chosen."""
    return torch.zeros(1 + sizes.num_experts, dtype=torch.int64, device=sizes.device)


class Layer(ABC):
    """One layer's experts and batches for them, for the benchmark and for the sweep of tiles.

    Attributes:
        name: Of the precision.
        dtype: Of the weights, as tiles are told apart.
        row_dtype: Of the rows that are multiplied.
        weight_bytes: Memory of one weight, its share of scales included.
        tolerance: Largest relative error that is right.
    """

    name: str
    dtype: torch.dtype
    row_dtype: torch.dtype
    weight_bytes: float
    tolerance: float = 1e-2

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes

    @abstractmethod
    def gate_up(self, batch: Batch, cut: Tile | None = None) -> torch.Tensor:
        """The first product of a batch."""

    @abstractmethod
    def down(self, batch: Batch, hidden_AF: torch.Tensor, cut: Tile | None = None) -> torch.Tensor:
        """The second product of a batch."""

    @abstractmethod
    def whole(self, batch: Batch, counts: torch.Tensor) -> torch.Tensor:
        """All launches of a batch."""

    @abstractmethod
    def gate_up_reference(self, batch: Batch) -> torch.Tensor:
        """What `gate_up` means."""

    @abstractmethod
    def down_reference(self, batch: Batch, hidden_AF: torch.Tensor) -> torch.Tensor:
        """What `down` means, in float32."""

    def sorted_whole(self, batch: Batch, counts: torch.Tensor) -> torch.Tensor:
        """All five launches of a batch, also where few pairs take less."""
        expert_RK, rows = batch.expert_RK, batch.schedule.block_rows
        schedule = expert_schedule_triton(expert_RK, self.sizes.num_experts, rows, counts)
        x_AD = permute_triton(batch.rows_RD, expert_RK, schedule, self.input_scales())
        anew = replace(batch, schedule=schedule, x_AD=x_AD)
        return sum_pairs_triton(self.down(anew, self.gate_up(anew)), expert_RK)

    def gate_up_others(self, batches: list[Batch]) -> dict[str, list[Launch]]:
        """Other kernels that do the first product, without what ours fuses."""
        return {}

    def down_others(
        self, batches: list[Batch], hidden: list[torch.Tensor]
    ) -> dict[str, list[Launch]]:
        """Likewise the second."""
        return {}

    def input_scales(self) -> torch.Tensor | None:
        """What rows are rounded by; None if they stay as they are."""
        return None

    def batches(self, num_tokens: int, skew: float = 0.0, rows: int | None = None) -> list[Batch]:
        """Several, with choices of their own, in tiles of `rows` rows or the usual number."""
        return [self._batch(num_tokens, skew, rows) for _ in range(_NUM_VARIANTS)]

    def _batch(self, num_tokens: int, skew: float, rows: int | None) -> Batch:
        s = self.sizes
        rows_RD = s.randn(num_tokens, s.hidden)
        expert_RK = chosen_experts(s, num_tokens, skew)
        weight_RK = torch.softmax(torch.randn(expert_RK.shape, device=s.device), dim=1)
        rows = rows or block_rows(expert_RK.numel(), s.num_experts)
        schedule = expert_schedule_triton(expert_RK, s.num_experts, rows, no_counts(s))
        x_AD = permute_triton(rows_RD, expert_RK, schedule, self.input_scales())
        return Batch(rows_RD, expert_RK, weight_RK, schedule, x_AD)

    def gate_up_error(self, batch: Batch) -> float:
        """Of the first product."""
        expected = self.gate_up_reference(batch)
        num_values = len(batch.x_AD) * self.sizes.inner
        poison(num_values * self.row_dtype.itemsize, self.sizes.device)
        return relative_error(self.gate_up(batch)[: len(expected)].float(), expected.float())

    def down_error(self, batch: Batch, hidden_AF: torch.Tensor) -> float:
        """Of the second product, from the same hidden rows."""
        expected = self.down_reference(batch, hidden_AF)
        poison(expected.numel() * 2, self.sizes.device)
        return relative_error(self.down(batch, hidden_AF), expected)

    def whole_error(self, batch: Batch, counts: torch.Tensor) -> float:
        """Against the same products without tiles, from the same roundings."""
        y_AD = self.down_reference(batch, self.gate_up(batch))
        expected = y_AD.view(*batch.expert_RK.shape, -1).sum(1)
        return relative_error(self.whole(batch, counts), expected)


class _ScaledLayer(Layer):
    """bf16, or FP8 with scales."""

    def __init__(self, dtype: torch.dtype, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.dtype = self.row_dtype = dtype
        self.weight_bytes = float(dtype.itemsize)
        self._is_fp8 = dtype == FP8
        self.name = "fp8" if self._is_fp8 else "bf16"
        self.tolerance = 0.05 if self._is_fp8 else 1e-2
        self.experts = self._random_experts()

    def _random_experts(self) -> Fp8Experts:
        """In bf16 the scales mean nothing."""
        s = self.sizes
        ones_E = torch.ones(s.num_experts, device=s.device)
        shapes = (s.num_experts, 2 * s.inner, s.hidden), (s.num_experts, s.hidden, s.inner)
        make, unit = (s.randn_fp8, 16.0) if self._is_fp8 else (s.randn, 1.0)
        gate_up, down = (
            make(*shape, scale=unit if self._is_fp8 else shape[2] ** -0.5) for shape in shapes
        )
        return Fp8Experts(
            gate_up_EHD=gate_up,
            gate_up_scale_E=ones_E * (s.hidden**-0.5 / unit),
            gate_up_input_scale_E=ones_E * (1 / 32),
            down_EDF=down,
            down_scale_E=ones_E * (s.inner**-0.5 / unit),
            down_input_scale_E=ones_E * (1 / 64),
        )

    def input_scales(self) -> torch.Tensor | None:
        return self.experts.gate_up_input_scale_E if self._is_fp8 else None

    def _gate_up_scales(self) -> dict[str, torch.Tensor]:
        e = self.experts
        if not self._is_fp8:
            return {}
        return {
            "scale_E": e.gate_up_scale_E,
            "input_scale_E": e.gate_up_input_scale_E,
            "next_input_scale_E": e.down_input_scale_E,
        }

    def _down_scales(self) -> dict[str, torch.Tensor]:
        e = self.experts
        if not self._is_fp8:
            return {}
        return {"scale_E": e.down_scale_E, "input_scale_E": e.down_input_scale_E}

    def gate_up(self, batch: Batch, cut: Tile | None = None) -> torch.Tensor:
        scales = self._gate_up_scales()
        return gate_up_triton(
            batch.x_AD, self.experts.gate_up_EHD, batch.schedule, **scales, cut=cut
        )

    def down(self, batch: Batch, hidden_AF: torch.Tensor, cut: Tile | None = None) -> torch.Tensor:
        return down_triton(
            hidden_AF,
            self.experts.down_EDF,
            batch.weight_RK,
            batch.schedule,
            torch.bfloat16,
            **self._down_scales(),
            cut=cut,
        )

    def whole(self, batch: Batch, counts: torch.Tensor) -> torch.Tensor:
        routed = (batch.rows_RD, batch.expert_RK, batch.weight_RK)
        e = self.experts
        if self._is_fp8:
            return expert_mlp_fp8_triton(*routed, e, counts)
        return expert_mlp_triton(*routed, e.gate_up_EHD, e.down_EDF, counts)

    def gate_up_reference(self, batch: Batch) -> torch.Tensor:
        scales = self._gate_up_scales()
        return gate_up_reference(batch.x_AD, self.experts.gate_up_EHD, batch.schedule, **scales)

    def down_reference(self, batch: Batch, hidden_AF: torch.Tensor) -> torch.Tensor:
        return down_reference(
            hidden_AF,
            self.experts.down_EDF,
            batch.weight_RK,
            batch.schedule,
            torch.float32,
            **self._down_scales(),
        )

    def gate_up_others(self, batches: list[Batch]) -> dict[str, list[Launch]]:
        return self._grouped(batches, self.experts.gate_up_EHD, [b.x_AD for b in batches])

    def down_others(
        self, batches: list[Batch], hidden: list[torch.Tensor]
    ) -> dict[str, list[Launch]]:
        return self._grouped(batches, self.experts.down_EDF, hidden)

    def _grouped(
        self, batches: list[Batch], weight_EOI: torch.Tensor, inputs: list[torch.Tensor]
    ) -> dict[str, list[Launch]]:
        """Torch's own grouped product of the same rows."""
        turned_EIO = weight_EOI.transpose(1, 2)
        ends = [batch.schedule.offsets_E1[1:] for batch in batches]
        pairs = list(zip(inputs, ends, strict=True))
        if not self._is_fp8:
            run = getattr(torch, "_grouped_mm", None)
            if run is None:
                return {}
            return {"torch": [partial(run, x, turned_EIO, offs=end) for x, end in pairs]}
        out_scale = torch.ones(weight_EOI.shape[:2], device=weight_EOI.device)
        return {
            "torch": [
                partial(
                    torch._scaled_grouped_mm,
                    x,
                    turned_EIO,
                    torch.ones(len(x), device=x.device),
                    out_scale,
                    offs=end,
                    out_dtype=torch.bfloat16,
                    use_fast_accum=True,
                )
                for x, end in pairs
            ]
        }


class _Nvfp4Layer(Layer):
    """NVFP4 weights, bf16 rows."""

    name = "nvfp4"
    dtype = FP4
    row_dtype = torch.bfloat16
    weight_bytes = 9 / 16

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        s = sizes
        unit_E = torch.ones(s.num_experts, device=s.device)
        gate_up, size_of_gate_up = random_nvfp4_stack(
            s.num_experts, 2 * s.inner, s.hidden, s.device
        )
        down, size_of_down = random_nvfp4_stack(s.num_experts, s.hidden, s.inner, s.device)
        self.experts = Nvfp4Experts(
            gate_up=gate_up,
            gate_unit_E=unit_E * (s.hidden**-0.5 / size_of_gate_up),
            up_unit_E=unit_E * (s.hidden**-0.5 / size_of_gate_up),
            down=down,
            down_unit_E=unit_E * (s.inner**-0.5 / size_of_down),
        )

    def gate_up(self, batch: Batch, cut: Tile | None = None) -> torch.Tensor:
        return gate_up_nvfp4_triton(batch.x_AD, self.experts, batch.schedule, cut)

    def down(self, batch: Batch, hidden_AF: torch.Tensor, cut: Tile | None = None) -> torch.Tensor:
        return down_nvfp4_triton(
            hidden_AF, self.experts, batch.weight_RK, batch.schedule, torch.bfloat16, cut
        )

    def whole(self, batch: Batch, counts: torch.Tensor) -> torch.Tensor:
        routed = (batch.rows_RD, batch.expert_RK, batch.weight_RK)
        return expert_mlp_nvfp4_triton(*routed, self.experts, counts)

    def gate_up_reference(self, batch: Batch) -> torch.Tensor:
        return gate_up_nvfp4_reference(batch.x_AD, self.experts, batch.schedule)

    def down_reference(self, batch: Batch, hidden_AF: torch.Tensor) -> torch.Tensor:
        return down_nvfp4_reference(
            hidden_AF, self.experts, batch.weight_RK, batch.schedule, torch.float32
        )


def make_layer(dtype: torch.dtype, sizes: Sizes) -> Layer:
    """A layer whose weights are bf16, FP8 or `FP4`, which is NVFP4."""
    return _Nvfp4Layer(sizes) if dtype == FP4 else _ScaledLayer(dtype, sizes)
