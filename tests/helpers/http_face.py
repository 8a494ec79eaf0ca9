"""The HTTP face over a scripted frontend, behind a real server, and the clients that talk to it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import httpx
import mistralai.client as mistral
import openai
from scripted_frontend import MODEL, ScriptedFrontend, served

from ostro.cluster.http_ingress import build_http_app
from ostro.cluster.metrics import Metrics
from ostro.configs.deployment import ServingConfig

HELLO = [{"role": "user", "content": "Say hello."}]


@contextlib.contextmanager
def face(frontend: ScriptedFrontend, **serving) -> Iterator[httpx.Client]:
    app = build_http_app(lambda: frontend, ServingConfig(**serving), Metrics(MODEL))
    with served(app) as url, httpx.Client(base_url=url, timeout=20) as client:
        yield client


def openai_client(http: httpx.Client, *, strict: bool = True) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{http.base_url}/v1",
        api_key="none",
        max_retries=0,
        _strict_response_validation=strict,
    )


def mistral_client(http: httpx.Client, path: str = "") -> mistral.Mistral:
    return mistral.Mistral(api_key="none", server_url=str(http.base_url).rstrip("/") + path)


def sse(text: str) -> list[dict]:
    """The chunks of a stream in the OpenAI dialect, which `[DONE]` ends."""
    lines = [line[6:] for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
