"""How many prompt tokens a step takes on beside decodes, held to what steps took."""

from __future__ import annotations

import pytest
from engine_fakes import make_request
from hypothesis import given
from hypothesis import strategies as st

from ostro.actors.engine.request import RequestProgress
from ostro.actors.engine.scheduler import Scheduler
from ostro.actors.engine.step import SampledToken, ScheduledStep
from ostro.actors.engine.step_budget import StepBudget
from ostro.configs.deployment import EngineConfig


def _budget(target_ms: float | None, most: int = 512) -> StepBudget:
    return StepBudget(
        EngineConfig(
            max_tokens_per_step=most, max_running_requests=16, inter_token_target_ms=target_ms
        )
    )


def _full(budget: StepBudget, num_decodes: int) -> ScheduledStep:
    """A step with as many prompt tokens as it may hold."""
    most = budget.beside(num_decodes)
    return ScheduledStep(0, 0.0, num_tokens=most, num_decodes=num_decodes, budget=most)


def test_without_a_target_every_step_may_be_full():
    budget = _budget(None)
    budget.record(_full(budget, 4), 9.0)
    assert budget.beside(4) == 512


def test_a_step_of_prompts_alone_is_full_whatever_the_target():
    budget = _budget(10.0)
    budget.record(_full(budget, 4), 1.0)
    assert budget.beside(4) < 512
    assert budget.beside(0) == 512


@given(
    decode_ms=st.floats(1.0, 90.0),
    token_ms=st.floats(0.01, 2.0),
    num_decodes=st.integers(1, 16),
)
def test_full_steps_come_to_take_the_target_and_no_longer(
    decode_ms: float, token_ms: float, num_decodes: int
):
    budget = _budget(100.0)
    for _ in range(400):
        step = _full(budget, num_decodes)
        num_prompt = step.num_tokens - num_decodes
        budget.record(step, (decode_ms + token_ms * num_prompt) / 1000)
    fitting = (100.0 - decode_ms) / token_ms
    most = 512 - num_decodes
    assert budget.beside(num_decodes) - num_decodes == pytest.approx(
        min(max(fitting, 32), most), abs=max(2.0, 0.02 * fitting)
    )


def test_decodes_that_take_longer_than_the_target_leave_prompts_a_sixteenth():
    budget = _budget(10.0)
    for _ in range(100):
        budget.record(_full(budget, 8), 0.5)
    assert budget.beside(8) == 8 + 32


def test_steps_without_decodes_or_prompts_say_nothing():
    budget = _budget(10.0)
    budget.record(ScheduledStep(0, 0.0, num_tokens=512, num_decodes=0, budget=512), 5.0)
    budget.record(ScheduledStep(1, 0.0, num_tokens=8, num_decodes=8, budget=512), 5.0)
    assert budget.beside(8) == 512


def test_a_quick_step_that_was_not_full_does_not_raise_the_budget():
    budget = _budget(10.0)
    budget.record(_full(budget, 8), 0.04)
    held = budget.num_prompt_tokens
    budget.record(
        ScheduledStep(1, 0.0, num_tokens=10, num_decodes=8, budget=budget.beside(8)), 0.001
    )
    assert budget.num_prompt_tokens == held
    budget.record(_full(budget, 8), 0.001)
    assert held < budget.num_prompt_tokens <= held * 1.5 + 1


def test_the_smallest_budget_grows_again():
    budget = _budget(10.0, most=16)
    for _ in range(50):
        budget.record(_full(budget, 4), 1.0)
    assert budget.num_prompt_tokens == 1
    for _ in range(50):
        budget.record(_full(budget, 4), 0.001)
    assert budget.beside(4) == 16


def test_a_long_prompt_beside_a_stream_is_cut_to_the_target():
    now = [0.0]
    config = EngineConfig(
        page_size=4, max_tokens_per_step=64, max_running_requests=4, inter_token_target_ms=20.0
    )
    scheduler = Scheduler(config, 1024, 2048, clock=lambda: now[0])
    scheduler.add(RequestProgress(make_request("stream", [5], max_tokens=500), arrived_s=0.0))

    def turn() -> tuple[ScheduledStep, float]:
        step = scheduler.schedule()
        assert step is not None
        began = now[0]
        now[0] += 0.004 + 0.001 * (step.num_tokens - step.num_decodes)
        for entry in step.entries:
            if entry.samples:
                scheduler.accept(entry, SampledToken(9))
        scheduler.complete(step)
        return step, now[0] - began

    turn()
    scheduler.add(RequestProgress(make_request("long", [6] * 800), arrived_s=0.0))
    taken = [turn() for _ in range(30)]
    assert all(step.entries[0].progress.request_id == "stream" for step, _ in taken)
    assert taken[0][1] == pytest.approx(0.067)  # nothing was known yet
    assert [seconds for _, seconds in taken[5:]] == pytest.approx([0.020] * 25, abs=0.0015)
