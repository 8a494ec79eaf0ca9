"""Images by URL through both faces: the same prompt as with the file, and no fetch in vain."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from image_host import WAIT_S, ImageHost
from one_token_cell import CARD, CONFIG, OneTokenCell
from PIL import Image
from scripted_frontend import MODEL, served
from tokenizer_files import write_tokenizer

from ostro.actors.engine.request import ImageInput
from ostro.actors.errors import InvalidRequestError
from ostro.cluster.frontend import Frontend
from ostro.cluster.generation import ChatGeneration
from ostro.cluster.grpc_request import chat_generation
from ostro.cluster.http_ingress import build_http_app
from ostro.cluster.image_fetch import ImageFetcher
from ostro.cluster.metrics import Metrics
from ostro.cluster.prompt import PromptBuilder
from ostro.configs.deployment import ServingConfig
from ostro.configs.image_fetch import ImageFetchConfig
from ostro.configs.reasoning import ReasoningConfig
from ostro.protos import generation_pb2 as pb


def png() -> bytes:
    rows = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(rows).save(file, "PNG")
    return file.getvalue()


PNG = png()
DATA_URI = "data:image/png;base64," + base64.b64encode(PNG).decode()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> PromptBuilder:
    return PromptBuilder(write_tokenizer(tmp_path_factory.mktemp("model")), ReasoningConfig())


@pytest.fixture
def host(tmp_path: Path) -> Iterator[ImageHost]:
    with ImageHost(tmp_path) as host:
        host.files = {"/a.png": PNG, "/page": b"<html>"}
        yield host


@pytest.fixture
def cell() -> OneTokenCell:
    return OneTokenCell()


def make_frontend(
    cell: OneTokenCell, prompts: PromptBuilder, host: ImageHost, *, has_vision: bool = True
) -> Frontend:
    fetch = ImageFetchConfig(allowed_hosts=("*",), allowed_ports=(host.port,), timeout_s=WAIT_S)
    fetcher = ImageFetcher(
        ServingConfig(image_fetch=fetch),
        look_up=host.look_up,
        may_reach=lambda address: address == "127.0.0.1",
        trust=host.trust,
    )
    card = replace(CARD, has_vision=has_vision)
    return Frontend(cell, prompts, card, CONFIG, fetcher)


@contextlib.contextmanager
def face(frontend: Frontend) -> Iterator[httpx.Client]:
    app = build_http_app(lambda: frontend, ServingConfig(), Metrics(MODEL))
    with served(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def chat(url: str) -> dict:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    return {"model": MODEL, "messages": [{"role": "user", "content": content}]}


def messages(url: str) -> dict:
    image = {"type": "image", "source": {"type": "url", "url": url}}
    content = [image, {"type": "text", "text": "?"}]
    return {"model": MODEL, "max_tokens": 4, "messages": [{"role": "user", "content": content}]}


def responses(url: str) -> dict:
    content = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "?"}]
    return {"model": MODEL, "store": False, "input": [{"role": "user", "content": content}]}


DIALECTS = {
    "/v1/chat/completions": (chat, "messages[0].content[0]"),
    "/mistral/v1/chat/completions": (chat, "messages[0].content[0]"),
    "/tokenize": (chat, "messages[0].content[0]"),
    "/v1/messages": (messages, "messages[0].content[0]"),
    "/v1/messages/count_tokens": (messages, "messages[0].content[0]"),
    "/v1/responses": (responses, "input[0].content[0]"),
}


@pytest.mark.parametrize("path", DIALECTS)
def test_every_dialect_makes_the_prompt_that_the_file_makes(
    cell: OneTokenCell, prompts: PromptBuilder, host: ImageHost, path: str
) -> None:
    make, _ = DIALECTS[path]
    with face(make_frontend(cell, prompts, host)) as http:
        by_url = http.post(path, json=make(host.url("/a.png")))
        by_file = http.post(path, json=make(DATA_URI))
    assert by_url.status_code == by_file.status_code == 200
    assert len(host.asked) == 1
    if cell.requests:
        first, second = cell.requests
        assert first.images == second.images  # digests too: the shards compute it once
        assert first.prompt_token_ids == second.prompt_token_ids
    else:
        assert by_url.json() == by_file.json()


@pytest.mark.parametrize("path", DIALECTS)
@pytest.mark.parametrize("allowed", [False, True])
def test_every_dialect_refuses_by_the_images_place(
    cell: OneTokenCell, prompts: PromptBuilder, host: ImageHost, path: str, allowed: bool
) -> None:
    make, place = DIALECTS[path]
    frontend = make_frontend(cell, prompts, host)
    if not allowed:
        frontend = Frontend(cell, prompts, CARD, CONFIG)
    with face(frontend) as http:
        answer = http.post(path, json=make(host.url("/nothing")))
    why = "answers with status 404" if allowed else "nothing is fetched unless serving.image_fetch"
    assert answer.status_code == 400
    assert f"{place}: " in answer.text
    assert why in answer.text
    assert len(host.asked) == allowed
    assert not cell.requests


def test_what_a_host_calls_an_image_is_not_believed(
    cell: OneTokenCell, prompts: PromptBuilder, host: ImageHost
) -> None:
    with face(make_frontend(cell, prompts, host)) as http:
        answer = http.post("/v1/chat/completions", json=chat(host.url("/page")))
    assert answer.status_code == 400
    assert "no image file that can be read" in answer.json()["error"]["message"]


IN_VAIN = {
    "another model": ({"model": "gpt-5"}, 404),
    "too many images": ({"num_images": 9}, 400),
    "a system prompt": ({"role": "system"}, 400),
    "an option out of range": ({"temperature": 9}, 400),
    "no such effort": ({"reasoning_effort": "huge"}, 400),
    "no vision": ({"has_vision": False}, 400),
}


@pytest.mark.parametrize(("fields", "status"), IN_VAIN.values(), ids=IN_VAIN)
def test_nothing_is_fetched_for_what_is_refused_anyway(
    cell: OneTokenCell, prompts: PromptBuilder, host: ImageHost, fields: dict, status: int
) -> None:
    fields = dict(fields)
    frontend = make_frontend(cell, prompts, host, has_vision=fields.pop("has_vision", True))
    body = chat(host.url("/a.png"))
    (message,) = body["messages"]
    message["role"] = fields.pop("role", "user")
    message["content"] = message["content"][:1] * fields.pop("num_images", 1)
    with face(frontend) as http:
        answer = http.post("/v1/chat/completions", json=body | fields)
    assert answer.status_code == status
    assert not host.asked


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_who_leaves_ends_the_fetch(
    cell: OneTokenCell, prompts: PromptBuilder, host: ImageHost, stream: bool
) -> None:
    with face(make_frontend(cell, prompts, host)) as http:

        async def leave() -> None:
            async with httpx.AsyncClient(base_url=http.base_url, timeout=WAIT_S) as client:
                body = chat(host.url("/slow")) | {"stream": stream}
                asked = asyncio.create_task(client.post("/v1/chat/completions", json=body))
                assert await asyncio.to_thread(host.begun.wait, WAIT_S)
                asked.cancel()
                await asyncio.wait([asked])

        asyncio.run(leave())
        assert host.left.wait(WAIT_S)
    assert not cell.requests


# ---- gRPC


def of_grpc(url: str) -> ChatGeneration:
    parts = [pb.Part(image=pb.Image(uri=url)), pb.Part(text="?")]
    message = pb.Message(role=pb.ROLE_USER, parts=parts)
    return chat_generation(pb.ChatRequest(conversation=pb.Conversation(messages=[message])))


def images_of(frontend: Frontend, cell: OneTokenCell, url: str) -> tuple[ImageInput, ...]:
    async def ask() -> None:
        async for _ in frontend.chat(of_grpc(url)):
            pass

    asyncio.run(ask())
    return cell.requests[-1].images


def test_grpc_takes_a_url_as_it_takes_a_file(
    cell: OneTokenCell, prompts: PromptBuilder, host: ImageHost
) -> None:
    frontend = make_frontend(cell, prompts, host)
    by_url = images_of(frontend, cell, host.url("/a.png"))
    assert by_url == images_of(frontend, cell, DATA_URI)
    with pytest.raises(InvalidRequestError) as caught:
        images_of(frontend, cell, host.url("/nothing"))
    assert caught.value.param == "conversation.messages[0].parts[0]"
