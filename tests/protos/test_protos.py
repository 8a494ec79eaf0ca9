"""The .proto files: linted, compiled, and fit for Ray Serve."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

from grpc_health.v1 import health_pb2

from ostro.protos import cluster_pb2, generation_pb2
from ostro.protos.build import compile_protos

PROTOS = Path(generation_pb2.__file__).resolve().parent
FILES = (generation_pb2.DESCRIPTOR, cluster_pb2.DESCRIPTOR)


def test_the_protos_pass_bufs_lint(tmp_path):
    package = tmp_path / "ostro" / "v1"
    package.mkdir(parents=True)
    for path in PROTOS.glob("*.proto"):
        shutil.copy(path, package)
    shutil.copy(PROTOS / "buf.yaml", tmp_path)
    buf = Path(sys.executable).with_name("buf")
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    lint = subprocess.run(
        [buf, "lint"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (lint.returncode, lint.stdout + lint.stderr) == (0, "")


def test_the_build_hook_compiles_into_our_package(tmp_path):
    for path in PROTOS.glob("*.proto"):
        shutil.copy(path, tmp_path)
    compile_protos(tmp_path)
    stub = (tmp_path / "cluster_pb2_grpc.py").read_text()
    assert "from ostro.protos import cluster_pb2" in stub
    assert (tmp_path / "generation_pb2.pyi").exists()


def test_messages_can_be_pickled():
    request = generation_pb2.ChatRequest(model="m")
    assert pickle.loads(pickle.dumps(request)) == request


def test_method_names_are_unique_over_all_services():
    """Ray Serve dispatches on the bare name, the health service's included."""
    services = [
        s for file in (*FILES, health_pb2.DESCRIPTOR) for s in file.services_by_name.values()
    ]
    names = [method.name for service in services for method in service.methods]
    assert len(names) == len(set(names))


def test_every_message_is_in_the_versioned_package():
    assert {file.package for file in FILES} == {"ostro.v1"}


def test_a_delta_stays_small_on_the_wire():
    delta = generation_pb2.Delta(
        channel=generation_pb2.CHANNEL_ANSWER, text=" hello", token_ids=[5]
    )
    assert generation_pb2.StreamChatResponse(delta=delta).ByteSize() <= 16
