"""Programs of a launch from far on in its grid, without those before them, in Triton's interpreter.

A kernel's program 2**23 reads and writes far into its tensors. These are made by `torch.empty`:
memory that nobody touches is not there. So a test of places past 2**31 takes a moment and a few
pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


@contextmanager
def untouched_arguments() -> Iterator[None]:
    """Within, launches do not copy their arguments back.

    On a CPU they are the same memory, and to copy a tensor onto itself would touch all of it.
    """
    with mock.patch.object(interpreter.GridExecutor, "_restore_args_dev", return_value=None):
        yield


@contextmanager
def far_programs(*first: int) -> Iterator[None]:
    """Within, the programs of a launch are numbered from `first` on, axis by axis."""
    shifts = (*first, 0, 0)

    def program_id(self: Any, axis: int) -> interpreter.TensorHandle:
        number = np.array([self.grid_idx[axis] + shifts[axis]], dtype=np.int32)
        return interpreter.TensorHandle(number, tl.int32)

    builder = interpreter.InterpreterBuilder
    with (
        untouched_arguments(),
        mock.patch.object(builder, "create_get_program_id", program_id),
    ):
        yield
