"""`ostro serve` around a launch of the test's own: what is said, watched, stopped; no Ray runs."""

from __future__ import annotations

import io
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from checkpoints import make_tiny_checkpoint
from rich.console import Console
from typer.testing import CliRunner

from ostro.actors.errors import ShardLostError
from ostro.actors.fabric.messages import ActorStatus, State
from ostro.cluster.cli import app
from ostro.cluster.cli_deployment import read_deployment
from ostro.cluster.cli_loading import LiveLoading, PlainLoading
from ostro.cluster.cli_serve import run
from ostro.cluster.tls_certificate import FaceCertificate
from ostro.configs.deployment import DeploymentConfig
from ostro.configs.load import load_deployment


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny", with_tokenizer=True)


@pytest.fixture
def deployment(model_dir) -> DeploymentConfig:
    return read_deployment("laptop", ["serving.drain_timeout_s=7"], model=str(model_dir))


def actor(rank: int, state: str, progress: float) -> ActorStatus:
    role = "expert" if rank else "attention"
    return ActorStatus(
        f"ostro-{role}-{rank}", role, state, "0123456789", "cpu", rank, progress, 0, 0, 0.0
    )


def state(*actors: ActorStatus, ready: bool = True, epoch: int = 0) -> State:
    return State(0, epoch, ready, list(actors), {}, [], [], [], {}, 0)


READY = state(actor(0, "ready", 1.0), actor(1, "ready", 1.0))
MENDING = state(actor(0, "ready", 1.0), actor(1, "lost", 0.0), ready=False)
MENDED = state(actor(0, "ready", 1.0), actor(1, "ready", 1.0), epoch=1)


def press(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def fail(error: BaseException) -> Callable[[], None]:
    def raise_it() -> None:
        raise error

    return raise_it


class FakeCell:
    """Plays states and happenings one by one, a happening being a function that is called."""

    def __init__(
        self,
        deployment: DeploymentConfig,
        story: Sequence[State | Callable[[], None]],
        on_stop: Sequence[Callable[[], None]] = (),
        certificate: FaceCertificate | None = None,
    ) -> None:
        self.deployment = deployment
        self.certificate = certificate
        self.stage_seconds = {"ray": 3.25, "load": 0.5}
        self.drains_s: list[float] = []
        self._story = list(story)
        self._on_stop = list(on_stop)

    def state(self) -> State:
        while not isinstance(self._story[0], State):
            self._story.pop(0)()
        return self._story.pop(0)

    def stop(self, drain_s: float | None = None) -> None:
        self.drains_s.append(drain_s or self.deployment.serving.drain_timeout_s)
        if self._on_stop:
            self._on_stop.pop(0)()


def console() -> Console:
    return Console(file=io.StringIO(), width=200, highlight=False)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def serve(cell: FakeCell, model_dir: Path) -> str:
    screen = console()
    run(cell.deployment, model_dir, screen, lambda *_: cell, poll_s=0.0)
    return written(screen)


# ---- serving


def test_serve_says_where_the_model_answers(deployment, model_dir):
    output = serve(FakeCell(deployment, [READY, press(signal.SIGINT)]), model_dir)
    assert "Ostro is ready after 3.8 s  (ray 3.2, load 0.5)" in output
    assert "model   tiny" in output
    assert "layout  split, 1 attention + 2 expert shards" in output
    assert "http://127.0.0.1:8000/v1\n" in output
    assert "gRPC    127.0.0.1:9000\n" in output
    assert "curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type" in output
    assert '"model": "tiny"' in output
    assert "ostro chat\n" in output


def test_serve_names_the_served_name_and_other_ports(deployment, model_dir):
    serving = replace(deployment.serving, host="0.0.0.0", http_port=81, grpc_port=91)
    other = replace(deployment, served_name="small", serving=serving)
    output = serve(FakeCell(other, [READY, press(signal.SIGINT)]), model_dir)
    assert "model   small" in output
    assert "http://127.0.0.1:81/v1\n" in output
    assert "ostro chat --url 127.0.0.1:91\n" in output


def test_serve_says_what_users_should_know_of_the_model(deployment, model_dir):
    noted = replace(deployment, notice="A teaching model.")
    assert "note    A teaching model.\n" in serve(
        FakeCell(noted, [READY, press(signal.SIGINT)]), model_dir
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_drains_and_ends_well_on_a_signal(deployment, model_dir, number):
    before = signal.getsignal(number)
    cell = FakeCell(deployment, [READY, press(number)])
    output = serve(cell, model_dir)
    assert cell.drains_s == [7]
    assert output.endswith("stopped\n")
    assert signal.getsignal(number) is before


def test_serve_hurries_on_a_second_signal(deployment, model_dir):
    cell = FakeCell(deployment, [READY, press(signal.SIGINT)], [press(signal.SIGINT)])
    serve(cell, model_dir)
    assert cell.drains_s == [7, 0.1]


def test_serve_writes_a_line_when_readiness_changes(deployment, model_dir):
    story = [READY, READY, MENDING, MENDING, MENDED, press(signal.SIGINT)]
    lines = serve(FakeCell(deployment, story), model_dir).splitlines()
    changes = [line.split("  ")[1] for line in lines if "in epoch" in line]
    assert changes == ["not ready in epoch 0: lost ostro-expert-1", "ready in epoch 1"]


def test_serve_outlives_a_silent_router(deployment, model_dir):
    story = [READY, fail(TimeoutError()), READY, press(signal.SIGINT)]
    output = serve(FakeCell(deployment, story), model_dir)
    assert "the router does not answer" in output
    assert "ready in epoch 0" in output


def test_serve_tells_what_it_drafts(model_dir):
    drafting = "engine.speculation={method: ngram, num_draft_tokens: 5, adaptive: false}"
    deployment = load_deployment("laptop", [drafting])
    output = serve(FakeCell(deployment, [READY, press(signal.SIGINT)]), model_dir)
    told = "drafts  up to 5 tokens a step from the text so far, wherever there is room"
    assert told in output


def test_serve_tells_why_it_drafts_nothing(deployment, model_dir):
    output = serve(FakeCell(deployment, [READY, press(signal.SIGINT)]), model_dir)
    assert "drafts  none: the model brings no head; engine.speculation.method=ngram" in output


def test_serve_stops_everything_when_the_router_dies(deployment, model_dir):
    from ray.exceptions import ActorDiedError

    cell = FakeCell(deployment, [READY, fail(ActorDiedError())])
    with pytest.raises(ShardLostError, match="the router died"):
        serve(cell, model_dir)
    assert cell.drains_s == [7]


def test_serve_interrupted_while_loading_exits_with_130(deployment, model_dir):
    def launch(*_: object) -> FakeCell:
        press(signal.SIGTERM)()
        raise AssertionError("not interrupted")

    with pytest.raises(typer.Exit) as exit_info:
        run(deployment, model_dir, console(), launch)
    assert exit_info.value.exit_code == 130


# ---- refused before anything starts


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["labtop"], 2, "did you mean laptop"),
        (["--set", "engine.pages=3"], 2, "engine.pages: unknown key"),
        (["--grpc-port", "8000"], 2, "http_port and grpc_port are both 8000"),
    ],
)
def test_serve_refuses_bad_options_in_one_line(arguments, code, told):
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == code
    assert result.stderr.startswith("error: ")
    assert told in result.stderr
    assert result.stderr.count("\n") == 1


def test_serve_refuses_a_draft_head_that_is_not_there(free_port):
    ports = ["--http-port", str(free_port()), "--grpc-port", str(free_port())]
    drafting = "engine.speculation={method: eagle, draft_model: /nowhere}"
    result = CliRunner().invoke(app, ["serve", *ports, "--set", drafting])
    assert result.exit_code == 2
    assert result.stderr == "error: /nowhere: no such checkpoint directory\n"


def test_serve_refuses_a_taken_port(free_port):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        taken = server.getsockname()[1]
        ports = ["--http-port", str(free_port()), "--grpc-port", str(taken)]
        result = CliRunner().invoke(app, ["serve", *ports])
    assert result.exit_code == 2
    assert f"127.0.0.1:{taken} is taken" in result.stderr
    assert "--grpc-port" in result.stderr


def test_serve_refuses_a_bad_certificate(monkeypatch, free_port):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    options = ["--http-port", str(free_port()), "--grpc-port", str(free_port())]
    options += ["--set", "serving.tls.cert_file=/no/such.pem"]
    options += ["--set", "serving.tls.key_file=/no/such.key"]
    result = CliRunner().invoke(app, ["serve", *options])
    assert result.exit_code == 2
    assert "serving.tls.cert_file=/no/such.pem: cannot be read" in result.stderr


def test_serve_refuses_a_broken_checkpoint(tmp_path, free_port):
    directory = make_tiny_checkpoint(tmp_path)
    (directory / "model.safetensors").unlink()
    ports = ["--http-port", str(free_port()), "--grpc-port", str(free_port())]
    result = CliRunner().invoke(app, ["serve", "--model", str(directory), *ports])
    assert result.exit_code == 1
    assert "neither model.safetensors nor" in result.stderr


# ---- while shards load


WEIGHTS = {0: 2**20, 1: 4 * 2**20}
LOADING = state(actor(0, "ready", 1.0), actor(1, "loading", 0.5), ready=False)


def test_plain_loading_writes_a_line_for_each_change():
    screen = console()
    with PlainLoading(screen, WEIGHTS) as view:
        view("ray", None)
        view("load", LOADING)
        view("load", LOADING)
        view("load", READY)
    assert written(screen).splitlines() == [
        "starting Ray",
        "loading the shards",
        "ostro-attention-0: ready, 100% of 1 MiB",
        "ostro-expert-1: loading, 50% of 4 MiB",
        "ostro-expert-1: ready, 100% of 4 MiB",
    ]


def test_live_loading_leaves_the_last_table_on_the_screen():
    screen = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with LiveLoading(screen, WEIGHTS) as view:
        view("ray", None)
        view("load", LOADING)
    last = written(screen).split("weights")[-1]
    assert "ostro-expert-1" in last
    assert "2 MiB of 4 MiB" in last
    assert "loading the shards" not in last
