"""Triton's interpreter made right for bfloat16 and float8.

The interpreter computes with numpy, which knows neither type: bfloat16 sums and products are wrong
without a word (it adds the bit patterns), casts to bfloat16 truncate and casts to float8 are off by
up to one. Here torch does the casts (to nearest even; saturating in float8), and arithmetic and
`tl.dot` on narrow types run in float32. Not covered: reductions and `tl.fma` of bfloat16, which
kernels do in float32.

Holds for Triton 3.6.0 to 3.9.0. `repair` must run after TRITON_INTERPRET is set and before the
first kernel runs; without that variable it does nothing to compiled kernels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH_OF = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
_FLOAT8 = (tl.float8e4nv, tl.float8e5)
_SIGNED = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}  # what torch can view
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # how numpy keeps bits here
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)

_is_repaired = False


def repair() -> None:
    """Mend the interpreter of this process; a second call does nothing."""
    global _is_repaired
    if _is_repaired:
        return
    _is_repaired = True
    interpreter._convert_float = _faithful_convert(interpreter._convert_float)
    builder = interpreter.InterpreterBuilder
    for name in ("unary_op", "binary_op", "ternary_op"):
        setattr(builder, name, _in_float32(getattr(builder, name)))
    builder.create_dot = _faithful_dot(builder.create_dot)
    executor = interpreter.GridExecutor
    executor.__call__ = _without_numpy_warnings(executor.__call__)


def _without_numpy_warnings(original: Callable[..., Any]) -> Callable[..., Any]:
    """No GPU warns of a NaN, and lanes that nobody reads may well hold some.

    Triton 3.6.0 also takes bounds of loops in a way that numpy deprecates.
    """

    def launch(self: Any, *args: Any, **options: Any) -> Any:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Conversion of an array with ndim > 0")
            return original(self, *args, **options)

    return launch


def _from_bits(bits: np.ndarray, dtype: tl.dtype) -> torch.Tensor:
    bits = np.ascontiguousarray(bits)
    return torch.from_numpy(bits.view(_SIGNED[bits.itemsize])).view(_TORCH_OF[dtype])


def _to_bits(values: torch.Tensor) -> np.ndarray:
    size = values.element_size()
    return values.view(getattr(torch, np.dtype(_SIGNED[size]).name)).numpy().view(_UNSIGNED[size])


def _faithful_convert(original: Callable[..., Any]) -> Callable[..., Any]:
    def convert(bits: Any, source: tl.dtype, target: tl.dtype, rounding: Any) -> Any:
        is_ours = source in _TORCH_OF and target in _TORCH_OF
        if not is_ours or rounding == interpreter._ir.ROUNDING_MODE.RTZ:
            return original(bits, source, target, rounding)
        values = _from_bits(bits, source)
        if target in _FLOAT8:
            largest = torch.finfo(_TORCH_OF[target]).max
            values = values.float().clamp(-largest, largest)
        return _to_bits(values.to(_TORCH_OF[target])).reshape(np.shape(bits))

    return convert


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _wide(handle: Any) -> np.ndarray:
    """The handle's values as float32, or as they are if numpy knows their type."""
    dtype = handle.dtype.scalar
    if dtype == tl.bfloat16 or dtype in _FLOAT8:
        return _from_bits(handle.data, dtype).float().numpy()
    return handle.data


def _in_float32(original: Callable[..., Any]) -> Callable[..., Any]:
    def operate(self: Any, *args: Any) -> Any:
        *operands, operation = args
        first = operands[0]
        if not _is_bfloat16(first) or first.data.dtype != np.uint16 or operation in _BITWISE:
            return original(self, *args)
        result = operation(
            *[_wide(operand) if _is_bfloat16(operand) else operand.data for operand in operands]
        )
        if result.dtype == np.bool_:
            return interpreter.TensorHandle(result, tl.int1)
        bits = _to_bits(torch.from_numpy(np.ascontiguousarray(result)).to(torch.bfloat16))
        return interpreter.TensorHandle(bits.reshape(result.shape), tl.bfloat16)

    return operate


def _faithful_dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, sum_: Any, *options: Any) -> Any:
        dtype = a.dtype.scalar
        if dtype not in (tl.bfloat16, tl.float16, *_FLOAT8):
            return original(self, a, b, sum_, *options)
        product = np.matmul(_wide(a).astype(np.float32), _wide(b).astype(np.float32))
        total = product.astype(sum_.data.dtype) + sum_.data
        return interpreter.TensorHandle(total, sum_.dtype.scalar)

    return create_dot
