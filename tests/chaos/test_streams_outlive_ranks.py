"""The router and ranks of a served cluster are killed under HTTP clients: their answers go on."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from served import Served

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

QUESTION = [{"role": "user", "content": "What is 847 * 26?"}]
SCHEMA = {
    "type": "object",
    "properties": {"result": {"type": "integer"}},
    "required": ["result"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("log") / "serve.log") as served:
        yield served


def epoch(served: Served) -> int:
    """As /metrics tells it."""
    text = httpx.get(f"{served.url}/metrics", timeout=30).text
    (line,) = (line for line in text.splitlines() if line.startswith("ostro_cell_epoch{"))
    return int(float(line.split()[-1]))


def ranks(served: Served, kind: bytes) -> list[int]:
    def title(pid: int) -> bytes:
        return Path(f"/proc/{pid}/cmdline").read_bytes()

    return [pid for pid in served.children() if kind in title(pid)]


@pytest.mark.parametrize("kind", [b"PlacedRouter", b"ExpertShard", b"AttentionShard"])
def test_answers_of_every_kind_go_on(served: Served, kind: bytes) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="-", max_retries=0) as client:
        model = client.models.list().data[0].id
        common = {"model": model, "messages": QUESTION, "reasoning_effort": "high"}

        def held() -> str:
            schema = {"type": "json_schema", "json_schema": {"name": "r", "schema": SCHEMA}}
            answer = client.chat.completions.create(**common, response_format=schema)
            return answer.choices[0].message.content

        def several() -> list[str]:
            answer = client.chat.completions.create(**common, n=3, seed=4, temperature=0.9)
            return [choice.message.content for choice in answer.choices]

        def streamed(kill: bool) -> tuple[str, str]:
            thoughts, text = "", ""
            with client.chat.completions.create(**common, stream=True) as chunks:
                for chunk in chunks:
                    delta = chunk.choices[0].delta
                    if kill and not thoughts:
                        for pid in ranks(served, kind)[:1]:
                            os.kill(pid, signal.SIGKILL)
                    thoughts += getattr(delta, "reasoning_content", None) or ""
                    text += delta.content or ""
            return thoughts, text

        before = streamed(kill=False), held(), several()
        first_epoch = epoch(served)
        with ThreadPoolExecutor() as pool:
            beside = pool.submit(held), pool.submit(several)
            disturbed = streamed(kill=True), *(future.result() for future in beside)
        assert disturbed == before
        assert epoch(served) > first_epoch
        assert json.loads(before[1]).keys() == {"result"}
