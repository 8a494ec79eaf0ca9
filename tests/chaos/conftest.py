"""What tests that break cells stand on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import checkpoints
import pytest
from local_cell import ProcessPool


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of two layers."""
    directory = tmp_path_factory.mktemp("tiny")
    checkpoints.make_tiny_checkpoint(directory, num_layers=2)
    return directory


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    """Processes of ranks; a module's tests build their cells from the same ones."""
    pool = ProcessPool()
    yield pool
    pool.close()
