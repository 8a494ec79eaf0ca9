"""Hatch build hook: compile the .proto files beside this file into `ostro.protos`."""

from __future__ import annotations

import re
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_HERE = Path(__file__).parent


def compile_protos(directory: Path) -> None:
    """Write `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` beside every .proto of `directory`.

    protoc names Python modules after the proto package (`ostro.v1`); ours live in
    `ostro.protos`, so the imports between generated files are rewritten.

    Raises:
        RuntimeError: protoc refused a file; its reasons are on stderr.
    """
    from grpc_tools import protoc  # only the build environment has it

    names = sorted(path.name for path in directory.glob("*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [
            "protoc",
            f"-Iostro/v1={directory}",
            f"-I{files('grpc_tools') / '_proto'}",
            f"--python_out={scratch}",
            f"--pyi_out={scratch}",
            f"--grpc_python_out={scratch}",
            *(f"ostro/v1/{name}" for name in names),
        ]
        if protoc.main(arguments) != 0:
            raise RuntimeError(f"protoc failed on {names} in {directory}")
        for generated in Path(scratch, "ostro", "v1").iterdir():
            text = generated.read_text().replace("from ostro.v1 import", "from ostro.protos import")
            # The module that messages are pickled under, between Serve's proxy and a replica.
            text = re.sub(r"'ostro\.v1\.(\w+_pb2)'", r"'ostro.protos.\1'", text)
            (directory / generated.name).write_text(text)


class ProtoBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Compiles the protos before a wheel or an editable install is made."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling."""
        compile_protos(_HERE)
