"""Launches of FP8 linear layers of few rows in Mistral Small 4's sizes, for the compile gate."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ostro.kernels.fp8_linear import Fp8Rows, Fp8Weight
from ostro.kernels.gpu.fp8_linear import MAX_FEW_ROWS, fp8_linear_triton

_OUTPUTS, _INPUTS = 4096, 4096


def _few_rows(num_rows: int, *, is_rounded: bool) -> None:
    scale = torch.empty((), dtype=torch.float32, device="meta")
    values_OI = torch.empty(_OUTPUTS, _INPUTS, dtype=torch.float8_e4m3fn, device="meta")
    weight = Fp8Weight(values_OI=values_OI, scale=scale, input_scale=scale)
    dtype = torch.float8_e4m3fn if is_rounded else torch.bfloat16
    rows_TI = torch.empty(num_rows, _INPUTS, dtype=dtype, device="meta")
    rounded = Fp8Rows(values_TI=rows_TI, dtype=torch.bfloat16)
    fp8_linear_triton(rounded if is_rounded else rows_TI, weight)


LAUNCHES: dict[str, Callable[[], None]] = {
    f"fp8_linear_{num_rows}{'_rounded' * is_rounded}": functools.partial(
        _few_rows, num_rows, is_rounded=is_rounded
    )
    for num_rows in (1, MAX_FEW_ROWS)
    for is_rounded in (False, True)
}
