"""Cases of what stands between the large products: gate, norms, sorting, rounding.

Shape letters: T tokens, K experts per token, A = T * K pairs, D hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from ostro.kernels.bench.expert_layers import chosen_experts, no_counts
from ostro.kernels.bench.measure import Case, num_variants, poison, relative_error
from ostro.kernels.bench.sizes import Sizes
from ostro.kernels.combine import PairRows, combine_norm_reference, sum_pairs_reference
from ostro.kernels.fp8_linear import quantize_fp8_reference
from ostro.kernels.gate import gate_reference
from ostro.kernels.gpu.combine import combine_norm_triton
from ostro.kernels.gpu.expert_schedule import expert_schedule_reference, expert_schedule_triton
from ostro.kernels.gpu.fp8_linear import quantize_fp8_triton
from ostro.kernels.gpu.gate import gate_triton
from ostro.kernels.gpu.permute import permute_reference, permute_triton
from ostro.kernels.gpu.rms_norm import rms_norm_triton
from ostro.kernels.gpu.sum_pairs import sum_pairs_triton
from ostro.kernels.gpu.tiles import block_rows
from ostro.kernels.rms_norm import rms_norm_reference

BATCHES = (1, 64, 2048)
_EPS = 1e-6
_NUM_PARTS = 4  # expert shards that answer
_TOLERANCE = 1e-2


def cases(sizes: Sizes, batches: Sequence[int] = BATCHES) -> Iterator[Case]:
    """Every small kernel, by tokens."""
    for num_tokens in batches:
        yield _gate(sizes, num_tokens)
        yield _rms_norm(sizes, num_tokens)
        yield _combine_norm(sizes, num_tokens)
        yield from _sorting(sizes, num_tokens)
        yield _quantize(sizes, num_tokens)


def _gate(sizes: Sizes, num_tokens: int) -> Case:
    s = sizes
    gate_bytes = s.num_experts * s.hidden * 2  # in bf16, as the official gate is exact in it
    gates = [s.randn(s.num_experts, s.hidden) for _ in range(num_variants(gate_bytes))]
    x_TD = s.randn(num_tokens, s.hidden, scale=s.hidden**-0.5)

    def dense(chosen: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        weight_TE = torch.zeros(num_tokens, s.num_experts, device=s.device)
        return weight_TE.scatter_(1, *chosen)

    def error() -> float:
        # By weights: where two logits are equal to the last bits, either choice is right.
        expected = dense(gate_reference(x_TD, gates[0].float(), s.num_chosen))
        return relative_error(dense(gate_triton(x_TD, gates[0], s.num_chosen)), expected)

    return Case(
        operation="gate",
        size=f"T={num_tokens}",
        launches=[partial(gate_triton, x_TD, gate, s.num_chosen) for gate in gates],
        bytes_moved=gate_bytes + num_tokens * (s.hidden * 2 + s.num_chosen * 12),
        error=error,
        tolerance=2 * _TOLERANCE,
    )


def _rms_norm(sizes: Sizes, num_tokens: int) -> Case:
    s, norm_D = sizes, sizes.randn(sizes.hidden)
    num_bytes = num_tokens * s.hidden * 4
    rows = [s.randn(num_tokens, s.hidden) for _ in range(num_variants(num_bytes))]

    def error() -> float:
        expected = rms_norm_reference(rows[0].float(), norm_D.float(), _EPS)
        poison(num_bytes // 2, s.device)
        return relative_error(rms_norm_triton(rows[0], norm_D, _EPS), expected)

    normed = partial(torch.nn.functional.rms_norm, normalized_shape=(s.hidden,), weight=norm_D)
    return Case(
        operation="rms_norm",
        size=f"T={num_tokens}",
        launches=[partial(rms_norm_triton, x_TD, norm_D, _EPS) for x_TD in rows],
        bytes_moved=num_bytes,
        error=error,
        tolerance=_TOLERANCE,
        others={"torch": [partial(normed, x_TD, eps=_EPS) for x_TD in rows]},
    )


def _combine_norm(sizes: Sizes, num_tokens: int) -> Case:
    s, norm_D = sizes, sizes.randn(sizes.hidden)
    num_bytes = num_tokens * s.hidden * 2 * (_NUM_PARTS + 4)
    layers = [
        [s.randn(num_tokens, s.hidden) for _ in range(_NUM_PARTS + 2)]
        for _ in range(num_variants(num_bytes))
    ]
    launches = [
        partial(combine_norm_triton, parts, shared_TD, residual_TD, norm_D, _EPS)
        for *parts, shared_TD, residual_TD in layers
    ]

    def error() -> float:
        *parts, shared_TD, residual_TD = layers[0]
        expected = combine_norm_reference(parts, shared_TD, residual_TD, norm_D, _EPS)
        poison(num_tokens * s.hidden * 2, s.device)
        return relative_error(torch.cat(launches[0]()), torch.cat(expected))

    return Case(
        operation=f"combine_norm/{_NUM_PARTS}",
        size=f"T={num_tokens}",
        launches=launches,
        bytes_moved=num_bytes,
        error=error,
        tolerance=_TOLERANCE,
    )


def _sorting(sizes: Sizes, num_tokens: int) -> Iterator[Case]:
    s, size = sizes, f"T={num_tokens}"
    expert_TK = chosen_experts(s, num_tokens)
    num_pairs = expert_TK.numel()
    rows = block_rows(num_pairs, s.num_experts)
    schedule = expert_schedule_triton(expert_TK, s.num_experts, rows, no_counts(s))
    counts = no_counts(s)
    scale_E = torch.rand(s.num_experts, device=s.device) + 0.5
    out_bytes = num_pairs * s.hidden
    inputs = [s.randn(num_tokens, s.hidden) for _ in range(num_variants(out_bytes))]
    pairs = [s.randn(num_pairs, s.hidden) for _ in range(num_variants(2 * out_bytes))]

    def schedule_error() -> float:
        counts = no_counts(s), no_counts(s)
        expected = expert_schedule_reference(expert_TK, s.num_experts, rows, counts[0])
        found = expert_schedule_triton(expert_TK, s.num_experts, rows, counts[1])
        same = (
            torch.equal(found.order_A, expected.order_A)
            and torch.equal(found.offsets_E1, expected.offsets_E1)
            and torch.equal(found.tiles_N2[: int(found.num_tiles)], expected.tiles_N2)
            and torch.equal(*counts)
        )
        return 0.0 if same else 1.0

    def permute_error() -> float:
        expected = permute_reference(inputs[0], expert_TK, schedule, scale_E)
        poison(out_bytes, s.device)
        out_AD = permute_triton(inputs[0], expert_TK, schedule, scale_E)
        return relative_error(out_AD.float(), expected.float())

    def sum_error() -> float:
        expected = sum_pairs_reference(PairRows(pairs[0].float(), expert_TK))
        poison(num_tokens * s.hidden * 2, s.device)
        return relative_error(sum_pairs_triton(pairs[0], expert_TK), expected)

    yield Case(
        operation="expert_schedule",
        size=size,
        launches=[partial(expert_schedule_triton, expert_TK, s.num_experts, rows, counts)],
        bytes_moved=num_pairs * 12.0,
        error=schedule_error,
        tolerance=0.0,
    )
    yield Case(
        operation="permute fp8",
        size=size,
        launches=[partial(permute_triton, x, expert_TK, schedule, scale_E) for x in inputs],
        bytes_moved=out_bytes + num_tokens * s.hidden * 2,
        error=permute_error,
        tolerance=_TOLERANCE,
    )
    yield Case(
        operation="sum_pairs",
        size=size,
        launches=[partial(sum_pairs_triton, y, expert_TK) for y in pairs],
        bytes_moved=2 * out_bytes + num_tokens * s.hidden * 2,
        error=sum_error,
        tolerance=_TOLERANCE,
    )


def _quantize(sizes: Sizes, num_tokens: int) -> Case:
    s, scale = sizes, torch.tensor(1 / 32, device=sizes.device)
    num_bytes = num_tokens * s.hidden * 3
    rows = [s.randn(num_tokens, s.hidden) for _ in range(num_variants(num_bytes))]

    def error() -> float:
        expected = quantize_fp8_reference(rows[0], scale)
        poison(expected.numel(), s.device)
        return relative_error(quantize_fp8_triton(rows[0], scale).float(), expected.float())

    return Case(
        operation="quantize_fp8",
        size=f"T={num_tokens}",
        launches=[partial(quantize_fp8_triton, x_TD, scale) for x_TD in rows],
        bytes_moved=num_bytes,
        error=error,
        tolerance=0.0,
    )
