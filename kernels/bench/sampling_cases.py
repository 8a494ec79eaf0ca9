"""Cases of sampling: a batch's next tokens, by what the rows ask for.

Shape letters: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from ostro.kernels.batch_sampling import Draws, sample_rows_reference
from ostro.kernels.bench.measure import Case, num_variants
from ostro.kernels.bench.sizes import Sizes
from ostro.kernels.gpu.sampling import sample_rows_triton
from ostro.kernels.sampling import Draw, uniform

BATCHES = (1, 32, 128)
_SPREAD = 3.0  # of the logits, about a language model's
_SETTINGS = {
    "greedy": Draw(uniform=0.0, temperature=0.0),
    "plain": Draw(uniform=0.0, temperature=0.7),
    "top_p": Draw(uniform=0.0, temperature=0.7, top_p=0.9),
    "top_k": Draw(uniform=0.0, temperature=0.7, top_k=50),
}


def cases(sizes: Sizes, batches: Sequence[int] = BATCHES) -> Iterator[Case]:
    """All rows of a batch alike."""
    for num_rows in batches:
        num_bytes = num_rows * sizes.vocabulary * 4
        logits = [
            sizes.randn(num_rows, sizes.vocabulary, scale=_SPREAD).float()
            for _ in range(num_variants(num_bytes))
        ]
        for name in _SETTINGS:
            yield _case(name, logits)


def _case(name: str, logits: list[torch.Tensor]) -> Case:
    num_rows = len(logits[0])
    setting = _SETTINGS[name]
    rows = [
        Draw(uniform(0, row), setting.temperature, setting.top_k, setting.top_p)
        for row in range(num_rows)
    ]
    draws = Draws.of(rows, logits[0].device)

    def error() -> float:
        found_B = sample_rows_triton(logits[0], draws)
        # Sums in another order may move a token that lies next to a row's uniform number.
        return float((found_B != sample_rows_reference(logits[0], draws)).float().mean())

    return Case(
        operation=f"sample {name}",
        size=f"B={num_rows}",
        launches=[partial(sample_rows_triton, logits_BV, draws) for logits_BV in logits],
        bytes_moved=logits[0].numel() * 4,
        error=error,
        tolerance=1 / 32,
    )
