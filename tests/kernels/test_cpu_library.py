"""Where the CPU operators come from, and what is said where they cannot be had."""

from __future__ import annotations

import fcntl
import stat
from pathlib import Path

import pytest

from ostro.kernels.cpu import library

EVERY_FLAG = frozenset(library._CPU_FLAGS)
NUM_SOURCES = len(list(Path(library.__file__).parent.glob("*.cpp")))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A processor that has everything, an empty cache, and a compiler that writes its output."""
    monkeypatch.setattr(library, "_processor_flags", lambda: EVERY_FLAG)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    use_compiler(tmp_path, monkeypatch, 'echo run >> "$0.log"; eval "touch \\${$#}"')
    return tmp_path


def use_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    compiler = folder / "cxx"
    compiler.write_text(f"#!/bin/bash\n{script}\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))


def num_runs(machine: Path) -> int:
    return len((machine / "cxx.log").read_text().splitlines())


def test_the_library_is_compiled_once_and_kept(machine: Path) -> None:
    first = library._built()
    assert first.is_file()
    assert first.parent == machine / "cache" / "ostro"
    assert num_runs(machine) == NUM_SOURCES + 1  # the last is the link
    assert library._built() == first
    assert num_runs(machine) == NUM_SOURCES + 1
    assert not list(first.parent.glob("tmp*"))


def test_another_processor_gets_a_library_of_its_own(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = library._built()
    monkeypatch.setattr(library, "_processor_flags", lambda: EVERY_FLAG | {"amx_bf16"})
    assert library._built() != first


def test_an_older_processor_is_named_by_what_it_lacks(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_processor_flags", lambda: EVERY_FLAG - {"avx512_bf16"})
    assert library.why_absent() == "the processor has no avx512_bf16"


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_compiler(machine, monkeypatch, "echo no such header >&2; exit 1")
    assert "no such header" in str(library.why_absent())
    assert not list((machine / "cache" / "ostro").glob("*.so"))


def test_no_compiler_tells_the_way_out(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(machine / "nowhere"))
    assert "install g++ or set CXX" in str(library.why_absent())


def test_waiting_for_another_process_ends(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_LOCK_TIMEOUT_S", 0.1)
    (machine / "cache" / "ostro").mkdir(parents=True)
    with (machine / "cache" / "ostro" / "cpu_operators.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process" in str(library.why_absent())
