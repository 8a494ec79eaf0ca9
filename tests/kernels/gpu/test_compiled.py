"""The compile gate: every kernel compiles for both architectures, and to what was meant.

The recorded figures make an upgrade of Triton, or a change of a kernel, show as a difference; write
them anew with `tests/helpers/compile_gate.py MODULE --write FILE` and read the difference.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import triton
from compile_gate import ARCHITECTURES, MAX_SHARED_BYTES, Compiled, compiled, from_json

# Each record holds the launches of a module in tests/helpers.
MODULE_OF_RECORD = {"experts.json": "expert_launches"}
# Compiled by every run; the others by the slow one.
EVERY_RUN = {"experts.json": ("gate",)}

each_record = pytest.mark.parametrize("record", MODULE_OF_RECORD)


def _recorded(record: str) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((Path(__file__).parent / record).read_text())
    return tree


def _launches(record: str) -> Compiled:
    return from_json(_recorded(record)["launches"])


def _assert_as_recorded(record: str, names: list[str]) -> None:
    if triton.__version__ != _recorded(record)["triton"]:
        pytest.skip(f"recorded with Triton {_recorded(record)['triton']}")
    expected = {name: _launches(record)[name] for name in names}
    assert compiled(MODULE_OF_RECORD[record], names) == expected


@each_record
def test_chosen_launches_compile_as_recorded(record: str) -> None:
    _assert_as_recorded(record, list(EVERY_RUN[record]))


@pytest.mark.slow
@pytest.mark.timeout(900)
@each_record
def test_every_launch_compiles_as_recorded(record: str) -> None:
    _assert_as_recorded(record, list(_launches(record)))


@each_record
def test_kernels_fit_registers_and_shared_memory(record: str) -> None:
    for name, by_architecture in _launches(record).items():
        assert set(by_architecture) == set(ARCHITECTURES)
        for architecture, kernels in by_architecture.items():
            for kernel, figures in kernels.items():
                where = f"{name}: {kernel} on {architecture}"
                assert figures.spills == 0, where
                assert figures.shared_bytes <= MAX_SHARED_BYTES, where
