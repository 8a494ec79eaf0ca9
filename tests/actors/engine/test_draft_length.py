"""The number of drafts: near the best fixed one on any device, found again when things change."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from engine_fakes import make_progress, make_request

from ostro.actors.engine.draft_length import DraftLength, SecondsBySize
from ostro.actors.engine.request import RequestState
from ostro.actors.engine.step import SampledToken, ScheduledRequest, ScheduledStep

_MOST = 4
_PROGRESS = make_progress(make_request())
_PROGRESS.move_to(RequestState.RUNNING)


@dataclass
class _Device:
    """What steps take, and how often drafts are right; `noise` is a share of a step's time."""

    step_s: Callable[[int], float]
    share_right: float
    draft_s: float = 0.0
    noise: float = 0.05
    share_offered: float = 1.0
    draft_row_s: float = 0.0

    def __post_init__(self) -> None:
        self._draw = random.Random(5)

    def drafting_s(self, num_decodes: int, num_drafts: int) -> float:
        return num_drafts * (self.draft_s + self.draft_row_s * num_decodes)

    def offered(self, num_decodes: int) -> list[int]:
        counts = [num_decodes]
        for _ in range(_MOST):
            offers = (self._draw.random() < self.share_offered for _ in range(num_decodes))
            counts.append(min(counts[-1], sum(offers)))
        return counts[1:]

    def run(self, num_decodes: int, offered: Sequence[int], num_drafts: int) -> ScheduledStep:
        step = ScheduledStep(0, 0.0, num_decodes=num_decodes)
        for index in range(num_decodes):
            count = sum(index < offers for offers in offered[:num_drafts])
            right = 0
            while right < count and self._draw.random() < self.share_right:
                right += 1
            step.entries.append(_entry(count, right))
            step.num_drafts += count
        step.num_tokens = num_decodes + step.num_drafts
        step.seconds = self.step_s(step.num_tokens) * self._draw.uniform(1, 1 + self.noise)
        return step


def _entry(num_drafts: int, num_right: int) -> ScheduledRequest:
    outputs = [SampledToken(7)] * (num_right + 1) if num_drafts else None
    return ScheduledRequest(_PROGRESS, 0, 1 + num_drafts, [], array("i"), True, num_drafts, outputs)


def _tokens_per_s(device: _Device, num_decodes: int, num_steps: int, length: DraftLength) -> float:
    tokens, seconds = 0, 0.0
    for _ in range(num_steps):
        offered = device.offered(num_decodes)
        num_drafts = length.choose(num_decodes, offered)
        drafting_s = device.drafting_s(num_decodes, num_drafts)
        length.record_drafting(num_decodes, num_drafts, drafting_s)
        step = device.run(num_decodes, offered, num_drafts)
        length.record(step)
        tokens += sum(1 + entry.num_accepted() for entry in step.entries)
        seconds += step.seconds + drafting_s
    return tokens / seconds


def _best(device: _Device, num_decodes: int) -> tuple[float, float]:
    """Tokens per second to be expected with the best fixed number of drafts, and without any."""

    def rate(num_drafts: int) -> float:
        tokens = num_decodes * sum(device.share_right**i for i in range(num_drafts + 1))
        step_s = device.step_s(num_decodes * (1 + num_drafts)) * (1 + device.noise / 2)
        return tokens / (step_s + device.drafting_s(num_decodes, num_drafts))

    return max(map(rate, range(_MOST + 1))), rate(0)


_DEVICES = {
    "waits for memory": lambda n: 0.010 + 0.00002 * n,
    "computes": lambda n: 0.001 * n,
    "waits, then computes": lambda n: max(0.010, 0.0004 * n),
    "has a dear first row": lambda n: 0.010 + 0.001 * n,
    "goes by steps": lambda n: 0.004 * -(-n // 8),
}


@pytest.mark.parametrize("step_s", _DEVICES.values(), ids=_DEVICES)
@pytest.mark.parametrize("num_decodes", [1, 3, 16, 48])
@pytest.mark.parametrize("share_right", [0.05, 0.4, 0.8])
@pytest.mark.parametrize("draft_s", [0.0, 0.002])
def test_it_is_as_good_as_the_best_fixed_number(
    step_s: Callable[[int], float], num_decodes: int, share_right: float, draft_s: float
) -> None:
    device = _Device(step_s, share_right, draft_s)
    best, without = _best(device, num_decodes)
    length = DraftLength(_MOST)
    _tokens_per_s(device, num_decodes, 100, length)
    found = _tokens_per_s(device, num_decodes, 1200 if num_decodes < 9 else 300, length)
    assert found > 0.92 * best
    assert found > 0.97 * without


def test_it_follows_the_number_of_requests() -> None:
    device = _Device(_DEVICES["waits, then computes"], 0.6)
    length = DraftLength(_MOST)
    for num_decodes in (1, 64, 2, 48, 4, 32, 8, 16):
        _tokens_per_s(device, num_decodes, 40, length)
    for num_decodes in (2, 8, 64):
        best, _ = _best(device, num_decodes)
        assert _tokens_per_s(device, num_decodes, 300, length) > 0.92 * best


@pytest.mark.parametrize("most_more", [1, 8])
def test_a_batch_that_grows_and_shrinks_is_not_tried_at_each_of_its_sizes(most_more: int) -> None:
    """Where rows cost what they bring, what is known of other sizes has to do."""
    device, length = _Device(_DEVICES["computes"], 0.6), DraftLength(_MOST)
    draw, num_decodes, tokens, seconds, without_s = random.Random(1), 8, 0, 0.0, 0.0
    for _ in range(800):
        num_decodes = min(max(num_decodes + draw.choice((-most_more, 0, most_more)), 1), 96)
        offered = device.offered(num_decodes)
        step = device.run(num_decodes, offered, length.choose(num_decodes, offered))
        length.record(step)
        num_tokens = sum(1 + entry.num_accepted() for entry in step.entries)
        tokens += num_tokens
        seconds += step.seconds
        without_s += 0.001 * (1 + device.noise / 2) * num_tokens
    assert without_s > 0.96 * seconds


@pytest.mark.parametrize("share_right", [0.4, 0.75])
def test_a_head_that_takes_longer_for_more_requests_is_known_for_each_number(
    share_right: float,
) -> None:
    device = _Device(lambda n: max(0.006, 0.0012 * n), share_right, 0.0006, draft_row_s=0.00035)
    length = DraftLength(_MOST)
    for num_decodes in (1, 64, 1, 16, 2, 64, 4, 1):
        best, _ = _best(device, num_decodes)
        assert _tokens_per_s(device, num_decodes, 200, length) > 0.94 * best


def test_it_comes_back_when_drafts_become_right() -> None:
    device = _Device(_DEVICES["has a dear first row"], 0.0)
    length = DraftLength(_MOST)
    _tokens_per_s(device, 2, 500, length)
    assert length.choose(2, [2] * _MOST) == 0
    device.share_right = 0.95
    _tokens_per_s(device, 2, 1500, length)
    assert length.choose(2, [2] * _MOST) == _MOST


def test_drafts_that_few_requests_have_are_weighed_by_what_they_cost() -> None:
    """A row that costs as much as it brings is not worth it for all, a cheap one is for two."""
    dear, cheap = DraftLength(_MOST), DraftLength(_MOST)
    for length, name in ((dear, "computes"), (cheap, "waits for memory")):
        device = _Device(_DEVICES[name], 0.5)
        _tokens_per_s(device, 32, 300, length)
        length.record(device.run(32, [0] * _MOST, 0))  # nobody had any
    assert dear.choose(32, [2, 2, 0, 0]) == 0
    assert cheap.choose(32, [2, 2, 0, 0]) >= 1


def test_what_an_ended_request_would_have_accepted_is_not_counted() -> None:
    length = DraftLength(1)
    ended = make_progress(make_request())
    ended.move_to(RequestState.FINISHED)
    before = length.share_right(0)
    entry = _entry(1, 0)
    entry.progress = ended
    step = ScheduledStep(0, 0.0, [entry], num_tokens=2, num_drafts=1, num_decodes=1, seconds=1.0)
    length.record(step)
    assert length.share_right(0) == pytest.approx(before)


def test_what_was_told_says_nothing_of_guesses() -> None:
    length = DraftLength(1)
    before = length.share_right(0)
    entry = _entry(1, 1)
    entry.drafts_are_told = True
    step = ScheduledStep(0, 0.0, [entry], num_tokens=2, num_drafts=1, num_decodes=1, seconds=1.0)
    length.record(step)
    assert length.share_right(0) == before


def test_steps_with_prompts_say_nothing_of_decodes() -> None:
    length = DraftLength(1)
    step = ScheduledStep(0, 0.0, [_entry(0, 0)], num_tokens=500, num_decodes=1, seconds=9.0)
    length.record(step)
    assert length._steps.expect(1) == 0.0


# ---- seconds by size


def test_nothing_measured_takes_no_time() -> None:
    assert SecondsBySize().expect(5) == 0.0


def test_what_was_never_measured_is_as_good_as_it_can_be() -> None:
    seconds = SecondsBySize()
    seconds.record(10, 2.0)
    assert seconds.expect(20) == 2.0
    assert seconds.expect(5) == 1.0


def test_sizes_between_two_measured_ones_lie_between_them() -> None:
    seconds = SecondsBySize()
    for _ in range(3):
        seconds.record(10, 2.0)
        seconds.record(30, 3.0)
    assert seconds.expect(20) == pytest.approx(2.5, rel=0.01)


def test_more_never_takes_less_than_what_was_measured() -> None:
    seconds = SecondsBySize()
    for size in (40, 20):
        for _ in range(3):
            seconds.record(size, 0.1 * size)
    assert seconds.expect(44) == pytest.approx(4.0, rel=0.01)


def test_a_slow_first_step_is_forgotten_with_the_next() -> None:
    seconds = SecondsBySize()
    seconds.record(4, 100.0)
    seconds.record(4, 1.0)
    assert seconds.expect(4) <= 1.5


def test_one_slow_step_is_soon_forgotten() -> None:
    seconds = SecondsBySize()
    for _ in range(10):
        seconds.record(4, 1.0)
    seconds.record(4, 100.0)
    assert seconds.expect(4) <= 1.5
    for _ in range(10):
        seconds.record(4, 1.0)
    assert seconds.expect(4) < 1.05


def test_an_old_measurement_does_not_hold_for_ever() -> None:
    seconds = SecondsBySize()
    for _ in range(5):
        seconds.record(8, 10.0)
    for _ in range(5):
        seconds.record(2, 3.0)
    assert seconds.expect(8) == pytest.approx(10.0, rel=0.05)
    for _ in range(4000):
        seconds.record(2, 3.0)
    assert seconds.expect(8) < 3.5
