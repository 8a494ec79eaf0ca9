"""Images through both faces and the frontend, to what the cell is asked for."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import anthropic
import httpx
import numpy as np
import pytest
from http_face import mistral_client, openai_client
from one_token_cell import CARD, CONFIG, OneTokenCell
from PIL import Image
from scripted_frontend import MODEL, served
from tokenizer_files import write_tokenizer

from ostro.actors.engine.request import GenerationRequest
from ostro.cluster import frontend as frontend_module
from ostro.cluster.frontend import Frontend
from ostro.cluster.grpc_cluster import model_response
from ostro.cluster.grpc_ingress import GrpcMethods
from ostro.cluster.http_ingress import build_http_app
from ostro.cluster.metrics import Metrics
from ostro.cluster.prompt import PromptBuilder
from ostro.configs.deployment import ServingConfig
from ostro.configs.reasoning import ReasoningConfig
from ostro.protos import generation_pb2 as pb

IMG, IMG_END = 10, 13


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> PromptBuilder:
    directory: Path = write_tokenizer(tmp_path_factory.mktemp("blind"), image=None)
    return PromptBuilder(directory, ReasoningConfig())


@pytest.fixture
def cell() -> OneTokenCell:
    return OneTokenCell()


@contextlib.contextmanager
def http_face(
    cell: OneTokenCell, prompts: PromptBuilder, *, vision: bool = True
) -> Iterator[httpx.Client]:
    frontend = Frontend(cell, prompts, replace(CARD, has_vision=vision), CONFIG)
    app = build_http_app(lambda: frontend, ServingConfig(), Metrics(MODEL))
    with served(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def png(width: int = 60, height: int = 40, seed: int = 0) -> bytes:
    rows = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(rows).save(file, "PNG")
    return file.getvalue()


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def image(data: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": data_uri(data)}}


def places(request: GenerationRequest) -> list[tuple[int, int, int, int]]:
    for found in request.images:
        assert request.prompt_token_ids[found.start] == IMG
        assert request.prompt_token_ids[found.start + found.num_tokens - 1] == IMG_END
    return [(found.start, found.num_tokens, found.height, found.width) for found in request.images]


# ---- HTTP


def test_openai_client_shows_an_image(cell: OneTokenCell, prompts: PromptBuilder) -> None:
    content = [text("What is this?"), image(png())]
    with http_face(cell, prompts) as http, openai_client(http) as client:
        answer = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": content}]
        )
    (request,) = cell.requests
    ((start, num_tokens, height, width),) = places(request)
    assert (num_tokens, height, width) == (8, 56, 84)
    assert answer.usage.prompt_tokens == len(request.prompt_token_ids)
    assert answer.usage.prompt_tokens_details.model_dump()["image_tokens"] == 8
    values = np.frombuffer(request.images[0].pixels, "<f2")
    assert values.size == 3 * height * width
    assert request.prompt_token_ids[start - 1] == 3  # the last image goes first: [INST][IMG]


def test_openai_client_streams_about_an_image_and_reads_its_tokens(
    cell: OneTokenCell, prompts: PromptBuilder
) -> None:
    with http_face(cell, prompts) as http, openai_client(http) as client:
        chunks = list(
            client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": [image(png())]}],
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    assert chunks[-1].usage.prompt_tokens_details.model_dump()["image_tokens"] == 8


@pytest.mark.parametrize("form", ["string", "object"])
def test_mistral_client_shows_an_image(
    cell: OneTokenCell, prompts: PromptBuilder, form: str
) -> None:
    uri: object = data_uri(png()) if form == "string" else {"url": data_uri(png()), "detail": "low"}
    content = [{"type": "text", "text": "See"}, {"type": "image_url", "image_url": uri}]
    with (
        http_face(cell, prompts) as http,
        mistral_client(http) as client,
    ):
        client.chat.complete(model=MODEL, messages=[{"role": "user", "content": content}])
    assert len(places(cell.requests[0])) == 1


def test_anthropic_client_shows_images_and_counts_their_tokens(
    cell: OneTokenCell, prompts: PromptBuilder
) -> None:
    def block(data: bytes) -> dict:
        encoded = base64.b64encode(data).decode()
        source = {"type": "base64", "media_type": "image/png", "data": encoded}
        return {"type": "image", "source": source}

    look = {"type": "tool_use", "id": "toolu_a", "name": "look", "input": {}}
    seen = {"type": "tool_result", "tool_use_id": "toolu_a", "content": [block(png(20, 20))]}
    asked = {
        "model": MODEL,
        "messages": [
            {"role": "user", "content": [block(png(seed=1)), text("Look")]},
            {"role": "assistant", "content": [look]},
            {"role": "user", "content": [seen, text("Well?")]},
        ],
    }
    with (
        http_face(cell, prompts) as http,
        anthropic.Anthropic(base_url=str(http.base_url), api_key="none") as client,
    ):
        message = client.messages.create(**asked, max_tokens=4)
        counted = client.messages.count_tokens(**asked)
    assert [found[1] for found in places(cell.requests[0])] == [8, 2]
    assert counted.input_tokens == message.usage.input_tokens
    assert counted.input_tokens == len(cell.requests[0].prompt_token_ids)


def test_a_tools_result_may_be_an_image(cell: OneTokenCell, prompts: PromptBuilder) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": [image(png(seed=1)), text("Look")]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": [text("here"), image(png(20, 20))]},
    ]
    with http_face(cell, prompts) as http:
        body = {"model": MODEL, "messages": messages}
        assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert [found[1] for found in places(cell.requests[0])] == [8, 2]


def test_equal_images_have_equal_digests(cell: OneTokenCell, prompts: PromptBuilder) -> None:
    content = [image(png()), text("and"), image(png()), text("and"), image(png(seed=1)), text("?")]
    with http_face(cell, prompts) as http:
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
        http.post("/v1/chat/completions", json=body)
    first, second, third = (found.digest for found in cell.requests[0].images)
    assert first == second != third


def test_tokenize_counts_an_image(cell: OneTokenCell, prompts: PromptBuilder) -> None:
    messages = [{"role": "user", "content": [image(png()), text("?")]}]
    with http_face(cell, prompts) as http:
        counted = http.post("/tokenize", json={"messages": messages}).json()
        http.post("/v1/chat/completions", json={"model": MODEL, "messages": messages})
    assert counted["tokens"] == cell.requests[0].prompt_token_ids
    assert counted["count"] == len(counted["tokens"])


def bad(content: list[dict], before: int = 0) -> dict:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * before
    return {"model": MODEL, "messages": [*talk, {"role": "user", "content": content}]}


BROKEN = "data:image/png;base64," + base64.b64encode(png()[:300]).decode()
BAD = {
    "cut short": (bad([text("a"), {"type": "image_url", "image_url": BROKEN}]), "[0].content[1]"),
    "later message": (bad([{"type": "image_url", "image_url": BROKEN}], 1), "[2].content[0]"),
    "no image": (bad([image(b"%PDF-1.7")]), "[0].content[0]"),
    "no base64": (
        bad([{"type": "image_url", "image_url": "data:image/png;base64,***"}]),
        "[0].content[0]",
    ),
    "a strip": (bad([image(png(4000, 4))]), "[0].content[0]"),
    "too many": (bad([image(png(4, 4))] * 9), "[0].content[8]"),
    "in a system prompt": (
        {
            "model": MODEL,
            "messages": [
                {"role": "system", "content": [image(png())]},
                {"role": "user", "content": "a"},
            ],
        },
        "[0].content[0]",
    ),
}


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize(("body", "place"), BAD.values(), ids=BAD)
def test_a_bad_image_is_refused_by_its_place(
    cell: OneTokenCell, prompts: PromptBuilder, body: dict, place: str, route: str
) -> None:
    with http_face(cell, prompts) as http:
        answer = http.post(route, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "messages" + place)
    assert error["message"].startswith("messages" + place)
    assert not cell.requests


def test_an_image_as_large_as_allowed_passes(cell: OneTokenCell, prompts: PromptBuilder) -> None:
    data = png() + b"\0" * (10 * 2**20 - len(png()))  # what follows a PNG's end is not read
    with http_face(cell, prompts) as http:
        assert http.post("/v1/chat/completions", json=bad([image(data)])).status_code == 200
        refused = http.post("/v1/chat/completions", json=bad([image(data + b"\0" * 3)]))
    assert refused.json()["error"]["code"] == "image_too_large"


@pytest.mark.parametrize("has_tower", [False, True])
def test_a_model_without_vision_refuses_images_and_says_so(
    cell: OneTokenCell, prompts: PromptBuilder, blind: PromptBuilder, has_tower: bool
) -> None:
    with http_face(cell, blind if has_tower else prompts, vision=has_tower) as http:
        answer = http.post("/v1/chat/completions", json=bad([text("a"), image(png())]))
        counted = http.post("/tokenize", json=bad([image(png())]))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "messages[0].content[1]")
    assert "reads no images" in error["message"]
    assert counted.status_code == 400


@pytest.mark.parametrize("vision", [False, True])
def test_the_model_says_whether_it_sees(
    cell: OneTokenCell, prompts: PromptBuilder, vision: bool
) -> None:
    with http_face(cell, prompts, vision=vision) as http:
        (model,) = http.get("/v1/models").json()["data"]
    assert model["capabilities"]["vision"] is vision
    assert model_response(replace(CARD, has_vision=vision)).vision is vision


def test_nothing_of_an_image_is_logged(
    cell: OneTokenCell, prompts: PromptBuilder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="ostro")
    with http_face(cell, prompts) as http:
        http.post("/v1/chat/completions", json=bad([image(png())]))
        http.post("/v1/chat/completions", json=bad([image(b"no image")]))
    assert base64.b64encode(png())[40:60].decode() not in caplog.text
    assert json.dumps("no image") not in caplog.text


# ---- gRPC


class Context:
    """Keeps what a method sets."""

    def __init__(self) -> None:
        self.status: object = None
        self.details = ""

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def code(self) -> object:
        return self.status

    def set_code(self, code: object) -> None:
        self.status = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, metadata: object) -> None:
        self.metadata = metadata


def grpc_chat(
    cell: OneTokenCell, prompts: PromptBuilder, *parts: pb.Part, role: int = pb.ROLE_USER
) -> tuple[pb.ChatResponse, Context]:
    async def ask() -> tuple[pb.ChatResponse, Context]:
        frontend = Frontend(cell, prompts, CARD, CONFIG)
        methods, context = GrpcMethods(lambda: frontend, Metrics(MODEL)), Context()
        request = pb.ChatRequest(
            conversation=pb.Conversation(messages=[pb.Message(role=role, parts=parts)])
        )
        return await methods.Chat(request, context), context

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "picture", [pb.Image(data=png()), pb.Image(uri=data_uri(png()))], ids=["data", "uri"]
)
def test_grpc_shows_an_image(cell: OneTokenCell, prompts: PromptBuilder, picture: pb.Image) -> None:
    parts = (pb.Part(text="Is"), pb.Part(image=picture), pb.Part(text="a cat?"))
    answer, _ = grpc_chat(cell, prompts, *parts)
    ((start, num_tokens, _, _),) = places(cell.requests[0])
    assert (answer.usage.image_tokens, num_tokens) == (8, 8)
    before = prompts.table.decode(cell.requests[0].prompt_token_ids[:start])
    assert before.endswith("[INST]Is")


def test_both_faces_make_the_same_request(cell: OneTokenCell, prompts: PromptBuilder) -> None:
    grpc_chat(cell, prompts, pb.Part(text="See"), pb.Part(image=pb.Image(data=png())))
    with http_face(cell, prompts) as http:
        http.post("/v1/chat/completions", json=bad([text("See"), image(png())]))
    grpc, over_http = cell.requests
    assert grpc.prompt_token_ids == over_http.prompt_token_ids
    assert grpc.images == over_http.images


@pytest.mark.parametrize(
    ("picture", "why"),
    [
        (pb.Image(uri="https://example.com/a.png"), "data URI"),
        (pb.Image(uri="file:///etc/passwd"), "data URI"),
        (pb.Image(data=b"no image"), "send PNG"),
        (pb.Image(data=png()[:300]), "cut short"),
        (pb.Image(), "send PNG"),
    ],
)
def test_grpc_refuses_a_bad_image_by_its_place(
    cell: OneTokenCell, prompts: PromptBuilder, picture: pb.Image, why: str
) -> None:
    _, context = grpc_chat(cell, prompts, pb.Part(text="a"), pb.Part(image=picture))
    assert context.details.startswith("conversation.messages[0].parts[1]: ")
    assert why in context.details
    assert not cell.requests


# ---- the event loop


def test_images_are_read_off_the_event_loop(
    cell: OneTokenCell, prompts: PromptBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    build = frontend_module.RequestBuilder.chat

    def noting(*arguments: object) -> object:
        threads.append(threading.current_thread().name)
        return build(*arguments)

    monkeypatch.setattr(frontend_module.RequestBuilder, "chat", noting)
    grpc_chat(cell, prompts, pb.Part(image=pb.Image(data=png())))
    grpc_chat(cell, prompts, pb.Part(text="Hi"))
    assert threads[0].startswith("ostro-images")
    assert threads[1] == threading.main_thread().name
