"""Hatch build hook: compile the .proto files beside this file into `ostro.protos`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_HERE = Path(__file__).parent


def compile_protos(directory: Path) -> None:
    """Write `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` for every .proto in `directory`.

    protoc names Python modules after the proto package path (`ostro/v1`), but they live in
    `ostro.protos`; so the generated imports are rewritten.

    Raises:
        RuntimeError: protoc refused a file.
    """
    from grpc_tools import protoc
    from importlib.resources import files

    names = sorted(path.name for path in directory.glob("*.proto"))
    arguments = [
        "protoc",
        f"-Iostro/v1={directory}",
        f"-I{files('grpc_tools') / '_proto'}",
        "--python_out=.",
        "--pyi_out=.",
        "--grpc_python_out=.",
        *(f"ostro/v1/{name}" for name in names),
    ]
    with _generated_into(directory) as out:
        arguments = [part.replace("_out=.", f"_out={out}") for part in arguments]
        if protoc.main(arguments) != 0:
            raise RuntimeError(f"protoc failed on {names} in {directory}")


class _generated_into:
    """A scratch folder whose `ostro/v1/*_pb2*` files are moved to `directory` on exit."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> str:
        import tempfile

        self._scratch = tempfile.TemporaryDirectory()
        return self._scratch.name

    def __exit__(self, failure: object, *_: object) -> None:
        if failure is None:
            for path in (Path(self._scratch.name) / "ostro" / "v1").iterdir():
                text = re.sub(r"from ostro\.v1 import", "from ostro.protos import", path.read_text())
                (self._directory / path.name).write_text(text)
        self._scratch.cleanup()


class ProtoBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Compiles the protos before a wheel or an editable install is made."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling."""
        compile_protos(_HERE)
