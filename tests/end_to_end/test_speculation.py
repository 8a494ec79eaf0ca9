"""Drafts in cells of the embedded model: the same answers from every layout, in fewer steps."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import reduce

import msgspec
import pytest
from local_cell import ProcessPool, local_cell

from ostro.actors.engine.request import (
    GenerationRequest,
    GrammarParams,
    SamplingParams,
    StopParams,
    ThinkingParams,
    TokenEvent,
)
from ostro.actors.fabric.messages import State
from ostro.actors.model.random_checkpoint import TINY, write_random_head
from ostro.cluster.cell_client import CellClient
from ostro.cluster.generation import ChatMessage
from ostro.cluster.model_paths import resolve_model
from ostro.cluster.prompt import PromptBuilder
from ostro.configs.deployment import (
    DeploymentConfig,
    DispatchMode,
    EngineConfig,
    Layout,
    LayoutConfig,
)
from ostro.configs.model import load_model_config
from ostro.configs.reasoning import ReasoningConfig
from ostro.configs.speculation import DraftMethod, SpeculationConfig

# By request and choice, all events as one.
Answers = dict[tuple[str, int], TokenEvent]

_MODEL = resolve_model("embedded")
_NGRAM = SpeculationConfig(method=DraftMethod.NGRAM, num_draft_tokens=4, adaptive=False)
_CUPS = "The ball is under cup 2. Swap cups 2 and 4. Swap cups 1 and 3. Where is the ball?"
_LAYOUTS = [
    (Layout.SINGLE, 1, 1, 1),
    (Layout.COLOCATED, 2, 2, 1),
    (Layout.SPLIT, 1, 2, 1),
    (Layout.SPLIT, 2, 2, 2),
]


@pytest.fixture(scope="module")
def requests() -> list[GenerationRequest]:
    """Everything that makes a token depend on those before it, and some that is plain."""
    builder = PromptBuilder(_MODEL, ReasoningConfig())
    begin, end = builder.special.begin_think, builder.special.end_think
    assert begin is not None
    assert end is not None
    thinking = {"begin_token_id": begin, "end_token_id": end}
    closing = builder.closing_token_ids

    def ask(text: str, effort: str = "high") -> list[int]:
        return builder.chat([ChatMessage(role="user", text=text)], (), effort).token_ids

    def request(prompt: list[int], *, max_tokens: int = 60, **more: object) -> GenerationRequest:
        stop = {"max_tokens": max_tokens, **more.pop("stop", {})}  # type: ignore[dict-item]
        return GenerationRequest(
            request_id="",
            prompt_token_ids=prompt,
            stop=StopParams(**stop),
            sampling=SamplingParams(num_logprobs=2, **more.pop("sampling", {})),  # type: ignore[arg-type]
            **more,  # type: ignore[arg-type]
        )

    asked = [
        request(ask(_CUPS), max_tokens=120),
        request(ask("What is 47 * 26?")),
        request(ask(_CUPS), sampling={"temperature": 0.8, "seed": 5}, num_choices=3),
        request(ask(_CUPS), sampling={"repetition_penalty": 1.2, "frequency_penalty": 0.3}),
        request(ask("What is 478 + 95?"), sampling={"temperature": 1.2, "top_k": 9, "seed": 2}),
        request(ask(_CUPS, "none"), stop={"min_tokens": 20}),
        request(ask(_CUPS, "none"), stop={"ignore_eos": True}),
        request(
            ask(_CUPS),
            thinking=ThinkingParams(
                **thinking, budget_tokens=30, soft_zone_tokens=8, closing_token_ids=closing
            ),
        ),
        request(
            ask("What is the weather in Rome? Answer in JSON."),
            thinking=ThinkingParams(**thinking, budget_tokens=0),
            grammar=GrammarParams(
                text='start: %json {"type": "array", "items": {"type": "boolean"}, "minItems": 4}'
            ),
        ),
    ]
    return [msgspec.structs.replace(one, request_id=f"r{i}") for i, one in enumerate(asked)]


def _deployment(
    layout: Layout,
    num_attention: int,
    num_experts: int,
    num_micro_batches: int,
    speculation: SpeculationConfig | None,
    **engine: object,
) -> DeploymentConfig:
    return DeploymentConfig(
        model="embedded",
        layout=LayoutConfig(
            layout=layout,
            num_attention_shards=num_attention,
            num_expert_shards=num_experts,
            dispatch=DispatchMode.AUTO,
            num_micro_batches=num_micro_batches,
            min_tokens_per_micro_batch=2,
        ),
        engine=EngineConfig(
            **{  # type: ignore[arg-type]
                "num_pages": 512,
                "max_tokens_per_step": 256,
                "max_running_requests": 16,
                "num_threads": 1,
                "speculation": speculation,
                **engine,
            }
        ),
    )


def _joined(events: Iterable[TokenEvent]) -> TokenEvent:
    def join(before: TokenEvent, event: TokenEvent) -> TokenEvent:
        joined = before.joined(event)
        assert joined is not None
        return joined

    return reduce(join, events)


async def _answers(client: CellClient, requests: Iterable[GenerationRequest]) -> Answers:
    """Everything that they are told."""

    async def answer(request: GenerationRequest) -> list[TokenEvent]:
        return [event async for event in client.submit(request)]

    told: dict[tuple[str, int], list[TokenEvent]] = {}
    for request, events in zip(requests, await asyncio.gather(*map(answer, requests)), strict=True):
        for event in events:
            told.setdefault((request.request_id, event.choice), []).append(event)
    return {name: _joined(events) for name, events in told.items()}


def _plain(event: TokenEvent) -> TokenEvent:
    """Without what a busy machine decides, and without the log probabilities."""
    return msgspec.structs.replace(
        event, request_id="", logprobs=None, seconds=None, num_cached_tokens=0
    )


@pytest.fixture(scope="module")
def wanted(pool: ProcessPool, requests: list[GenerationRequest]) -> Answers:
    """What a cell without speculation answers."""

    async def run() -> Answers:
        plain = _deployment(Layout.SINGLE, 1, 1, 1, None)
        async with local_cell(pool, plain, _MODEL) as cell:
            return await _answers(cell.client, requests)

    return asyncio.run(run())


@pytest.fixture(scope="module")
def random_head(tmp_path_factory: pytest.TempPathFactory) -> SpeculationConfig:
    """A head that is hardly ever right."""
    directory = tmp_path_factory.mktemp("head")
    write_random_head(directory, TINY, load_model_config(_MODEL))
    return SpeculationConfig(
        method=DraftMethod.EAGLE, num_draft_tokens=3, draft_model=str(directory), adaptive=False
    )


@pytest.mark.parametrize(
    ("layout", "num_pages"),
    [(_LAYOUTS[0], 512), (_LAYOUTS[2], 512), (_LAYOUTS[0], 40)],
    ids=["single", "split 1A:2E", "single, preempted"],
)
def test_a_bad_head_changes_no_answer(
    pool: ProcessPool,
    requests: list[GenerationRequest],
    wanted: Answers,
    random_head: SpeculationConfig,
    layout: tuple[Layout, int, int, int],
    num_pages: int,
) -> None:
    async def run() -> Answers:
        drafting = _deployment(*layout, random_head, num_pages=num_pages)
        async with local_cell(pool, drafting, _MODEL) as cell:
            return await _answers(cell.client, requests)

    answers = asyncio.run(run())
    assert answers.keys() == wanted.keys()
    for name, event in answers.items():
        assert _plain(event) == _plain(wanted[name]), name


def test_the_embedded_models_head_answers_in_fewer_steps(
    pool: ProcessPool,
    requests: list[GenerationRequest],
    wanted: Answers,
) -> None:
    head = SpeculationConfig(
        method=DraftMethod.EAGLE,
        num_draft_tokens=3,
        draft_model=str(_MODEL / "eagle"),
        adaptive=False,
    )

    async def run() -> tuple[Answers, int]:
        async with local_cell(pool, _deployment(*_LAYOUTS[0], head), _MODEL) as cell:
            answers = await _answers(cell.client, requests[:1])
            return answers, (await cell.client.state()).num_steps

    answers, num_steps = asyncio.run(run())
    ((name, event),) = answers.items()
    assert _plain(event) == _plain(wanted[name])
    assert len(event.token_ids) > 1.5 * num_steps


@pytest.mark.parametrize(
    ("layout", "num_pages"),
    [
        pytest.param(_LAYOUTS[0], 512, id="single"),
        pytest.param(_LAYOUTS[1], 512, id="colocated", marks=pytest.mark.slow),
        pytest.param(_LAYOUTS[2], 512, id="split 1A:2E", marks=pytest.mark.slow),
        pytest.param(_LAYOUTS[3], 512, id="split 2A:2E"),
        pytest.param(_LAYOUTS[0], 40, id="single, preempted"),
    ],
)
def test_every_layout_gives_with_drafts_what_a_cell_gives_without(
    pool: ProcessPool,
    requests: list[GenerationRequest],
    wanted: Answers,
    layout: tuple[Layout, int, int, int],
    num_pages: int,
) -> None:
    async def run() -> tuple[Answers, State]:
        drafting = _deployment(*layout, _NGRAM, num_pages=num_pages)
        async with local_cell(pool, drafting, _MODEL) as cell:
            return await _answers(cell.client, requests), await cell.client.state()

    answers, state = asyncio.run(run())
    assert answers.keys() == wanted.keys()
    for name, event in answers.items():
        assert _plain(event) == _plain(wanted[name]), name
        for ours, theirs in zip(event.logprobs or (), wanted[name].logprobs or (), strict=True):
            assert ours.token_id == theirs.token_id
            assert ours.logprob == pytest.approx(theirs.logprob, rel=1e-3, abs=1e-3)
    assert sum(load.num_accepted[0] for load in state.loads.values() if load.num_accepted) > 20
