"""The real sampler over drafts: penalties, biases, bans, draws and log probabilities as without."""

from __future__ import annotations

import random
import zlib
from array import array

import msgspec
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ostro.actors.engine.grammar_masks import MaskMaker
from ostro.actors.engine.request import (
    GenerationRequest,
    RequestProgress,
    SamplingParams,
    StopParams,
    ThinkingParams,
    TokenEvent,
)
from ostro.actors.engine.scheduler import Scheduler
from ostro.actors.engine.step import ScheduledStep
from ostro.actors.model.sampler import Sampler
from ostro.actors.step_sampling import StepSampling
from ostro.configs.deployment import EngineConfig
from ostro.configs.speculation import DraftMethod, SpeculationConfig

_VOCABULARY = 24
_MOST = 5
_MASKS = MaskMaker(_VOCABULARY)


def _logits(tokens: list[int]) -> torch.Tensor:
    """Of a model whose next token depends on all tokens before, and is seldom sure."""
    generator = torch.Generator().manual_seed(zlib.crc32(array("i", tokens).tobytes()))
    return torch.randn(_VOCABULARY, generator=generator) * 2.0


def _step_logits(step: ScheduledStep) -> list[torch.Tensor]:
    """After each token that samples, over the tokens that the step computes; in two parts."""
    rows = []
    for entry in step.entries:
        if not entry.samples:
            continue
        before = entry.progress.known_tokens(0, entry.start)
        tokens = [*before, *(token for token in entry.token_ids if token is not None)]
        ends = range(len(tokens) - entry.num_drafts, len(tokens) + 1)
        rows += [_logits(tokens[:end]) for end in ends]
    cut = len(rows) // 2
    return [torch.stack(part) for part in (rows[:cut], rows[cut:]) if part]


def _run(
    requests: list[GenerationRequest], guesses: random.Random | None, outputs: dict[str, list[int]]
) -> tuple[dict[str, TokenEvent], int]:
    """Per request all of its events as one, and the steps that it took."""
    speculation = SpeculationConfig(method=DraftMethod.NGRAM)
    config = EngineConfig(
        page_size=4,
        max_tokens_per_step=32,
        max_running_requests=4,
        speculation=None if guesses is None else speculation,
    )
    scheduler = Scheduler(config, 64, 100, clock=lambda: 1.0)
    sampling = StepSampling(scheduler, Sampler(_VOCABULARY), _MASKS)
    for request in requests:
        scheduler.add(RequestProgress(request, arrived_s=0.0))
    told: dict[str, TokenEvent] = {}
    num_steps = 0
    while scheduler.has_work():
        step = scheduler.schedule()
        assert step is not None
        num_steps += 1
        sampling.start(step)
        sampling.finish(step, _step_logits(step))
        for event in scheduler.complete(step):
            before = told.get(event.request_id)
            joined = event if before is None else before.joined(event)
            assert joined is not None
            told[event.request_id] = joined
        for entry in step.entries if guesses is not None else ():
            progress = entry.progress
            known = len(progress.output_token_ids)
            progress.draft_token_ids = [
                token if guesses.random() < 0.8 else guesses.randrange(_VOCABULARY)
                for token in outputs[progress.request_id][known : known + _MOST]
            ]
    plain = {name: msgspec.structs.replace(event, seconds=None) for name, event in told.items()}
    return plain, num_steps


_SAMPLING = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.5]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 5]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.4]),
    logit_bias=st.sampled_from([{}, {5: 3.0, 9: -20.0}]),
    seed=st.integers(0, 9),
    num_logprobs=st.sampled_from([None, 0, 2]),
    banned_token_ids=st.sampled_from([(), (6, 7)]),
)
_THINKING = st.builds(
    ThinkingParams,
    begin_token_id=st.just(3),
    end_token_id=st.just(4),
    budget_tokens=st.none() | st.integers(0, 9),
    soft_zone_tokens=st.integers(0, 4),
    closing_token_ids=st.sampled_from([(), (5, 6, 4)]),
    starts_open=st.booleans(),
)
_REQUESTS = st.builds(
    GenerationRequest,
    request_id=st.just(""),
    prompt_token_ids=st.lists(st.integers(5, 23), min_size=1, max_size=5),
    sampling=_SAMPLING,
    stop=st.builds(StopParams, max_tokens=st.integers(1, 16), min_tokens=st.integers(0, 5)),
    thinking=st.none() | _THINKING,
)


@given(requests=st.lists(_REQUESTS, min_size=1, max_size=3), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_drafts_change_no_token_and_no_log_probability(
    requests: list[GenerationRequest], seed: int
) -> None:
    named = [
        msgspec.structs.replace(request, request_id=f"r{i}") for i, request in enumerate(requests)
    ]
    wanted, num_plain = _run(named, None, {})
    outputs = {name: event.token_ids for name, event in wanted.items()}
    found, num_steps = _run(named, random.Random(seed), outputs)
    assert found == wanted
    assert num_steps <= num_plain


def test_penalties_see_every_token_before() -> None:
    """A token that was just accepted is penalised for the next one of the same step."""
    request = GenerationRequest(
        request_id="r",
        prompt_token_ids=[5],
        sampling=SamplingParams(presence_penalty=50.0),
        stop=StopParams(max_tokens=9, ignore_eos=True),
    )
    (wanted, _) = _run([request], None, {})
    tokens = wanted["r"].token_ids
    assert len(set(tokens)) == len(tokens)
    found, num_steps = _run([request], random.Random(1), {"r": tokens})
    assert found == wanted
    assert num_steps < 9
