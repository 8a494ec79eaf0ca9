"""Where a request's time went, for those who ask for it over HTTP."""

from __future__ import annotations

import re

import pytest
from http_face import HELLO, face, openai_client
from scripted_frontend import FINISHED, MODEL, STARTED, THREE, ScriptedFrontend

from ostro.actors.engine.stages import STAGES
from ostro.actors.errors import ShardLostError
from ostro.cluster.generation import TextDelta

ASKING = {"x-ostro-trace": "1"}
BODIES = {
    "/v1/chat/completions": {"model": MODEL, "messages": HELLO},
    "/v1/completions": {"model": MODEL, "prompt": "Say"},
    "/v1/responses": {"model": MODEL, "input": "Say hello."},
    "/v1/messages": {"model": MODEL, "messages": HELLO, "max_tokens": 9},
}
every_dialect = pytest.mark.parametrize("path", BODIES)


def milliseconds(text: str) -> dict[str, float]:
    return {name: float(ms) for name, ms in re.findall(r"(\w+);dur=([\d.]+)", text)}


def comments(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(": server-timing")]


@every_dialect
def test_a_whole_answer_has_the_parts_in_a_header(path):
    with face(ScriptedFrontend()) as http:
        answer = http.post(path, json=BODIES[path], headers=ASKING)
    told = milliseconds(answer.headers["server-timing"])
    assert (told["total"], told["first_token"], told["queue"]) == (500, 50, 10)
    assert told["gateway"] == pytest.approx(20)
    assert told["gateway"] + told["queue"] + told["prefill"] + told["decode"] == told["total"]
    stages = sum(told[stage] for stage in (*STAGES, "between_steps"))
    assert stages == pytest.approx(told["prefill"] + told["decode"])


@every_dialect
def test_a_stream_has_them_in_its_last_comment(path):
    with face(ScriptedFrontend()) as http:
        answer = http.post(path, json={**BODIES[path], "stream": True}, headers=ASKING)
    (comment,) = comments(answer.text)
    assert milliseconds(comment)["experts"] == 200
    events = [block for block in answer.text.split("\n\n") if block]
    assert events.index(comment) >= len(events) - 2  # [DONE] alone may follow
    assert "server-timing" not in answer.headers


@pytest.mark.parametrize("headers", [{}, {"x-ostro-trace": "0"}])
def test_nobody_else_is_told(headers):
    body = BODIES["/v1/chat/completions"]
    with face(ScriptedFrontend()) as http:
        whole = http.post("/v1/chat/completions", json=body, headers=headers)
        stream = http.post("/v1/chat/completions", json={**body, "stream": True}, headers=headers)
    assert "server-timing" not in whole.headers
    assert comments(stream.text) == []


@pytest.mark.parametrize(
    "script",
    [(STARTED, TextDelta(text="Hel"), ShardLostError("rank 1")), (*THREE[:7], ShardLostError("x"))],
    ids=["one", "after another choice ended"],
)
def test_a_stream_that_failed_tells_no_times(script):
    body = {**BODIES["/v1/chat/completions"], "stream": True}
    with face(ScriptedFrontend(*script)) as http:
        answer = http.post("/v1/chat/completions", json=body, headers=ASKING)
    assert comments(answer.text) == []


def test_clients_read_over_the_comment():
    with (
        face(ScriptedFrontend(STARTED, TextDelta(text="Hello"), FINISHED)) as http,
        openai_client(http) as client,
    ):
        stream = client.chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, extra_headers=ASKING
        )
        texts = [chunk.choices[0].delta.content for chunk in stream]
    assert "".join(filter(None, texts)) == "Hello"
