"""The .proto files: linted, compiled, and fit for Ray Serve."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
from buf_protos import RELEASED, buf, lay_out
from grpc_health.v1 import health_pb2

from ostro.protos import cluster_pb2, generation_pb2
from ostro.protos.build import compile_protos

PROTOS = Path(generation_pb2.__file__).resolve().parent
FILES = (generation_pb2.DESCRIPTOR, cluster_pb2.DESCRIPTOR)


def test_the_protos_pass_bufs_lint(tmp_path):
    lay_out(tmp_path)
    lint = buf(tmp_path, "lint")
    assert (lint.returncode, lint.stdout + lint.stderr) == (0, "")


def test_the_protos_break_no_client_of_the_last_release(tmp_path):
    lay_out(tmp_path)
    breaking = buf(tmp_path, "breaking", "--against", RELEASED)
    assert (breaking.returncode, breaking.stdout + breaking.stderr) == (0, "")


@pytest.mark.parametrize(
    ("written", "instead", "told"),
    [
        ("string text = 3;", "bytes text = 3;", "changed type"),
        ("  bool applied = 1;", "", 'field "1" with name "applied"'),
        ("bool strict = 4;", "bool is_strict = 4;", 'changed name from "strict"'),
        ("rpc Detokenize(Detok", "rpc Untokenize(Detok", '"Detokenize"'),
    ],
)
def test_a_change_that_would_break_clients_is_found(tmp_path, written, instead, told):
    file = lay_out(tmp_path) / "generation.proto"
    text = file.read_text()
    assert written in text
    file.write_text(text.replace(written, instead))
    breaking = buf(tmp_path, "breaking", "--against", RELEASED)
    assert breaking.returncode != 0
    assert told in breaking.stdout


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
