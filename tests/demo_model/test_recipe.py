"""The recipe writes prompts as mistral-common does, holds out what it says, and learns."""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
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
import problems  # noqa: E402
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


def test_held_out_questions_are_never_trained() -> None:
    rng = random.Random(6)
    for make, level in ((tasks.multiply, (2, 2)), (tasks.sums, "3"), (tasks.cups, 3)):
        trained, held_out = (
            {make(rng, side, level).working for _ in range(1000)} for side in (False, True)
        )
        assert trained
        assert not trained & held_out


def test_factors_are_held_out_in_both_orders() -> None:
    rng, seen = random.Random(7), set()
    for _ in range(2000):
        numbers = re.findall(r"\d+", tasks.multiply(rng, True, (2, 2)).question)
        seen.add(tuple(map(int, numbers)))
    rng = random.Random(8)
    for _ in range(2000):
        a, b = map(int, re.findall(r"\d+", tasks.multiply(rng, False, (2, 2)).question))
        assert not {(a, b), (b, a)} & seen


@pytest.mark.parametrize(
    ("working", "lines"),
    [
        (tasks.add_working(47, 85), "47+85: 7+5=12, 4+8+1=13 -> 132"),
        (tasks.subtract_working(52, 17), "52-17: 2-7+10=5, 5-1-1=3 -> 35"),
        (
            tasks.multiply_working(47, 26),
            "47*6: 6*7=42, 6*4+4=28 -> 282\n47*20: 2*7=14, 2*4+1=9 -> 94 -> 940\n"
            "282+940: 2+0=2, 8+4=12, 2+9+1=12 -> 1222",
        ),
        (tasks.multiply_working(9, 12), "12*9: 9*2=18, 9*1+1=10 -> 108"),
        (tasks.sum_working([8, 5, 7]), "8+5: 8+5=13 -> 13\n13+7: 3+7=10, 1+1=2 -> 20"),
    ],
)
def test_workings(working: str, lines: str) -> None:
    assert working == lines


def test_right_is_what_the_example_wants() -> None:
    rng = random.Random(9)
    call = mixture.tools(rng, True, "closed")
    (name, arguments), *_ = call.calls
    reply = problems.Reply(text="", calls=((name, json.dumps(arguments)),))
    assert problems.is_right(call, reply)
    assert problems.is_valid_call(call, reply)
    other = problems.Reply(text="", calls=((name, "{"),))
    assert not problems.is_right(call, other)
    assert not problems.is_valid_call(call, other)
    no_call = mixture.tools(rng, True, "none")
    assert problems.is_right(no_call, problems.Reply(text="7"))
    assert not problems.is_right(no_call, reply)
    read = images.image_example(rng, True, "read")
    assert problems.is_right(read, problems.Reply(text=read.answer))
    assert problems.digits_right([read], [problems.Reply(text="")]) == 0.0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_resumes_learns_and_exports_what_transformers_loads(tmp_path: Path) -> None:
    """The smoke run: a few steps of two workers, stopped and gone on with."""
    run, to = tmp_path / "run", tmp_path / "model"
    small = ["--tokens", "1500", "--images", "4", "--log-every", "10", "--steps", "60"]
    for last in ("30", "60"):
        command = ["train.py", "--out", str(run), *small, "--stop-at", last]
        subprocess.run([sys.executable, *command], cwd=HERE, check=True, capture_output=True)
    rows = [json.loads(line) for line in (run / "log_0.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 60]
    assert rows[-1]["text_loss"] < 0.8 * rows[0]["text_loss"]
    command = ["export.py", "--run", str(run), "--to", str(to)]
    subprocess.run([sys.executable, *command], cwd=HERE, check=True, capture_output=True)
    from transformers import Mistral3ForConditionalGeneration

    _, info = Mistral3ForConditionalGeneration.from_pretrained(to, output_loading_info=True)
    assert not any(info.values()), info
    assert (to / "ostro.yaml").is_file()
