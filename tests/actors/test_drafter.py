"""Who drafts and how many: prompt lookup over a scheduler's steps, adapted or not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from engine_fakes import FakeDevice, make_progress, make_request

from ostro.actors.drafter import Drafting, NgramDrafter
from ostro.actors.engine.request import GrammarParams, RequestProgress
from ostro.actors.engine.scheduler import Scheduler
from ostro.actors.engine.step import SampledToken, ScheduledStep
from ostro.actors.model.batch import Batch
from ostro.configs.deployment import EngineConfig
from ostro.configs.speculation import DraftMethod, SpeculationConfig

_NGRAM = SpeculationConfig(method=DraftMethod.NGRAM, num_draft_tokens=3, adaptive=False)


def _scheduler(clock_s: Sequence[float] = (1.0,), **engine: int) -> Scheduler:
    config = EngineConfig(
        page_size=4, max_tokens_per_step=64, max_running_requests=8, speculation=_NGRAM, **engine
    )
    times = iter(clock_s)
    return Scheduler(config, 64, 200, clock=lambda: next(times, clock_s[-1]))


def _add(scheduler: Scheduler, name: str, prompt: Sequence[int], *, max_tokens: int = 50) -> None:
    request = make_request(name, prompt, max_tokens=max_tokens, ignore_eos=True)
    scheduler.add(make_progress(request))


def _turn(scheduler: Scheduler, drafting: Drafting, token_id: int = 7) -> ScheduledStep:
    step = scheduler.schedule()
    assert step is not None
    for entry in step.entries:
        if entry.samples:
            while scheduler.accept(entry, SampledToken(token_id)):
                pass
    scheduler.complete(step)
    drafting.after(step, [])
    return step


def test_a_text_that_repeats_itself_is_drafted_from_its_prompt() -> None:
    scheduler = _scheduler()
    _add(scheduler, "r", [5, 6, 7, 8, 9, 5, 6])
    step = _turn(scheduler, Drafting(NgramDrafter(_NGRAM), _NGRAM))
    assert step.entries[0].progress.draft_token_ids == [8, 9, 5]


def test_a_chunk_of_a_prompt_is_taken_in_and_gets_no_drafts() -> None:
    scheduler = _scheduler()
    _add(scheduler, "r", [5, 6] * 50)
    step = _turn(scheduler, Drafting(NgramDrafter(_NGRAM), _NGRAM))
    progress = step.entries[0].progress
    assert not step.entries[0].samples
    assert progress.draft_token_ids == []
    assert progress.ngrams is not None
    assert progress.ngrams.extend(1000) == 0


def test_a_very_long_prompt_is_taken_in_piece_by_piece() -> None:
    drafter = NgramDrafter(_NGRAM)
    step = ScheduledStep(0, 0.0)
    scheduler = _scheduler()
    _add(scheduler, "r", [5, 6, 7])
    planned = scheduler.schedule()
    assert planned is not None
    planned.entries[0].progress.request.prompt_token_ids.extend([1, 2] * 10_000)
    step.entries = planned.entries
    taken = 0
    while (index := planned.entries[0].progress.ngrams) is None or taken < 3:
        drafter.draft(step, [], 3)
        taken += 1
    assert index.extend(100_000) == 0
    assert taken == 3


def test_requests_that_ended_or_lost_their_pages_get_no_drafts() -> None:
    scheduler = _scheduler()
    _add(scheduler, "ends", [5, 7, 5, 7, 5], max_tokens=1)
    step = _turn(scheduler, Drafting(NgramDrafter(_NGRAM), _NGRAM))
    assert step.entries[0].progress.draft_token_ids == []


def test_a_lookup_that_does_not_pay_rests_where_many_decode() -> None:
    config = EngineConfig(
        page_size=4, max_tokens_per_step=512, max_running_requests=40, speculation=_NGRAM
    )
    times = [0.0]
    scheduler = Scheduler(config, 4096, 400, clock=lambda: times[0])
    adaptive = SpeculationConfig(method=DraftMethod.NGRAM, num_draft_tokens=3)
    drafting = Drafting(drafter := _SlowLookup(adaptive), adaptive)
    for index in range(40):
        _add(scheduler, f"r{index}", [5, 6] * 3, max_tokens=200)
    num_steps = 0
    while scheduler.has_work():
        step = scheduler.schedule()
        assert step is not None
        times[0] += 1.0 * step.num_tokens
        for entry in step.entries:
            while scheduler.accept(entry, SampledToken(5 + num_steps % 6)):
                pass
        scheduler.complete(step)
        drafting.after(step, [])
        num_steps += 1
    assert drafter.num_calls < num_steps / 4


class _SlowLookup(NgramDrafter):
    """Guesses the same wrong token for ever, and counts how often it was asked."""

    num_calls = 0

    def draft(self, step: ScheduledStep, batches: Sequence[Batch], num_drafts: int) -> None:
        self.num_calls += 1
        for entry in step.entries:
            entry.progress.draft_token_ids = [4] * num_drafts


class _CountingDrafter:
    """Guesses right for ever; remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def draft(self, step: ScheduledStep, batches: Sequence[Batch], num_drafts: int) -> None:
        self.asked.append(num_drafts)
        for entry in step.entries:
            if entry.samples:
                entry.progress.draft_token_ids = [7] * num_drafts


def _eagle(*, adaptive: bool) -> SpeculationConfig:
    return SpeculationConfig(
        method=DraftMethod.EAGLE, draft_model="head", num_draft_tokens=3, adaptive=adaptive
    )


def test_a_pinned_number_of_drafts_is_always_asked_for() -> None:
    drafter, scheduler = _CountingDrafter(), _scheduler()
    drafting = Drafting(drafter, _eagle(adaptive=False))
    _add(scheduler, "r", [5, 6])
    for _ in range(4):
        _turn(scheduler, drafting)
    assert drafter.asked == [3] * 4


def test_an_adapted_number_grows_while_drafts_are_right() -> None:
    drafter, scheduler = _CountingDrafter(), _scheduler([i * 0.01 for i in range(1000)])
    drafting = Drafting(drafter, _eagle(adaptive=True))
    _add(scheduler, "r", [5, 6], max_tokens=100)
    for _ in range(12):
        _turn(scheduler, drafting)
    assert drafter.asked[0] == 1
    assert drafter.asked[-1] == 3
    load = scheduler.load()
    assert load.num_accepted == load.num_drafted
    assert load.num_accepted[0] >= 8


@pytest.mark.parametrize(("token_id", "most"), [(7, 3), (6, 0)])
def test_guesses_within_a_grammar_are_learnt_from(token_id: int, most: int) -> None:
    """Else a shard that serves grammars alone would never know what its guesses are worth."""
    scheduler, times = _scheduler(), [0.0]
    scheduler._clock = lambda: times[0]
    drafting = Drafting(_CountingDrafter(), _eagle(adaptive=True))
    grammar = GrammarParams(text="start: /[a-g]{150}/")
    scheduler.add(make_progress(make_request(max_tokens=150, grammar=grammar)))
    lengths: list[int] = []
    for _ in range(30):
        step = scheduler.schedule()
        assert step is not None
        lengths.append(step.num_drafts)
        times[0] += 1.0 + 0.5 * step.num_tokens
        while scheduler.accept(step.entries[0], SampledToken(token_id)):
            pass
        scheduler.complete(step)
        drafting.after(step, [])
    assert lengths[-8:] == [most] * 8


def test_drafts_of_a_lookup_that_do_not_pay_are_dropped() -> None:
    """Right text, but the device takes a second more for every row."""
    scheduler = _scheduler()
    device, times = FakeDevice(4), [0.0]
    scheduler._clock = lambda: times[0]
    adaptive = SpeculationConfig(method=DraftMethod.NGRAM, num_draft_tokens=3)
    drafting = Drafting(NgramDrafter(adaptive), adaptive)
    _add(scheduler, "r", [5, 6, 7, 5, 6, 7], max_tokens=150)
    lengths: list[int] = []
    progress: RequestProgress | None = None
    while scheduler.has_work():
        step = scheduler.schedule()
        assert step is not None
        progress = step.entries[0].progress
        lengths.append(step.num_drafts)
        times[0] += 1.0 * step.num_tokens
        device.run(step, scheduler)
        scheduler.complete(step)
        drafting.after(step, [])
    assert progress is not None
    assert sum(lengths[-40:]) <= 4
