"""Rules of the house that no linter knows."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent
_ROOMS = ("cluster", "actors", "kernels", "protos", "configs")
_MAX_LINES = 400
_VAGUE_NAMES = {"utils", "util", "common", "base", "helpers", "misc"}


def _python_files(*folders: str) -> list[Path]:
    found = (path for folder in folders for path in (_ROOT / folder).rglob("*.py"))
    return sorted(path for path in found if "_pb2" not in path.name)


def _name(path: Path) -> str:
    return str(path.relative_to(_ROOT))


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


product_file = pytest.mark.parametrize("path", _python_files(*_ROOMS), ids=_name)
room_init = pytest.mark.parametrize(
    "path", [path for path in _python_files(*_ROOMS) if path.name == "__init__.py"], ids=_name
)
kernel = pytest.mark.parametrize(
    "path",
    [path for path in sorted((_ROOT / "kernels").glob("*.py")) if path.name != "__init__.py"],
    ids=_name,
)
gpu_kernel = pytest.mark.parametrize(
    "path",
    [path for path in _python_files("kernels/gpu") if "_kernel[" in path.read_text()],
    ids=_name,
)


def test_rooms_are_found() -> None:
    assert all((_ROOT / room / "__init__.py").is_file() for room in _ROOMS)


@product_file
def test_product_file_fits_the_line_budget(path: Path) -> None:
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= _MAX_LINES, f"{num_lines} lines: split it by concept"


@product_file
def test_product_file_is_named_after_a_concept(path: Path) -> None:
    assert path.stem not in _VAGUE_NAMES


@pytest.mark.parametrize("path", _python_files(*_ROOMS, "tests"), ids=_name)
def test_file_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(_tree(path)), "no module docstring"


@room_init
def test_package_init_holds_a_docstring_only(path: Path) -> None:
    assert len(_tree(path).body) == 1, "import from the defining module instead"


def _functions(path: Path) -> set[str]:
    return {node.name for node in _tree(path).body if isinstance(node, ast.FunctionDef)}


@kernel
def test_kernel_has_a_plain_torch_reference(path: Path) -> None:
    operations = {name for name in _functions(path) if not name.startswith("_")}
    references = {name for name in operations if name.endswith("_reference")}
    assert references, "a kernel file holds <op>_reference beside <op>"
    assert {name.removesuffix("_reference") for name in references} <= operations


@kernel
def test_kernel_has_its_own_test_file(path: Path) -> None:
    assert (_ROOT / "tests" / "kernels" / f"test_{path.name}").is_file()


@gpu_kernel
def test_gpu_kernel_has_a_plain_torch_reference_and_a_test(path: Path) -> None:
    operations = {name for name in _functions(path) if name.endswith("_triton")}
    assert operations, "a file of kernels/gpu holds <op>_triton above its kernels"
    known = set().union(*(_functions(other) for other in _python_files("kernels")))
    assert {name.removesuffix("_triton") + "_reference" for name in operations} <= known
    assert (_ROOT / "tests/kernels/gpu" / f"test_{path.name}").is_file()


@gpu_kernel
def test_gpu_kernel_passes_the_compile_gate(path: Path) -> None:
    recorded = "".join(file.read_text() for file in (_ROOT / "tests/kernels/gpu").glob("*.json"))
    kernels = {name for name in _functions(path) if name.endswith("_kernel")}
    assert [name for name in sorted(kernels) if f'"{name}"' not in recorded] == []
