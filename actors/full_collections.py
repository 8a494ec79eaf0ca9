"""When a rank looks for garbage among all its objects: between steps, and seldom.

A full collection walks every list of token ids: 60 ms beside 1,000 requests of 2,000 tokens each.
Python begins one whenever a quarter of the objects are new, which with so many requests is every
few dozen steps, and finds next to nothing: what a request held is freed as it ends, by its counts.
So it is for the rank to say when. The small collections, of new objects alone, go on by themselves.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Self

_AT_REST_EVERY_S = 10.0
_AT_WORK_EVERY_S = 600.0  # what lies in cycles is little, but it must not grow without end
_NEVER = 2**31 - 1
_BY_ITSELF = gc.get_threshold()


class FullCollections:
    """While entered, Python begins no full collection in this process; whoever entered does.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_s = clock()
        self._num_steps = 0

    def __enter__(self) -> Self:
        gc.set_threshold(*_BY_ITSELF[:2], _NEVER)
        return self

    def __exit__(self, *_: object) -> None:
        gc.set_threshold(*_BY_ITSELF)

    def take_if_due(self, num_steps: int, *, is_at_rest: bool) -> bool:
        """Take one if it is time; call it between steps.

        Args:
            num_steps: Steps so far: without any there is nothing new to collect.
            is_at_rest: Nobody waits meanwhile.
        """
        every_s = _AT_REST_EVERY_S if is_at_rest else _AT_WORK_EVERY_S
        if num_steps == self._num_steps or self._clock() - self._last_s < every_s:
            return False
        gc.collect()
        self._num_steps, self._last_s = num_steps, self._clock()
        return True
