"""Launches of the expert path, norm and FP8 rounding in Mistral Small 4's sizes, to be compiled.

Rows are such that an expert's share fills tiles of 16, 32, 64 and 128 rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ostro.kernels.combine import PairRows
from ostro.kernels.fp8_experts import Fp8Experts
from ostro.kernels.gpu.combine import add_residual_triton, combine_norm_triton, combine_triton
from ostro.kernels.gpu.expert_mlp import (
    expert_mlp_fp8_triton,
    expert_mlp_nvfp4_triton,
    expert_mlp_triton,
)
from ostro.kernels.gpu.fp8_linear import quantize_fp8_triton
from ostro.kernels.gpu.gate import gate_triton
from ostro.kernels.gpu.rms_norm import rms_norm_triton
from ostro.kernels.nvfp4_experts import Nvfp4Experts, new_nvfp4_stack

_NUM_EXPERTS, _HIDDEN, _INNER, _NUM_CHOSEN = 128, 4096, 2048, 4
_ROWS_OF_TILE = {16: 64, 32: 512, 64: 1024, 128: 8192}


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _gate(num_tokens: int, dtype: torch.dtype) -> None:
    gate_ED = _meta(_NUM_EXPERTS, _HIDDEN, dtype=dtype)
    gate_triton(_meta(num_tokens, _HIDDEN), gate_ED, _NUM_CHOSEN, always=_NUM_EXPERTS)


def _rows(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return _meta(64, _HIDDEN, dtype=dtype)


def _combine() -> None:
    combine_triton([_rows() for _ in range(8)])


def _add_residual() -> None:
    add_residual_triton(_rows(torch.float32), _rows(), _rows())


def _combine_norm() -> None:
    combine_norm_triton([_rows() for _ in range(8)], _rows(), _rows(), _meta(_HIDDEN), 1e-6)


def _combine_norm_of_sum() -> None:
    combine_norm_triton([_rows()], None, _rows(), _meta(_HIDDEN), 1e-6)


def _combine_norm_of_pairs() -> None:
    expert_TK = _meta(64, _NUM_CHOSEN + 1, dtype=torch.int64)
    pairs = PairRows(_meta(64 * (_NUM_CHOSEN + 1), _HIDDEN), expert_TK)
    combine_norm_triton([pairs], None, _rows(), _meta(_HIDDEN), 1e-6)


def _rms_norm() -> None:
    rms_norm_triton(_rows(), _meta(_HIDDEN), 1e-6)


def _quantize_fp8() -> None:
    quantize_fp8_triton(_rows(), _meta(dtype=torch.float32))


def _routed(
    num_rows: int, num_chosen: int = _NUM_CHOSEN
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        _meta(num_rows, _HIDDEN),
        _meta(num_rows, num_chosen, dtype=torch.int64),
        _meta(num_rows, num_chosen, dtype=torch.float32),
    )


def _experts(num_rows: int) -> None:
    gate_up = _meta(_NUM_EXPERTS, 2 * _INNER, _HIDDEN)
    down = _meta(_NUM_EXPERTS, _HIDDEN, _INNER)
    counts = _meta(1 + _NUM_EXPERTS, dtype=torch.int64)
    expert_mlp_triton(*_routed(num_rows), gate_up, down, counts)


def _experts_fp8(num_rows: int, num_shared: int = 0) -> None:
    num_slots = _NUM_EXPERTS + num_shared
    scale = _meta(num_slots, dtype=torch.float32)
    experts = Fp8Experts(
        gate_up_EHD=_meta(num_slots, 2 * _INNER, _HIDDEN, dtype=torch.float8_e4m3fn),
        gate_up_scale_E=scale,
        gate_up_input_scale_E=scale,
        down_EDF=_meta(num_slots, _HIDDEN, _INNER, dtype=torch.float8_e4m3fn),
        down_scale_E=scale,
        down_input_scale_E=scale,
    )
    counts = _meta(1 + num_slots, dtype=torch.int64)
    routed = _routed(num_rows, _NUM_CHOSEN + num_shared)
    expert_mlp_fp8_triton(*routed, experts, counts)


def _experts_nvfp4(num_rows: int) -> None:
    unit = _meta(_NUM_EXPERTS, dtype=torch.float32)
    experts = Nvfp4Experts(
        gate_up=new_nvfp4_stack(_NUM_EXPERTS, 2 * _INNER, _HIDDEN, "meta"),
        gate_unit_E=unit,
        up_unit_E=unit,
        down=new_nvfp4_stack(_NUM_EXPERTS, _HIDDEN, _INNER, "meta"),
        down_unit_E=unit,
    )
    counts = _meta(1 + _NUM_EXPERTS, dtype=torch.int64)
    expert_mlp_nvfp4_triton(*_routed(num_rows), experts, counts)


LAUNCHES: dict[str, Callable[[], None]] = {
    "gate": functools.partial(_gate, 64, torch.bfloat16),
    "gate_few": functools.partial(_gate, 1, torch.bfloat16),
    "gate_few_float32": functools.partial(_gate, 1, torch.float32),
    "combine": _combine,
    "add_residual": _add_residual,
    "combine_norm": _combine_norm,
    "combine_norm_of_sum": _combine_norm_of_sum,
    "combine_norm_of_pairs": _combine_norm_of_pairs,
    "experts_fp8_1_shared": functools.partial(_experts_fp8, 1, 1),
    "experts_fp8_2_shared": functools.partial(_experts_fp8, 2, 1),
    "experts_bf16_1": functools.partial(_experts, 1),
    "rms_norm": _rms_norm,
    "quantize_fp8": _quantize_fp8,
}
for _tile, _num_rows in _ROWS_OF_TILE.items():
    LAUNCHES[f"experts_bf16_{_tile}"] = functools.partial(_experts, _num_rows)
    LAUNCHES[f"experts_fp8_{_tile}"] = functools.partial(_experts_fp8, _num_rows)
    LAUNCHES[f"experts_nvfp4_{_tile}"] = functools.partial(_experts_nvfp4, _num_rows)
