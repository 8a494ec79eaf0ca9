"""The recipe writes prompts as mistral-common does, holds out what it says, and learns."""

from __future__ import annotations

import io
import json
import random
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import encoding  # noqa: E402
import images  # noqa: E402
import mixture  # noqa: E402
import tasks  # noqa: E402
from tokenizer import make_tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def tekken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tekken.json"
    make_tokenizer(path)
    return path


def _content(example: tasks.Example) -> Any:
    if example.image is None:
        return example.question
    file = io.BytesIO()
    Image.fromarray(example.image).save(file, "PNG")
    url = "data:image/png;base64," + b64encode(file.getvalue()).decode()
    return [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": example.question},
    ]


def _messages(example: tasks.Example, before: list[tasks.Example], system: str) -> list[Any]:
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    for turn in before:
        messages += [
            {"role": "user", "content": turn.question},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": turn.working, "closed": True},
                    {"type": "text", "text": turn.answer},
                ],
            },
        ]
    return [*messages, {"role": "user", "content": _content(example)}]


def _after_results(example: tasks.Example) -> list[Any]:
    calls = [
        {
            "id": f"call{index:05d}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)},
        }
        for index, (name, arguments) in enumerate(example.calls)
    ]
    results = [
        {"role": "tool", "content": result, "tool_call_id": call["id"]}
        for call, result in zip(calls, example.results, strict=True)
    ]
    return [{"role": "assistant", "tool_calls": calls}, *results]


def _official(tokenizer: MistralTokenizer, messages: list[Any], tools: Any, effort: str) -> Any:
    request = {"messages": messages, "reasoning_effort": effort, "tools": tools or None}
    return tokenizer.encode_chat_completion(ChatCompletionRequest.model_validate(request))


def test_prompts_equal_those_of_mistral_common(tekken: Path) -> None:
    tokenizer, encoder = MistralTokenizer.from_file(tekken), encoding.Encoder(tekken)
    rng = random.Random(3)
    for index in range(200):
        is_image = index % 4 == 0
        example = (images.image_example if is_image else mixture.text_example)(rng, False)
        system = rng.choice(["", *mixture.SYSTEM_PROMPTS])
        effort = rng.choice(["none", "high"])
        official = _official(tokenizer, _messages(example, [], system), list(example.tools), effort)
        assert official.tokens == encoder.prompt(example, effort, system), official.text
        if is_image:
            np.testing.assert_allclose(
                official.images[0], encoding.pixels_of(example.image), atol=1e-5
            )


def test_conversations_equal_those_of_mistral_common(tekken: Path) -> None:
    tokenizer, encoder = MistralTokenizer.from_file(tekken), encoding.Encoder(tekken)
    rng = random.Random(4)
    for _ in range(40):
        before = [tasks.sums(rng, False) for _ in range(rng.randint(1, 2))]
        example = tasks.cups(rng, False)
        always_whole = random.Random(1)
        always_whole.random = lambda: 0.99  # type: ignore[method-assign]
        sequence = encoder.sequence(always_whole, example, before)
        official = _official(tokenizer, _messages(example, before, ""), [], "high").tokens
        assert sequence.ids[: len(official)] == official
        said = [i for i, is_said in zip(sequence.ids, sequence.said, strict=True) if is_said]
        assert said.count(encoding.EOS) == len(before) + 1


def test_tool_results_equal_those_of_mistral_common(tekken: Path) -> None:
    tokenizer, encoder = MistralTokenizer.from_file(tekken), encoding.Encoder(tekken)
    rng, checked = random.Random(5), 0
    while checked < 20:
        example = mixture.tools(rng, False, "closed")
        if not example.results:
            continue
        never_thinks = random.Random(1)
        never_thinks.random = lambda: 0.2  # type: ignore[method-assign]
        ids = encoder.sequence(never_thinks, example, []).ids
        messages = _messages(example, [], "") + _after_results(example)
        official = _official(tokenizer, messages, list(example.tools), "none").tokens
        assert ids[: len(official)] == official
        checked += 1
