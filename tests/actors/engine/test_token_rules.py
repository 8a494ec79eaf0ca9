"""Stop rules in their order, and what the sampler is told."""

from __future__ import annotations

import pytest
from engine_fakes import EOS, make_request

from ostro.actors.engine.effort import ThinkingTracker
from ostro.actors.engine.request import (
    FinishReason,
    GenerationRequest,
    RequestProgress,
    ThinkingParams,
)
from ostro.actors.engine.token_rules import SamplingState, reason_to_end, sampling_state


def _after(request: GenerationRequest, *output: int) -> RequestProgress:
    return RequestProgress(request, arrived_s=0.0, output_token_ids=output)


def test_request_goes_on_while_nothing_ends_it() -> None:
    assert reason_to_end(_after(make_request(max_tokens=3), 5, 6)) is None


@pytest.mark.parametrize("token_id", [EOS, 9])
def test_request_ends_with_eos_or_a_stop_token(token_id: int) -> None:
    progress = _after(make_request(stop_token_ids=(9,)), 5, token_id)
    assert reason_to_end(progress) is FinishReason.STOP


def test_request_ends_by_its_stop_token_rather_than_by_length() -> None:
    assert reason_to_end(_after(make_request(max_tokens=2), 5, EOS)) is FinishReason.STOP


@pytest.mark.parametrize(("min_tokens", "reason"), [(2, FinishReason.STOP), (3, None)])
def test_stop_token_ends_only_what_is_long_enough(
    min_tokens: int, reason: FinishReason | None
) -> None:
    assert reason_to_end(_after(make_request(min_tokens=min_tokens), 5, 6, EOS)) is reason


def test_ignore_eos_ignores_eos_and_no_other_stop_token() -> None:
    request = make_request(ignore_eos=True, stop_token_ids=(9,))
    assert reason_to_end(_after(request, EOS)) is None
    assert reason_to_end(_after(request, 9)) is FinishReason.STOP


def test_request_ends_by_length_rather_than_by_the_models_limit() -> None:
    progress = _after(make_request(max_tokens=2), 5, 6)
    progress.max_num_tokens = 5
    assert reason_to_end(progress) is FinishReason.LENGTH


def test_request_ends_at_the_models_limit() -> None:
    progress = _after(make_request(max_tokens=9), 5, 6)
    progress.max_num_tokens = 5
    assert reason_to_end(progress) is FinishReason.MODEL_LENGTH


def test_sampler_is_free_when_nothing_is_asked_of_it() -> None:
    assert sampling_state(_after(make_request())) == SamplingState(None, None, ())


def test_sampler_may_not_stop_before_min_tokens() -> None:
    request = make_request(min_tokens=1, stop_token_ids=(9,))
    assert sorted(sampling_state(_after(request)).banned_token_ids) == [EOS, 9]
    assert sampling_state(_after(request, 5)).banned_token_ids == ()


def test_sampler_is_told_of_soft_zone_forced_token_and_ban_in_turn() -> None:
    request = make_request(
        thinking=ThinkingParams(
            begin_token_id=3,
            end_token_id=4,
            budget_tokens=3,
            soft_zone_tokens=2,
            closing_token_ids=(5, 4),
            starts_open=True,
        )
    )
    progress = _after(request)
    assert request.thinking is not None
    progress.thinking = ThinkingTracker(request.thinking)
    states = []
    for token_id in (8, 8, 5, 4):
        states.append(sampling_state(progress))
        progress.thinking.observe(token_id)
    states.append(sampling_state(progress))
    assert states == [
        SamplingState(None, None, ()),
        SamplingState(None, (4, 4.0), ()),
        SamplingState(5, None, ()),
        SamplingState(4, None, ()),
        SamplingState(None, None, (3,)),
    ]
