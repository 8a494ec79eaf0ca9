"""The steps of a scheduler that are planned and not completed, in order, and what steps take."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from ostro.actors.engine.step import ScheduledStep
from ostro.actors.engine.step_budget import StepBudget


class StepLedger:
    """Numbers steps as they are planned and holds them until their results are in.

    Attributes:
        budget: Learns from what they took.
    """

    def __init__(self, budget: StepBudget) -> None:
        self.budget = budget
        self._planned: deque[ScheduledStep] = deque()
        self._num_begun = 0
        self._completed_s = 0.0

    def __len__(self) -> int:
        return len(self._planned)

    def __iter__(self) -> Iterator[ScheduledStep]:
        return iter(self._planned)

    def begin(self, now_s: float) -> ScheduledStep:
        """The next step, which is in flight from now on: what it plans may be read of at once."""
        step = ScheduledStep(self._num_begun, now_s)
        self._planned.append(step)
        self._num_begun += 1
        return step

    def drop(self) -> None:
        """Take back the last step, of which nothing came."""
        self._planned.pop()
        self._num_begun -= 1

    def check_next(self, step: ScheduledStep) -> None:
        """Raise RuntimeError unless this is the step whose results are due."""
        if not self._planned or self._planned[0] is not step:
            raise RuntimeError(f"step {step.index} came in before its turn")

    def complete(self, step: ScheduledStep, now_s: float) -> float:
        """The step's results are in; how long it had the device to itself, in seconds."""
        self.check_next(step)
        self._planned.popleft()
        seconds = step.seconds = now_s - max(step.scheduled_s, self._completed_s)
        self._completed_s = now_s
        self.budget.record(step, seconds)
        return seconds
