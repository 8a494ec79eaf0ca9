"""How many drafts pay: from how often they are right, and from what steps take.

Of the numbers from 0 on, the one is taken that brings the most tokens per second for the requests
that decode now. What nobody has measured, or not for long, counts as good as it can be: then it is
tried, a step or two, and known. So drafts come back where they begin to pay again, and trials are
rare.

Nothing is assumed of the device: on one that waits for its memory a step of four times the tokens
takes hardly longer, on one that computes four times as long, and contexts make both slower. Only
this: more tokens never take less time, nor more than in proportion.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import islice, takewhile
from math import exp2, log

from ostro.actors.engine.request import RequestState
from ostro.actors.engine.step import ScheduledStep

_EXACT_SIZES = 20
_SIZE_RATIO = 1.05  # of neighbouring sizes beyond those
_NEW_WEIGHT = 0.25  # of a measurement in its average
_OUTLIER = 1.5  # times the average; a measurement counts as no more than that
_SURE_AFTER = 2  # measurements
_FORGETS_AFTER = 512  # further ones, until half of the trust in a measurement is gone

_PRIOR_RIGHT, _PRIOR_TRIALS = 0.7, 3.0
_MOST_TRIALS = 192.0  # that count: after as many, what was before weighs little
_FORGETS_TRIALS = 0.992  # of its trials a depth that is not tried keeps so much a step
_KNOWN_AFTER = 1.0  # trials
_CAUTION = 1.2  # times what drafts cost: a gain that is less than this is noise


class DraftLength:
    """Chooses the number of drafts of a shard's next step.

    Args:
        most: Drafts of a request, at most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._right = [0.0] * most
        self._trials = [0.0] * most
        self._steps = SecondsBySize()
        self._drafting = [SecondsBySize() for _ in range(most + 1)]  # by drafts of a request

    def record(self, step: ScheduledStep) -> None:
        """Take note of a completed step."""
        trials, right = [0] * self._most, [0] * self._most
        for entry in islice(step.entries, step.num_decodes if step.num_drafts else 0):
            if entry.num_drafts and not entry.drafts_are_told:
                num_right = entry.num_accepted()
                # Of one that ended nobody knows whether the draft after that was right.
                goes_on = entry.progress.state is not RequestState.FINISHED
                for depth in range(min(num_right + goes_on, entry.num_drafts, self._most)):
                    trials[depth] += 1
                    right[depth] += depth < num_right
        for depth in range(self._most):
            self._count(depth, right[depth], trials[depth])
        if step.has_no_prompts():  # these are another matter
            self._steps.record(step.num_tokens, step.seconds)

    def record_drafting(self, num_decodes: int, num_drafts: int, seconds: float) -> None:
        """Take note of what it took to make so many drafts of each of the requests."""
        for number, drafting in enumerate(self._drafting):
            if number == num_drafts:
                drafting.record(num_decodes, seconds)
            else:
                drafting.age()

    def share_right(self, depth: int) -> float:
        """How many of the drafts at a depth from 0 on are right, where all before them are."""
        prior = _PRIOR_RIGHT * _PRIOR_TRIALS
        return (self._right[depth] + prior) / (self._trials[depth] + _PRIOR_TRIALS)

    def choose(self, num_decodes: int, offered: Sequence[int]) -> int:
        """The number of drafts that brings the most tokens per second.

        Args:
            num_decodes: Requests that decode in the next step.
            offered: How many of them have a first draft, a second one, and so on.
        """
        best, best_rate, without_s, drafting_s = 0, 0.0, 0.0, 0.0
        num_right, num_tokens, share = float(num_decodes), num_decodes, 1.0
        for num_drafts in range(min(self._num_known() + 1, len(offered), self._most) + 1):
            if num_drafts:
                share *= self.share_right(num_drafts - 1)
                num_right += offered[num_drafts - 1] * share
                num_tokens += offered[num_drafts - 1]
            drafting_s = max(drafting_s, self._drafting[num_drafts].expect(num_decodes))
            seconds = self._steps.expect(num_tokens) + drafting_s
            if not num_drafts:
                without_s = seconds
            rate = num_right / max(without_s + _CAUTION * (seconds - without_s), 1e-9)
            if rate > best_rate:
                best, best_rate = num_drafts, rate
        return best

    def _num_known(self) -> int:
        """Depths that have been tried lately: a trial goes one deeper, so that it costs little."""
        known = takewhile(lambda trials: trials >= _KNOWN_AFTER, self._trials)
        return sum(1 for _ in known)

    def _count(self, depth: int, right: int, trials: int) -> None:
        keep = _FORGETS_TRIALS if not trials else _MOST_TRIALS / (_MOST_TRIALS + trials)
        self._right[depth] = self._right[depth] * keep + right
        self._trials[depth] = self._trials[depth] * keep + trials


class SecondsBySize:
    """What things of some size took, and what those of another would take at best.

    Averages of sizes that lie within a twentieth of each other are one.
    """

    def __init__(self) -> None:
        self._keys: list[int] = []  # ascending
        self._sizes: dict[int, float] = {}
        self._seconds: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        self._measured_at: dict[int, int] = {}
        self._age = 0  # measurements, made or passed by
        self._latest: int | None = None

    def record(self, size: int, seconds: float) -> None:
        """Take note of a measurement; `size` is at least 1."""
        key = _key(size)
        self.age()
        self._latest, self._measured_at[key] = key, self._age
        before = self._seconds.get(key)
        if before is None:
            self._keys.insert(bisect_left(self._keys, key), key)
            self._sizes[key], self._seconds[key], self._counts[key] = size, seconds, 1
            return
        weight = max(_NEW_WEIGHT, 1 / (self._counts[key] + 1))
        if self._counts[key] == 1:  # the first may have been the outlier
            before = min(before, _OUTLIER * seconds)
        self._seconds[key] = before + weight * (min(seconds, _OUTLIER * before) - before)
        self._sizes[key] += weight * (size - self._sizes[key])
        self._counts[key] += 1

    def age(self) -> None:
        """Trust what was measured as much less as with a measurement of another size."""
        self._age += 1

    def expect(self, size: int) -> float:
        """Seconds for a size: as measured, as far as that is recent, and else at best; 0 if never.

        Example:
            after one measurement of 2 s for size 10, for size 20 it is 2 s, for size 5 it is 1 s.
        """
        keys, sizes, seconds = self._keys, self._sizes, self._seconds
        place = bisect_left(keys, float(size), key=sizes.__getitem__)
        if place < len(keys) and sizes[keys[place]] == size:
            return self._bounded(size, seconds[keys[place]], self._trust(keys[place]))
        if not place:
            return self._bounded(size, 0.0, 0.0)
        below = keys[place - 1]
        trust = self._trust(below)
        # Else each size that a growing batch comes by for the first time is tried.
        at_least_s = self._bounded(size, seconds[below], trust)
        if place == len(keys):
            return at_least_s
        above = keys[place]
        share = (size - sizes[below]) / (sizes[above] - sizes[below])
        between_s = seconds[below] + share * (seconds[above] - seconds[below])
        doubt = (1 - trust) * (1 - self._trust(above))  # each of both bears the other out
        return max(at_least_s, self._bounded(size, between_s, 1 - doubt))

    def _bounded(self, size: int, measured_s: float, trust: float) -> float:
        """Seconds for a size between those at best, going by the latest step, and as measured."""
        latest = self._latest
        if latest is None:
            return 0.0
        latest_s, ratio = self._seconds[latest], size / self._sizes[latest]
        best_s = latest_s * min(ratio, 1.0)
        measured_s = min(measured_s, latest_s * max(ratio, 1.0))
        return best_s + trust * max(measured_s - best_s, 0.0)

    def _trust(self, key: int) -> float:
        since = self._age - self._measured_at[key]
        return min(self._counts[key] / _SURE_AFTER, 1.0) * exp2(-since / _FORGETS_AFTER)


def _key(size: int) -> int:
    if size <= _EXACT_SIZES:
        return size
    return _EXACT_SIZES + round(log(size / _EXACT_SIZES) / log(_SIZE_RATIO))
