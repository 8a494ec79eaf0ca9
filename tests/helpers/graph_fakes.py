"""Graphs where there is no GPU: what would be captured is computed again at every replay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ostro.actors.model.batch import Batch
from ostro.actors.model.cuda_graphs import RowGraphs


class _Replayed:
    """Stands for a graph."""

    def __init__(self, replay: Callable[[], None]) -> None:
        self.replay = replay


def replay_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `RowGraphs` capture nothing."""

    def capture(
        self: RowGraphs, compute: Callable[[Batch], None], batch: Batch, pool: object
    ) -> _Replayed:
        return _Replayed(lambda: compute(batch))

    monkeypatch.setattr(RowGraphs, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
