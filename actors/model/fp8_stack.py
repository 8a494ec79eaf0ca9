"""FP8 matrices of a shard's experts, one stack for each kind, as they are filled from a checkpoint.

Shape letters: E local experts, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Stack:
    """A matrix of each local expert, and its scales in float32."""

    values_EOI: torch.Tensor
    scale_E: torch.Tensor
    input_scale_E: torch.Tensor


def new_fp8_stack(num_slots: int, shape: Sequence[int], device: torch.device) -> Fp8Stack:
    """Memory for matrices [O, I], not written yet."""
    return Fp8Stack(
        values_EOI=torch.empty((num_slots, *shape), dtype=torch.float8_e4m3fn, device=device),
        scale_E=torch.empty(num_slots, device=device),
        input_scale_E=torch.empty(num_slots, device=device),
    )
