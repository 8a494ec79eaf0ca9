"""Launches of the experts' kernels in the sizes of Mistral Small 4, for the compile gate."""

from __future__ import annotations

import torch

from ostro.kernels.gpu.gate import gate_triton

_NUM_EXPERTS, _HIDDEN = 128, 4096


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _gate() -> None:
    gate_triton(_meta(64, _HIDDEN), _meta(_NUM_EXPERTS, _HIDDEN, dtype=torch.float32), 4)


LAUNCHES = {"gate": _gate}
