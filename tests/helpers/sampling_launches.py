"""Launches of sampling for Mistral Small 4's vocabulary, for the compile gate."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ostro.kernels.batch_sampling import Draws
from ostro.kernels.gpu.log_normalizer import log_normalizer_triton
from ostro.kernels.gpu.sampling import sample_rows_triton

_ROWS, _VOCABULARY = 64, 131072


def _logits() -> torch.Tensor:
    return torch.empty(_ROWS, _VOCABULARY, device="meta")


def _sample_rows(*, is_greedy: bool, is_filtered: bool, is_masked: bool) -> None:
    draws = Draws(
        settings_B5=torch.empty(_ROWS, 5, dtype=torch.float64, device="meta"),
        is_greedy=is_greedy,
        is_filtered=is_filtered,
    )
    allowed_BW = torch.empty(_ROWS, _VOCABULARY // 32, dtype=torch.int32, device="meta")
    sample_rows_triton(_logits(), draws, allowed_BW if is_masked else None)


def _log_normalizer() -> None:
    log_normalizer_triton(_logits())


def _launch(*, is_greedy: bool, is_filtered: bool, is_masked: bool) -> Callable[[], None]:
    return functools.partial(
        _sample_rows, is_greedy=is_greedy, is_filtered=is_filtered, is_masked=is_masked
    )


LAUNCHES: dict[str, Callable[[], None]] = {
    "greedy": _launch(is_greedy=True, is_filtered=False, is_masked=False),
    "drawn": _launch(is_greedy=False, is_filtered=False, is_masked=False),
    "filtered": _launch(is_greedy=False, is_filtered=True, is_masked=False),
    "filtered_masked": _launch(is_greedy=False, is_filtered=True, is_masked=True),
    "log_normalizer": _log_normalizer,
}
