"""`ostro run-batch` against HTTP servers of the test: the real face, and ones that misbehave."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from grpc_face import grpc_face
from rich.console import Console
from scripted_frontend import MODEL, THOUGHTFUL, ScriptedFrontend, served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from typer.testing import CliRunner
from wait_for import wait_for
from wire import Wire

from ostro.actors.errors import NotReadyError
from ostro.cluster.batch import Batch, run_batch
from ostro.cluster.batch_run import BatchProgress, BatchServer, asked_delay
from ostro.cluster.batch_view import told
from ostro.cluster.cli import app
from ostro.cluster.cli_connection import base_url
from ostro.cluster.http_ingress import build_http_app
from ostro.cluster.metrics import Metrics
from ostro.cluster.retries import Retries
from ostro.configs.deployment import ServingConfig
from ostro.configs.errors import ConfigError

CHAT = "/v1/chat/completions"
QUICK = Retries(most=3, first_delay_s=0.001)
Answer = Callable[[dict, int], Response]


class FakeServer:
    """Answers each request with `answer`, told the body and how often its id was asked before.

    Attributes:
        asked: Ids in the order in which they came.
        most_at_once: Requests that were being answered at one time.
    """

    def __init__(self, answer: Answer, models_status: int = 200) -> None:
        self._answer = answer
        self._models_status = models_status
        self.asked: list[str] = []
        self.keys: set[str | None] = set()
        self.most_at_once = 0
        self.num_cancelled = 0
        self._num_running = 0
        routes = [Route("/v1/models", self._models), Route(CHAT, self._chat, methods=["POST"])]
        self.app = Starlette(routes=routes)

    async def _models(self, request: Request) -> Response:
        self.keys.add(request.headers.get("authorization"))
        return JSONResponse({}, self._models_status)

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        self.keys.add(request.headers.get("authorization"))
        before = self.asked.count(body["id"])
        self.asked.append(body["id"])
        self._num_running += 1
        self.most_at_once = max(self.most_at_once, self._num_running)
        try:
            for _ in range(body.get("sleep_ms", 5)):
                await asyncio.sleep(0.001)
                if await request.is_disconnected():
                    self.num_cancelled += 1
                    break
            return self._answer(body, before)
        finally:
            self._num_running -= 1


def fine(body: dict, _before: int) -> Response:
    usage = {"completion_tokens": 3}
    return JSONResponse({"echo": body["id"], "usage": usage}, headers={"x-request-id": "r-1"})


def write(path: Path, *ids: str, **body) -> Path:
    lines = [
        {"custom_id": i, "method": "POST", "url": CHAT, "body": {"id": i, **body}} for i in ids
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def records(path: Path) -> dict[str | None, dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line for line in lines}


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["run-batch", *map(str, arguments)])


def run(source: Path, url: str, **server) -> BatchProgress:
    """A whole run, into out.jsonl beside the source."""
    progress, console = BatchProgress(), Console(file=io.StringIO())
    batch = Batch(source=source, answers=source.with_name("out.jsonl"), goes_on=True)
    options = {"url": url, "retries": QUICK, "concurrency": 4} | server
    assert asyncio.run(run_batch(batch, BatchServer(**options), progress, console))
    return progress


@pytest.fixture
def frontend() -> ScriptedFrontend:
    return ScriptedFrontend(*THOUGHTFUL)


@pytest.fixture
def face(frontend) -> Iterator[str]:
    with served(build_http_app(lambda: frontend, ServingConfig(), Metrics(MODEL))) as url:
        yield url


# ---- what comes out


def test_a_batch_is_answered_as_openai_writes_it(face, frontend, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    messages = [{"role": "user", "content": "Say hello."}]
    bodies = {
        "chat": (CHAT, {"messages": messages}),
        "text": ("/v1/completions", {"prompt": "Once"}),
        "responses": ("/v1/responses", {"input": "Say hello."}),
        "messages": ("/v1/messages", {"model": MODEL, "messages": messages, "max_tokens": 9}),
        "wrong": (CHAT, {"messages": messages, "temperature": "hot"}),
    }
    lines = [
        json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body})
        for name, (url, body) in bodies.items()
    ]
    source.write_text("\n".join([*lines, "{nonsense", lines[0]]))
    result = invoke(source, target, "--url", face, "--effort", "low")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("4 done, 3 failed, ")
    assert "--retry-failed asks again" in result.stderr
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    by_id = {
        line["custom_id"]: line
        for line in lines
        if not line["error"] or "line" not in line["error"]
    }
    chat = by_id["chat"]
    assert list(chat) == ["id", "custom_id", "response", "error"]
    assert (chat["response"]["status_code"], chat["error"]) == (200, None)
    assert chat["response"]["request_id"]
    assert chat["response"]["body"]["choices"][0]["message"]["content"] == "Hello"
    assert by_id["text"]["response"]["body"]["object"] == "text_completion"
    assert by_id["responses"]["response"]["body"]["object"] == "response"
    assert by_id["messages"]["response"]["body"]["type"] == "message"
    wrong = by_id["wrong"]["response"]
    assert (wrong["status_code"], wrong["body"]["error"]["param"]) == (422, "temperature")
    faults = [line["error"] for line in lines if line["error"]]
    assert [(fault["code"], fault["line"]) for fault in faults] == [
        ("invalid_json", 6),
        ("duplicate_custom_id", 7),
    ]
    efforts = {asked.options.effort for asked in frontend.asked if hasattr(asked, "messages")}
    assert efforts == {"low"}


def test_failed_lines_go_to_a_file_of_their_own(tmp_path):
    def moody(body: dict, before: int) -> Response:
        return fine(body, before) if body["id"] == "a" else JSONResponse({"error": {}}, 400)

    source, target, errors = (tmp_path / name for name in ("in", "out", "errors"))
    write(source, "a", "b")
    with served(FakeServer(moody).app) as url:
        result = invoke(source, target, "--url", url, "--errors", errors)
    assert result.exit_code == 1
    assert (list(records(target)), list(records(errors))) == (["a"], ["b"])


def test_an_answer_that_is_no_json_is_told_as_a_failure(tmp_path):
    source = write(tmp_path / "in", "a")
    with served(FakeServer(lambda *_: PlainTextResponse("oops", 500)).app) as url:
        assert run(source, url).num_failed == 1
    record = records(tmp_path / "out.jsonl")["a"]
    assert (record["response"]["status_code"], record["response"]["body"]) == (500, None)
    assert record["error"] == {"code": "no_json", "message": "the answer is no JSON: oops"}


def test_an_empty_batch_is_done(face, tmp_path):
    source = tmp_path / "in"
    source.write_text("")
    result = invoke(source, tmp_path / "out", "--url", face)
    assert (result.exit_code, result.stderr.split(",")[0]) == (0, "0 done")


# ---- how it is asked


def test_so_many_are_asked_at_a_time_and_read_no_sooner(tmp_path):
    server, read = FakeServer(fine), []
    source = write(tmp_path / "in", *map(str, range(60)))
    progress = BatchProgress()

    class Noting(BatchProgress):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "read_bytes" and value:
                read.append(len(read) + 1 - self.num_done)

    progress = Noting()
    batch = Batch(source=source, answers=tmp_path / "out")
    with served(server.app) as url:
        options = BatchServer(url=url, concurrency=5)
        asyncio.run(run_batch(batch, options, progress, Console(file=io.StringIO())))
    assert progress.num_done == 60
    assert server.most_at_once == 5
    assert max(read) == 5


@pytest.mark.parametrize("status", [429, 503])
def test_what_the_server_could_not_take_is_asked_again(tmp_path, status):
    def busy(body: dict, before: int) -> Response:
        if before < 2:
            return JSONResponse({}, status, headers={"retry-after": "0.01"})
        return fine(body, before)

    server, source = FakeServer(busy), write(tmp_path / "in", "a", "b")
    with served(server.app) as url:
        assert run(source, url).num_done == 2
    assert sorted(server.asked) == ["a"] * 3 + ["b"] * 3


def test_what_stays_busy_is_written_with_its_status(tmp_path):
    server = FakeServer(lambda *_: JSONResponse({"error": {"code": "queue_full"}}, 429))
    source = write(tmp_path / "in", "a")
    with served(server.app) as url:
        assert run(source, url).num_failed == 1
    assert len(server.asked) == 1 + QUICK.most
    assert records(tmp_path / "out.jsonl")["a"]["response"]["status_code"] == 429


def test_the_servers_own_faults_are_not_repeated(tmp_path):
    server, source = FakeServer(lambda *_: JSONResponse({}, 500)), write(tmp_path / "in", "a")
    with served(server.app) as url:
        run(source, url)
    assert server.asked == ["a"]


def test_a_lost_connection_is_asked_again(tmp_path):
    wires = []

    def cut_once(body: dict, before: int) -> Response:
        if not before:
            wires[0].cut()
        return fine(body, before)

    server, source = FakeServer(cut_once), write(tmp_path / "in", "a")
    with served(server.app) as url, closing(Wire(url.removeprefix("http://"))) as wire:
        wires.append(wire)
        assert run(source, f"http://{wire.address}").num_done == 1
    assert server.asked == ["a", "a"]


def test_a_request_beyond_its_time_fails_alone(tmp_path):
    source = write(tmp_path / "in", "a", sleep_ms=5000)
    with served(FakeServer(fine).app) as url:
        assert run(source, url, timeout_s=0.3).num_failed == 1
    assert records(tmp_path / "out.jsonl")["a"]["error"]["code"] == "timeout"


def test_a_server_that_is_gone_ends_the_run_and_blames_no_line(tmp_path):
    wires = []

    def go(body: dict, before: int) -> Response:
        if body["id"] == "b":
            wires[0].close()
        return fine(body, before)

    source = write(tmp_path / "in", "a", "b", "c")
    with served(FakeServer(go).app) as url:
        wires.append(Wire(url.removeprefix("http://")))
        with pytest.raises(NotReadyError, match="nothing answers"):
            run(source, f"http://{wires[0].address}", concurrency=1)
    assert list(records(tmp_path / "out.jsonl")) == ["a"]


def test_nobody_there_is_said_at_once(tmp_path, free_port):
    source = write(tmp_path / "in", "a")
    result = invoke(source, tmp_path / "out", "--url", f"127.0.0.1:{free_port()}")
    assert result.exit_code == 1
    assert "ostro serve" in result.stderr
    assert not (tmp_path / "out").exists()  # the same command again is not in its own way


@pytest.mark.parametrize("option", ["--overwrite", "--retry-failed"])
def test_nothing_is_overwritten_where_nobody_is_there(tmp_path, free_port, option):
    source, target = write(tmp_path / "in", "a"), tmp_path / "out"
    target.write_text("my diary")
    result = invoke(source, target, "--url", f"127.0.0.1:{free_port()}", option)
    assert result.exit_code == 1
    assert target.read_text() == "my diary"


def test_a_plain_server_asked_for_tls_is_told_apart_from_none(tmp_path):
    source = write(tmp_path / "in", "a")
    with served(FakeServer(fine).app) as url:
        result = invoke(source, tmp_path / "out", "--url", url.replace("http:", "https:"))
    assert result.exit_code == 1
    assert "no TLS connection" in result.stderr


def test_the_key_of_the_environment_is_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("OSTRO_API_KEY", " s3cret\n")
    server, source = FakeServer(fine), write(tmp_path / "in", "a")
    with served(server.app) as url:
        assert invoke(source, tmp_path / "out", "--url", f"{url}/v1").exit_code == 0
    assert server.keys == {"Bearer s3cret"}


def test_a_key_that_is_not_taken_ends_the_run_before_it_begins(tmp_path):
    server, source = FakeServer(fine, models_status=401), write(tmp_path / "in", "a")
    with served(server.app) as url:
        result = invoke(source, tmp_path / "out", "--url", url)
    assert result.exit_code == 1
    assert "answers 401" in result.stderr
    assert "OSTRO_API_KEY" in result.stderr
    assert not server.asked


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_not_taken_any_more_ends_the_run_and_blames_no_line(tmp_path, status):
    def closing(body: dict, before: int) -> Response:
        if body["id"] == "a":
            return fine(body, before)
        return JSONResponse({"error": {"message": "the key is over"}}, status)

    server, source = FakeServer(closing), write(tmp_path / "in", "a", "b", "c")
    with served(server.app) as url:
        options = ("--url", url, "--concurrency", "1")
        result = invoke(source, tmp_path / "out", *options)
    assert result.exit_code == 1
    assert f"answers {status}: the key is over; the same command with --resume" in result.stderr
    assert "OSTRO_API_KEY" in result.stderr
    assert server.asked == ["a", "b"]
    assert list(records(tmp_path / "out")) == ["a"]


def test_a_port_that_speaks_no_http_is_told_apart_from_nobody(tmp_path):
    source = write(tmp_path / "in", "a")
    with grpc_face(ScriptedFrontend()) as address:
        result = invoke(source, tmp_path / "out", "--url", address)
    assert result.exit_code == 1
    assert "speaks no HTTP" in result.stderr


def test_no_key_and_no_line_is_sent_where_a_server_points_to(tmp_path):
    server = FakeServer(lambda *_: RedirectResponse("/elsewhere", 307))
    source = write(tmp_path / "in", "a")
    with served(server.app) as url:
        assert run(source, url).num_failed == 1
    assert records(tmp_path / "out.jsonl")["a"]["response"]["status_code"] == 307


def test_a_proxy_of_the_environment_is_not_asked_for_loopback(tmp_path, monkeypatch, free_port):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    source = write(tmp_path / "in", "a")
    with served(FakeServer(fine).app) as url:
        assert run(source, url).num_done == 1


# ---- interruptions


def test_an_interrupted_batch_is_taken_up_again(tmp_path):
    ids = [str(number) for number in range(12)]
    source, target = write(tmp_path / "in", *ids, sleep_ms=100), tmp_path / "out"
    server = FakeServer(fine)
    with served(server.app) as url:
        arguments = ["run-batch", source, target, "--url", url, "--concurrency", "2"]
        ostro = Path(sys.executable).with_name("ostro")
        process = subprocess.Popen([ostro, *arguments], stderr=subprocess.PIPE, text=True)
        wait_for(lambda: target.exists() and target.read_bytes().count(b"\n") >= 2)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
        assert process.returncode == 130
        assert told.startswith("interrupted: ")
        assert "--resume" in told
        wait_for(lambda: server.num_cancelled > 0)
        num_before = len(records(target))
        assert 2 <= num_before < 12
        with target.open("ab") as file:
            file.write(b'{"id": "torn')
        result = invoke(source, target, "--url", url, "--resume")
    assert result.exit_code == 0
    assert f"{num_before} were there already" in result.stderr
    assert sorted(records(target)) == sorted(ids)
    assert len(target.read_text().splitlines()) == 12


def test_what_failed_is_asked_again_when_asked_to(tmp_path):
    def learning(body: dict, before: int) -> Response:
        return fine(body, before) if before or body["id"] == "a" else JSONResponse({}, 400)

    source, target = write(tmp_path / "in", "a", "b"), tmp_path / "out"
    server = FakeServer(learning)
    with served(server.app) as url:
        assert invoke(source, target, "--url", url).exit_code == 1
        resumed = invoke(source, target, "--url", url, "--resume")
        assert (resumed.exit_code, "1 had failed before" in resumed.stderr) == (1, True)
        assert invoke(source, target, "--url", url, "--retry-failed").exit_code == 0
    assert sorted(server.asked) == ["a", "b", "b"]
    assert {line["response"]["status_code"] for line in records(target).values()} == {200}


def test_output_that_is_there_is_not_touched_unasked(tmp_path):
    source, target = write(tmp_path / "in", "a"), tmp_path / "out"
    target.write_text("my diary")
    result = invoke(source, target)
    assert result.exit_code == 2
    assert "--resume goes on with it, --overwrite begins anew" in result.stderr
    assert target.read_text() == "my diary"


def test_overwriting_begins_anew(tmp_path):
    source, target = write(tmp_path / "in", "a"), tmp_path / "out"
    target.write_text("my diary")
    with served(FakeServer(fine).app) as url:
        assert invoke(source, target, "--url", url, "--overwrite").exit_code == 0
    assert list(records(target)) == ["a"]


# ---- options


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["no.jsonl", "out"], "no such file"),
        ([".", "out"], "not a file"),
        (["in", "in"], "different files"),
        (["in", "out", "--errors", "out"], "different files"),
        (["in", "out", "--resume", "--overwrite"], "one of them"),
        (["in", "out", "--effort", "ultra"], "must be one of none"),
        (["in", "out", "--url", "grpc://box"], "URL of an HTTP face"),
        (["in", "/dev/null"], "not a file"),
    ],
)
def test_options_without_sense_are_refused(tmp_path, monkeypatch, arguments, why):
    monkeypatch.chdir(tmp_path)
    write(Path("in"), "a")
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert why in " ".join(result.stderr.split())
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://box:8000/v1/", "http://box:8000"),
        ("box:8000", "http://box:8000"),
        ("https://box/ostro/v1", "https://box/ostro"),
    ],
)
def test_base_url_reads_what_people_type(url, base):
    assert base_url(url) == base


@pytest.mark.parametrize("url", ["", "http://", "http://[", "http://box:port", "ftp://box"])
def test_base_url_refuses_what_is_no_url(url):
    with pytest.raises(ConfigError, match="HTTP face"):
        base_url(url)


@pytest.mark.parametrize(
    ("text", "delay_s"),
    [
        ("3", 3.0),
        ("0.5", 0.5),
        ("-1", None),
        ("nan", None),
        ("soon", None),
        ("1e9", 600.0),
        ("Fri, 01 Jan 2100 00:00:00 GMT", 600.0),
        ("Fri, 01 Jan 2021 00:00:00 GMT", None),
    ],
)
def test_retry_after_is_read_in_both_forms(text, delay_s):
    assert asked_delay({"retry-after": text}) == delay_s


# ---- what is shown


def test_progress_tells_counts_speed_and_time_left():
    progress = BatchProgress(
        num_done=1200, num_failed=3, num_tokens=9000, began_s=time.monotonic() - 90
    )
    progress.num_skipped, progress.read_bytes, progress.skipped_bytes = 5, 400, 100
    assert told(progress, 1000) == (
        "1,200 done, 3 failed, 5 were there already, 100 tok/s, 3 min 0 s left"
    )
    assert told(BatchProgress()) == "0 done, 0 failed, 0 tok/s"


def test_a_terminal_gets_a_bar(tmp_path):
    source, file = write(tmp_path / "in", "a", sleep_ms=500), io.StringIO()
    console = Console(file=file, force_terminal=True, width=120)
    batch = Batch(source=source, answers=tmp_path / "out")
    with served(FakeServer(fine).app) as url:
        asyncio.run(run_batch(batch, BatchServer(url=url), BatchProgress(), console))
    assert "0 done, 0 failed" in file.getvalue()
    assert "━" in file.getvalue()
