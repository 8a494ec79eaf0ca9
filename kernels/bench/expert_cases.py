"""Cases of the expert MLP: one layer's experts, hit as a batch would.

Shape letters: B tokens, K experts per token, A = B * K pairs, E experts, D hidden, F expert hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ostro.kernels.bench.measure import Case, Launch, poison, relative_error
from ostro.kernels.bench.sizes import Sizes
from ostro.kernels.fp8_experts import Fp8Experts
from ostro.kernels.gpu.expert_mlp import expert_mlp_fp8_triton, expert_mlp_triton
from ostro.kernels.gpu.expert_schedule import ExpertSchedule, expert_schedule_triton
from ostro.kernels.gpu.grouped_gemm import (
    down_reference,
    down_triton,
    gate_up_reference,
    gate_up_triton,
)
from ostro.kernels.gpu.permute import permute_triton
from ostro.kernels.gpu.tiles import Tile, block_rows

BATCHES = (1, 8, 32, 128, 512, 2048, 8192)
FP8 = torch.float8_e4m3fn
_NUM_VARIANTS = 4  # batches with choices of their own, so that small ones do not find their experts
_SKEW = 1.0  # of the Zipf routing: the i-th expert is chosen like 1 / i
_SKEWED_BATCHES = (32, 2048)


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


class Layer:
    """One layer's experts and batches for them, for the benchmark and for the sweep of tiles."""

    def __init__(self, dtype: torch.dtype, sizes: Sizes) -> None:
        self.dtype, self.sizes = dtype, sizes
        self.is_fp8 = dtype == FP8
        self.name = "fp8" if self.is_fp8 else "bf16"
        self.experts = self._random_experts()

    def _random_experts(self) -> Fp8Experts:
        """In bf16 the scales mean nothing."""
        s = self.sizes
        ones_E = torch.ones(s.num_experts, device=s.device)
        shapes = (s.num_experts, 2 * s.inner, s.hidden), (s.num_experts, s.hidden, s.inner)
        make, unit = (s.randn_fp8, 16.0) if self.is_fp8 else (s.randn, 1.0)
        gate_up, down = (
            make(*shape, scale=unit if self.is_fp8 else shape[2] ** -0.5) for shape in shapes
        )
        return Fp8Experts(
            gate_up_EHD=gate_up,
            gate_up_scale_E=ones_E * (s.hidden**-0.5 / unit),
            gate_up_input_scale_E=ones_E * (1 / 32),
            down_EDF=down,
            down_scale_E=ones_E * (s.inner**-0.5 / unit),
            down_input_scale_E=ones_E * (1 / 64),
        )

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
        scale_E = self.experts.gate_up_input_scale_E if self.is_fp8 else None
        x_AD = permute_triton(rows_RD, expert_RK, schedule, scale_E)
        return Batch(rows_RD, expert_RK, weight_RK, schedule, x_AD)

    def _gate_up_scales(self) -> dict[str, torch.Tensor]:
        e = self.experts
        if not self.is_fp8:
            return {}
        return {
            "scale_E": e.gate_up_scale_E,
            "input_scale_E": e.gate_up_input_scale_E,
            "next_input_scale_E": e.down_input_scale_E,
        }

    def _down_scales(self) -> dict[str, torch.Tensor]:
        e = self.experts
        if not self.is_fp8:
            return {}
        return {"scale_E": e.down_scale_E, "input_scale_E": e.down_input_scale_E}

    def gate_up(self, batch: Batch, cut: Tile | None = None) -> torch.Tensor:
        """The first product of a batch."""
        e = self.experts
        return gate_up_triton(
            batch.x_AD,
            e.gate_up_EHD,
            batch.schedule,
            **self._gate_up_scales(),
            cut=cut,
        )

    def down(self, batch: Batch, hidden_AF: torch.Tensor, cut: Tile | None = None) -> torch.Tensor:
        """The second product of a batch."""
        e = self.experts
        return down_triton(
            hidden_AF,
            e.down_EDF,
            batch.weight_RK,
            batch.schedule,
            torch.bfloat16,
            **self._down_scales(),
            cut=cut,
        )

    def whole(self, batch: Batch, counts: torch.Tensor) -> torch.Tensor:
        """All five launches of a batch."""
        routed = (batch.rows_RD, batch.expert_RK, batch.weight_RK)
        e = self.experts
        if self.is_fp8:
            return expert_mlp_fp8_triton(*routed, e, counts)
        return expert_mlp_triton(*routed, e.gate_up_EHD, e.down_EDF, counts)

    def gate_up_error(self, batch: Batch) -> float:
        """Of the first product."""
        e = self.experts
        expected = gate_up_reference(
            batch.x_AD,
            e.gate_up_EHD,
            batch.schedule,
            **self._gate_up_scales(),
        )
        poison(len(batch.x_AD) * self.sizes.inner * self.dtype.itemsize, self.sizes.device)
        return relative_error(self.gate_up(batch)[: len(expected)].float(), expected.float())

    def down_error(self, batch: Batch, hidden_AF: torch.Tensor) -> float:
        """Of the second product, from the same hidden rows."""
        expected = self._down_reference(batch, hidden_AF)
        poison(expected.numel() * 2, self.sizes.device)
        return relative_error(self.down(batch, hidden_AF), expected)

    def whole_error(self, batch: Batch, counts: torch.Tensor) -> float:
        """Against the same products without tiles, from the same roundings."""
        y_AD = self._down_reference(batch, self.gate_up(batch))
        expected = y_AD.view(*batch.expert_RK.shape, -1).sum(1)
        return relative_error(self.whole(batch, counts), expected)

    def _down_reference(self, batch: Batch, hidden_AF: torch.Tensor) -> torch.Tensor:
        e = self.experts
        return down_reference(
            hidden_AF,
            e.down_EDF,
            batch.weight_RK,
            batch.schedule,
            torch.float32,
            **self._down_scales(),
        )


def cases(layer: Layer, batches: Sequence[int] = BATCHES) -> Iterator[Case]:
    """Both products and the whole expert MLP, evenly routed and skewed."""
    for num_tokens in batches:
        yield from _cases(layer, num_tokens, "", 0.0)
    for num_tokens in sorted(set(_SKEWED_BATCHES).intersection(batches)):
        yield from _cases(layer, num_tokens, " skewed", _SKEW)


def _cases(layer: Layer, num_tokens: int, note: str, skew: float) -> Iterator[Case]:
    s, width = layer.sizes, layer.dtype.itemsize
    batches = layer.batches(num_tokens, skew)
    hidden = [layer.gate_up(batch) for batch in batches]
    num_hit = sum(batch.num_hit() for batch in batches) / len(batches)
    num_pairs, matrix = num_tokens * s.num_chosen, s.inner * s.hidden
    up_bytes = num_hit * 2 * matrix * width + num_pairs * (s.hidden + s.inner) * width
    down_bytes = num_hit * matrix * width + num_pairs * (s.inner * width + s.hidden * 2)
    up_flops, down_flops = 4.0 * num_pairs * matrix, 2.0 * num_pairs * matrix
    counts = no_counts(s)
    case = partial(
        Case,
        size=f"B={num_tokens}{note}",
        flops_ceiling=layer.name,
        tolerance=0.05 if layer.is_fp8 else 1e-2,
    )
    yield case(
        operation=f"gate_up {layer.name}",
        launches=[partial(layer.gate_up, batch) for batch in batches],
        bytes_moved=up_bytes,
        flops=up_flops,
        error=partial(layer.gate_up_error, batches[0]),
        others=_grouped(layer, batches, layer.experts.gate_up_EHD, [b.x_AD for b in batches]),
    )
    yield case(
        operation=f"down {layer.name}",
        launches=[partial(layer.down, b, h) for b, h in zip(batches, hidden, strict=True)],
        bytes_moved=down_bytes,
        flops=down_flops,
        error=partial(layer.down_error, batches[0], hidden[0]),
        others=_grouped(layer, batches, layer.experts.down_EDF, hidden),
    )
    yield case(
        operation=f"expert_mlp {layer.name}",
        launches=[partial(layer.whole, batch, counts) for batch in batches],
        bytes_moved=up_bytes + down_bytes,
        flops=up_flops + down_flops,
        error=partial(layer.whole_error, batches[0], counts),
    )


def _grouped(
    layer: Layer, batches: list[Batch], weight_EOI: torch.Tensor, inputs: list[torch.Tensor]
) -> dict[str, list[Launch]]:
    """Torch's own grouped product of the same rows, without what ours fuses."""
    turned_EIO = weight_EOI.transpose(1, 2)
    ends = [batch.schedule.offsets_E1[1:] for batch in batches]
    pairs = list(zip(inputs, ends, strict=True))
    if not layer.is_fp8:
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
