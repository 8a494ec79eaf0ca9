"""Cases of the expert MLP: one layer's experts in the model's sizes, hit as a batch would.

Shape letters: B tokens, K experts per token, A = B * K pairs, E experts, D hidden, F expert hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ostro.kernels.bench.measure import Case, Launch, relative_error
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

NUM_EXPERTS, HIDDEN, INNER, NUM_CHOSEN = 128, 4096, 2048, 4
BATCHES = (1, 8, 32, 128, 512, 2048, 8192)
_FP8 = torch.float8_e4m3fn
_NUM_VARIANTS = 4  # batches with choices of their own, so that small ones do not find their experts
_SKEW = 1.0  # of the Zipf routing: the i-th expert is chosen like 1 / i


def random_experts(dtype: torch.dtype) -> Fp8Experts:
    """One layer's experts with random weights; in bf16 the scales are one and mean nothing."""
    ones_E = torch.ones(NUM_EXPERTS, device="cuda")
    gate_up = torch.empty(NUM_EXPERTS, 2 * INNER, HIDDEN, dtype=dtype, device="cuda")
    down = torch.empty(NUM_EXPERTS, HIDDEN, INNER, dtype=dtype, device="cuda")
    for stack, num_in in ((gate_up, HIDDEN), (down, INNER)):
        size = 16.0 if dtype == _FP8 else num_in**-0.5
        for weight in stack:
            weight.copy_(torch.randn(weight.shape, device="cuda") * size)
    is_fp8 = dtype == _FP8
    return Fp8Experts(
        gate_up_EHD=gate_up,
        gate_up_scale_E=ones_E * (HIDDEN**-0.5 / 16 if is_fp8 else 1.0),
        gate_up_input_scale_E=ones_E * (1 / 32),
        down_EDF=down,
        down_scale_E=ones_E * (INNER**-0.5 / 16 if is_fp8 else 1.0),
        down_input_scale_E=ones_E * (1 / 64),
    )


@dataclass(frozen=True, slots=True)
class _Batch:
    """Rows, their experts, and what the products need of them."""

    rows_RD: torch.Tensor
    expert_RK: torch.Tensor
    weight_RK: torch.Tensor
    schedule: ExpertSchedule
    x_AD: torch.Tensor

    def num_hit(self) -> int:
        return len(self.expert_RK.unique())


def _batch(num_tokens: int, skew: float, experts: Fp8Experts) -> _Batch:
    """Tokens that choose four different experts, expert i with weight (i + 1) ** -skew."""
    rows_RD = torch.randn(num_tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    weight_E = torch.arange(1, NUM_EXPERTS + 1, device="cuda").float() ** -skew
    shuffled_E = weight_E[torch.randperm(NUM_EXPERTS, device="cuda")]
    expert_RK = torch.multinomial(shuffled_E.expand(num_tokens, -1), NUM_CHOSEN)
    weight_RK = torch.softmax(torch.randn(num_tokens, NUM_CHOSEN, device="cuda"), dim=1)
    counts = torch.zeros(1 + NUM_EXPERTS, dtype=torch.int64, device="cuda")
    rows = block_rows(expert_RK.numel(), NUM_EXPERTS)
    schedule = expert_schedule_triton(expert_RK, NUM_EXPERTS, rows, counts)
    is_fp8 = experts.gate_up_EHD.dtype == _FP8
    scale_E = experts.gate_up_input_scale_E if is_fp8 else None
    return _Batch(
        rows_RD, expert_RK, weight_RK, schedule, permute_triton(rows_RD, expert_RK, schedule, scale_E)
    )


class Layer:
    """One layer's experts and batches for them, for the benchmark and for the sweep of tiles."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.is_fp8 = dtype == _FP8
        self.name = "fp8" if self.is_fp8 else "bf16"
        self.experts = random_experts(dtype)

    def batches(self, num_tokens: int, skew: float = 0.0) -> list[_Batch]:
        """Several, with choices of their own."""
        return [_batch(num_tokens, skew, self.experts) for _ in range(_NUM_VARIANTS)]

    def gate_up(self, batch: _Batch, cut: Tile | None = None) -> torch.Tensor:
        """The first product of a batch."""
        e = self.experts
        scales = (e.gate_up_scale_E, e.gate_up_input_scale_E, e.down_input_scale_E)
        scale_E, input_scale_E, next_E = scales if self.is_fp8 else (None, None, None)
        return gate_up_triton(
            batch.x_AD,
            e.gate_up_EHD,
            batch.schedule,
            scale_E=scale_E,
            input_scale_E=input_scale_E,
            next_input_scale_E=next_E,
            cut=cut,
        )

    def down(self, batch: _Batch, hidden_AF: torch.Tensor, cut: Tile | None = None) -> torch.Tensor:
        """The second product of a batch."""
        e = self.experts
        return down_triton(
            hidden_AF,
            e.down_EDF,
            batch.weight_RK,
            batch.schedule,
            torch.bfloat16,
            scale_E=e.down_scale_E if self.is_fp8 else None,
            input_scale_E=e.down_input_scale_E if self.is_fp8 else None,
            cut=cut,
        )

    def whole(self, batch: _Batch, counts: torch.Tensor) -> torch.Tensor:
        """All five launches of a batch."""
        routed = (batch.rows_RD, batch.expert_RK, batch.weight_RK)
        e = self.experts
        if self.is_fp8:
            return expert_mlp_fp8_triton(*routed, e, counts)
        return expert_mlp_triton(*routed, e.gate_up_EHD, e.down_EDF, counts)


def cases(layer: Layer) -> Iterator[Case]:
    """Both products and the whole expert MLP, evenly routed and skewed."""
    for num_tokens in BATCHES:
        yield from _cases(layer, num_tokens, "", 0.0)
    yield from _cases(layer, 32, " skewed", _SKEW)
    yield from _cases(layer, 2048, " skewed", _SKEW)


def _cases(layer: Layer, num_tokens: int, note: str, skew: float) -> Iterator[Case]:
    batches = layer.batches(num_tokens, skew)
    hidden = [layer.gate_up(batch) for batch in batches]
    num_hit = sum(batch.num_hit() for batch in batches) / len(batches)
    num_pairs, width = num_tokens * NUM_CHOSEN, layer.dtype.itemsize
    up_bytes = num_hit * 2 * INNER * HIDDEN * width + num_pairs * (HIDDEN + INNER) * width
    down_bytes = num_hit * INNER * HIDDEN * width + num_pairs * (INNER * width + HIDDEN * 2)
    up_flops, down_flops = (n * num_pairs * INNER * HIDDEN for n in (4.0, 2.0))
    size = f"B={num_tokens}{note}"
    counts = torch.zeros(1 + NUM_EXPERTS, dtype=torch.int64, device="cuda")

    def case(operation: str, launches: list[Launch], **fields: object) -> Case:
        return Case(
            operation=f"{operation} {layer.name}",
            size=size,
            launches=launches,
            flops_ceiling=layer.name,
            tolerance=0.05 if layer.is_fp8 else 1e-2,
            **fields,  # type: ignore[arg-type]
        )

    yield case(
        "gate_up",
        [lambda b=b: layer.gate_up(b) for b in batches],
        bytes_moved=up_bytes,
        flops=up_flops,
        error=lambda: _gate_up_error(layer, batches[0]),
        others=_grouped_mm(layer, batches, layer.experts.gate_up_EHD, [b.x_AD for b in batches]),
    )
    yield case(
        "down",
        [lambda b=b, h=h: layer.down(b, h) for b, h in zip(batches, hidden, strict=True)],
        bytes_moved=down_bytes,
        flops=down_flops,
        error=lambda: _down_error(layer, batches[0], hidden[0]),
        others=_grouped_mm(layer, batches, layer.experts.down_EDF, hidden),
    )
    yield case(
        "expert_mlp",
        [lambda b=b: layer.whole(b, counts) for b in batches],
        bytes_moved=up_bytes + down_bytes,
        flops=up_flops + down_flops,
        error=lambda: _whole_error(layer, batches[0], counts),
        others={},
    )


def _gate_up_error(layer: Layer, batch: _Batch) -> float:
    e = layer.experts
    expected = gate_up_reference(
        batch.x_AD,
        e.gate_up_EHD,
        batch.schedule,
        scale_E=e.gate_up_scale_E if layer.is_fp8 else None,
        input_scale_E=e.gate_up_input_scale_E if layer.is_fp8 else None,
        next_input_scale_E=e.down_input_scale_E if layer.is_fp8 else None,
    )
    _poison(batch.x_AD.shape[0] * INNER * layer.dtype.itemsize)
    return relative_error(layer.gate_up(batch)[: len(expected)].float(), expected.float())


def _down_error(layer: Layer, batch: _Batch, hidden_AF: torch.Tensor) -> float:
    e = layer.experts
    expected = down_reference(
        hidden_AF,
        e.down_EDF,
        batch.weight_RK,
        batch.schedule,
        torch.float32,
        scale_E=e.down_scale_E if layer.is_fp8 else None,
        input_scale_E=e.down_input_scale_E if layer.is_fp8 else None,
    )
    _poison(expected.numel() * 2)
    return relative_error(layer.down(batch, hidden_AF), expected)


def _whole_error(layer: Layer, batch: _Batch, counts: torch.Tensor) -> float:
    """Against the same products without tiles, from the same roundings."""
    hidden_AF = layer.gate_up(batch)
    e = layer.experts
    y_AD = down_reference(
        hidden_AF,
        e.down_EDF,
        batch.weight_RK,
        batch.schedule,
        torch.float32,
        scale_E=e.down_scale_E if layer.is_fp8 else None,
        input_scale_E=e.down_input_scale_E if layer.is_fp8 else None,
    )
    return relative_error(layer.whole(batch, counts), y_AD.view(-1, NUM_CHOSEN, HIDDEN).sum(1))


def _poison(num_bytes: int) -> None:
    """Leave NaN in memory that the allocator hands out next."""
    torch.full((num_bytes,), 0xFF, dtype=torch.uint8, device="cuda")


def _grouped_mm(
    layer: Layer, batches: list[_Batch], weight_EOI: torch.Tensor, inputs: list[torch.Tensor]
) -> dict[str, list[Launch]]:
    """Torch's own grouped product of the same rows, without what ours fuses."""
    turned = weight_EOI.transpose(1, 2)
    if not layer.is_fp8:
        return {
            "torch.grouped_mm": [
                lambda x=x, b=b: torch._grouped_mm(x, turned, offs=b.schedule.offsets_E1[1:])
                for x, b in zip(inputs, batches, strict=True)
            ]
        }
    row_scale = torch.ones(max(len(x) for x in inputs), device="cuda")
    out_scale = torch.ones(weight_EOI.shape[:2], device="cuda")
    return {
        "torch.scaled_grouped_mm": [
            lambda x=x, b=b: torch._scaled_grouped_mm(
                x,
                turned,
                row_scale[: len(x)],
                out_scale,
                offs=b.schedule.offsets_E1[1:],
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
            for x, b in zip(inputs, batches, strict=True)
        ]
    }
