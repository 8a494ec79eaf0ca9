"""The compile gate: every kernel compiles for both architectures, and to what was meant.

The recorded figures make an upgrade of Triton, or a change of a kernel, show as a difference; write
them anew with `tests/helpers/compile_gate.py MODULE --write FILE` and read the difference.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import triton
from compile_gate import ARCHITECTURES, MAX_SHARED_BYTES, Compiled, compiled, from_json

# Each record holds the launches of a module in tests/helpers.
MODULE_OF_RECORD = {
    "decode.json": "decode_launches",
    "experts.json": "expert_launches",
    "linear.json": "linear_launches",
    "prefill.json": "prefill_launches",
    "sampling.json": "sampling_launches",
}
# Compiled by every run; the others by the slow one.
EVERY_RUN = {
    "decode.json": ("attend_latents", "attend_latents_fp8"),
    "experts.json": ("gate", "experts_fp8_1_shared", "experts_fp8_16", "experts_nvfp4_16"),
    "linear.json": ("fp8_linear_1_rounded", "nvfp4_linear_16"),
    "prefill.json": ("attend_8192",),
    "sampling.json": ("filtered",),
}

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
def test_records_are_of_the_triton_that_is_pinned(record: str) -> None:
    pins = (Path(__file__).parents[3] / "constraints.txt").read_text().splitlines()
    assert f"triton=={_recorded(record)['triton']}" in pins, "write the records anew and read them"


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
    assert set(_launches(record)) == set(importlib.import_module(MODULE_OF_RECORD[record]).LAUNCHES)
    for name, by_architecture in _launches(record).items():
        assert set(by_architecture) == set(ARCHITECTURES)
        for architecture, kernels in by_architecture.items():
            for kernel, figures in kernels.items():
                where = f"{name}: {kernel} on {architecture}"
                assert figures.spills == 0, where
                assert figures.shared_bytes <= MAX_SHARED_BYTES, where


@pytest.mark.parametrize(
    ("dtype", "architecture", "instruction"),
    [
        ("bf16", "sm_90", "HGMMA"),
        ("bf16", "sm_100", "UTCHMMA"),
        ("fp8", "sm_90", "QGMMA"),
        ("fp8", "sm_100", "UTCQMMA"),
    ],
)
def test_experts_multiply_on_the_tensor_cores_of_their_dtype(
    dtype: str, architecture: str, instruction: str
) -> None:
    launches = {name: by for name, by in _launches("experts.json").items() if f"_{dtype}_" in name}
    assert launches
    for name, by_architecture in launches.items():
        for kernel, figures in by_architecture[architecture].items():
            if not kernel.startswith(("_gate_up_", "_down_")):
                continue
            assert {kind.split(".")[0] for kind in figures.mma} == {instruction}, (name, kernel)
            assert figures.num_tma_loads, (name, kernel)


@pytest.mark.parametrize(
    ("architecture", "instruction"), [("sm_90", "HGMMA"), ("sm_100", "UTCHMMA")]
)
def test_nvfp4_experts_multiply_in_bf16(architecture: str, instruction: str) -> None:
    launches = {name: by for name, by in _launches("experts.json").items() if "_nvfp4_" in name}
    assert launches
    for name, by_architecture in launches.items():
        for kernel in ("_gate_up_nvfp4_kernel", "_down_nvfp4_kernel"):
            figures = by_architecture[architecture][kernel]
            assert {kind.split(".")[0] for kind in figures.mma} == {instruction}, (name, kernel)
            assert figures.num_tma_loads, (name, kernel)


@pytest.mark.parametrize(
    ("architecture", "instruction"), [("sm_90", "HGMMA"), ("sm_100", "UTCHMMA")]
)
def test_nvfp4_linear_layers_multiply_in_bf16(architecture: str, instruction: str) -> None:
    launches = {name: by for name, by in _launches("linear.json").items() if "nvfp4" in name}
    assert len(launches) == 4
    for name, by_architecture in launches.items():
        figures = by_architecture[architecture]["_nvfp4_linear_kernel"]
        assert {kind.split(".")[0] for kind in figures.mma} == {instruction}, name
        assert figures.num_tma_loads, name


def test_few_rows_leave_room_for_several_programs_a_processor() -> None:
    kernel_of = {
        "experts_bf16_16": "_gate_up_kernel",
        "experts_fp8_16": "_gate_up_kernel",
        "experts_bf16_1": "_gate_up_few_kernel",
        "experts_fp8_1_shared": "_gate_up_few_kernel",
        "experts_fp8_2_shared": "_gate_up_few_kernel",
    }
    for name, kernel in kernel_of.items():
        for kernels in _launches("experts.json")[name].values():
            assert kernels[kernel].shared_bytes * 2 <= MAX_SHARED_BYTES


@pytest.mark.parametrize("rows", [16, 32])
def test_few_rows_of_nvfp4_experts_hide_their_arithmetic_behind_other_programs(rows: int) -> None:
    for kernels in _launches("experts.json")[f"experts_nvfp4_{rows}"].values():
        for kernel in ("_gate_up_nvfp4_kernel", "_down_nvfp4_kernel"):
            figures = kernels[kernel]
            assert figures.shared_bytes * 2 <= MAX_SHARED_BYTES
            assert figures.registers * 32 * figures.num_warps * 2 <= 65536


def test_prefill_attends_on_the_tensor_cores() -> None:
    launches = _launches("prefill.json")
    for name in (name for name in launches if name.startswith("attend_")):
        for architecture, instruction in (("sm_90", "HGMMA"), ("sm_100", "UTCHMMA")):
            figures = launches[name][architecture]["_attend_block_kernel"]
            assert {kind.split(".")[0] for kind in figures.mma} == {instruction}, name
            assert figures.num_tma_loads, name


def test_large_chunks_leave_room_for_two_programs_a_processor() -> None:
    for kernels in _launches("prefill.json")["attend_8192"].values():
        figures = kernels["_attend_block_kernel"]
        assert figures.shared_bytes * 2 <= MAX_SHARED_BYTES
        assert figures.registers * 32 * figures.num_warps * 2 <= 65536


@pytest.mark.parametrize("launch", ["attend_latents", "attend_latents_fp8"])
@pytest.mark.parametrize(
    ("architecture", "instruction"), [("sm_90", "HGMMA"), ("sm_100", "UTCHMMA")]
)
def test_keys_meet_every_head_in_one_instruction(
    architecture: str, instruction: str, launch: str
) -> None:
    figures = _launches("decode.json")[launch][architecture]["_attend_kernel"]
    assert {kind.split(".")[0] for kind in figures.mma} == {instruction}
    assert figures.num_tma_loads


def test_fp8_rows_leave_room_for_two_programs_a_processor() -> None:
    for kernels in _launches("decode.json")["attend_latents_fp8"].values():
        figures = kernels["_attend_kernel"]
        assert figures.shared_bytes * 2 <= MAX_SHARED_BYTES
        assert figures.registers * 32 * figures.num_warps * 2 <= 65536
