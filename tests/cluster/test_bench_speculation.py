"""`ostro bench speculation`: what it asks, what it makes of the answers, and what it refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from ostro.actors.engine.request import FinishReason, GenerationRequest, TokenEvent
from ostro.actors.engine.step import ShardLoad
from ostro.cluster.bench import app
from ostro.cluster.bench_engine import BenchmarkError, greedy_request
from ostro.cluster.bench_speculation import (
    Arrival,
    parse_speculation,
    question_prompts,
    run_batch,
    steady_tokens_per_s,
)
from ostro.cluster.model_paths import resolve_model
from ostro.configs.errors import ConfigError
from ostro.configs.speculation import DraftMethod, SpeculationConfig

_EMBEDDED = resolve_model("embedded")
_HEAD = _EMBEDDED / "eagle"


@pytest.mark.parametrize(
    ("text", "speculation"),
    [
        ("none", None),
        ("auto", SpeculationConfig(method=DraftMethod.EAGLE, draft_model=str(_HEAD))),
        ("eagle:embedded", SpeculationConfig(method=DraftMethod.EAGLE, draft_model=str(_HEAD))),
        ("ngram", SpeculationConfig(method=DraftMethod.NGRAM)),
        ("eagle:/a/b:c", SpeculationConfig(method=DraftMethod.EAGLE, draft_model="/a/b:c")),
        (
            "{method: ngram, num_draft_tokens: 5, adaptive: false}",
            SpeculationConfig(method=DraftMethod.NGRAM, num_draft_tokens=5, adaptive=False),
        ),
    ],
)
def test_a_subject_is_read_from_its_text(text: str, speculation: SpeculationConfig | None) -> None:
    assert parse_speculation(text, _EMBEDDED) == speculation


@pytest.mark.parametrize("text", ["medusa", "eagle", "{method: ngram, drafts: 2}", "[1"])
def test_another_subject_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="speculation"):
        parse_speculation(text, _EMBEDDED)


def test_a_head_that_the_model_does_not_bring_is_missed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"brings no draft head; name one with eagle:DIR"):
        parse_speculation("auto", tmp_path)


def test_tokens_count_while_all_requests_decode() -> None:
    first = [Arrival(0.0, [1]), Arrival(2.0, [2, 3]), Arrival(4.0, [4, 5, 6])]
    second = [Arrival(1.0, [1]), Arrival(3.0, [2]), Arrival(9.0, [3])]
    assert steady_tokens_per_s([first, second]) == pytest.approx((2 + 3 + 1) / 3.0)


def test_requests_that_do_not_decode_together_have_no_speed() -> None:
    early, late = [Arrival(0.0, [1]), Arrival(1.0, [2])], [Arrival(0.9, [1]), Arrival(3.0, [2])]
    with pytest.raises(BenchmarkError, match="--new-tokens"):
        steady_tokens_per_s([early, late])


class _Cell:
    """Two tokens a step, one of them drafted; half of the drafts were wrong."""

    def __init__(self) -> None:
        self.load = ShardLoad(num_output_tokens=7, num_drafted=(3,), num_accepted=(1,))

    async def state(self) -> SimpleNamespace:
        return SimpleNamespace(loads={0: self.load})

    async def submit(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        for index in range(0, request.stop.max_tokens, 2):
            await asyncio.sleep(0)
            load = self.load
            self.load = ShardLoad(
                num_output_tokens=load.num_output_tokens + 2,
                num_drafted=(load.num_drafted[0] + 2,),
                num_accepted=(load.num_accepted[0] + 1,),
            )
            yield TokenEvent(request.request_id, index, [7, 8])


def test_a_batch_tells_speed_steps_and_answers() -> None:
    requests = [greedy_request(name, [5], 20) for name in "ab"]
    sample = asyncio.run(run_batch(_Cell(), requests))  # type: ignore[arg-type]
    assert sample.tokens_per_s > 0
    assert sample.tokens_per_step == 2.0
    assert sample.share_right == 0.5
    assert sample.answers == [[7, 8] * 10] * 2


def test_a_request_that_fails_ends_the_benchmark() -> None:
    class Failing(_Cell):
        async def submit(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
            yield TokenEvent(
                request.request_id,
                0,
                [],
                finish_reason=FinishReason.ERROR,
                error_code="shard_lost",
                error_message="gone",
            )

    with pytest.raises(BenchmarkError, match="shard_lost: gone"):
        asyncio.run(run_batch(Failing(), [greedy_request("a", [5], 20)]))  # type: ignore[arg-type]


def test_questions_become_chats() -> None:
    short, long = question_prompts(_EMBEDDED, ["What is 1 + 2?", "What is 3 + 4 + 50?"], "high")
    assert len(short) < len(long)
    with pytest.raises(BenchmarkError, match="no questions"):
        question_prompts(_EMBEDDED, [], "high")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch", ""], "ask for some"),
        (["--layout", "ring"], "must be 'single'"),
        (["--speculation", "medusa"], "must be one of"),
        (["--questions", "/nowhere"], "does not exist"),
    ],
)
def test_wrong_options_are_refused_before_anything_starts(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["speculation", *arguments])
    assert result.exit_code in (1, 2)
    assert said in " ".join(result.output.split())


@pytest.mark.slow
@pytest.mark.cluster
def test_the_table_compares_cells_with_drafts_to_one_without(tmp_path: Path) -> None:
    questions = tmp_path / "questions"
    questions.write_text("What is 47 * 26?\n\nWhat is 478 + 95?\n")
    options = ["--questions", str(questions), "--new-tokens", "24", "--rounds", "1"]
    options += ["--batch", "2", "--dtype", "float32"]
    result = CliRunner().invoke(app, ["speculation", "--model", "embedded", *options])
    assert result.exit_code == 0, result.output
    assert "ratio to none" in result.output
    rows = [line for line in result.output.splitlines() if "answers as the first" in line]
    assert len(rows) == 3
    assert all("100 %" in row for row in rows)
