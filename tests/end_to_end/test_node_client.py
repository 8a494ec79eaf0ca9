"""A client in another language: Node's gRPC, with code made of our protos, against a real cluster.

Its packages are pinned by the lock file beside it and fetched into a folder of the test's.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from buf_protos import lay_out
from served import Served

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SOURCES = Path(__file__).with_name("node_client")
INVALID_ARGUMENT = 3


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """The client with its packages, and our protos."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("needs node and npm")
    folder = tmp_path_factory.mktemp("node") / "client"
    shutil.copytree(SOURCES, folder)
    install = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(
        install, cwd=folder, capture_output=True, text=True, timeout=200, check=False
    )
    if done.returncode:
        pytest.skip(f"npm cannot fetch the packages: {done.stderr.strip()[-300:]}")
    lay_out(folder / "protos")
    return folder


@pytest.fixture(scope="module")
def served(packages, tmp_path_factory) -> Iterator[Served]:
    model_dir = tmp_path_factory.mktemp("tiny")
    checkpoints.make_tiny_checkpoint(model_dir, num_layers=2, with_tokenizer=True)
    log = tmp_path_factory.mktemp("log") / "serve.log"
    arguments = ("laptop_single", "--model", str(model_dir), "--set", "served_name=tiny")
    with Served(log, *arguments) as served:
        yield served


@pytest.fixture(scope="module")
def told(packages: Path, served: Served) -> dict[str, Any]:
    """What the client has to tell of its calls."""
    google = files("google.rpc").joinpath("../..")
    command = ["node", "client.mjs", served.grpc_address, packages / "protos", str(google)]
    done = subprocess.run(
        command, cwd=packages, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_node_asks_for_an_answer_whole_and_streamed(told):
    (choice,) = told["chat"]["choices"]
    assert told["model"]["id"] == told["chat"]["model"] == "tiny"
    assert choice["finish"]["reason"] == "FINISH_REASON_LENGTH"
    assert told["kinds"][0] == "started"
    assert told["kinds"][-2:] == ["finish", "ended"]
    assert len(told["token_ids"]) == 8
    assert told["token_ids"] == choice["token_ids"]


def test_node_cancels_a_running_generation(told):
    assert told["applied"]
    assert told["cancelled"] == "FINISH_REASON_CANCELLED"


def test_node_reads_the_details_of_an_error(told):
    refusal = told["refusal"]
    assert refusal["code"] == INVALID_ARGUMENT
    info = refusal["details"]["google.rpc.ErrorInfo"]
    assert (info["reason"], info["domain"]) == ("INVALID_VALUE", "ostro")
    assert info["metadata"] == {"field": "temperature"}
