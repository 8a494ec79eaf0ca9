"""Where one request's time at its shard goes: queue, prefill, decode, and the stages of its steps.

A shard counts seconds by stage anyway, for all that it serves. A request's share of them is what
was counted from its first step to its end, not divided among those that shared the steps: each of
them waited for all of it. So two readings per request are all it costs, and nothing per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec


class ShardSeconds(msgspec.Struct, frozen=True, array_like=True):
    """A request's time at its shard; the first two follow one another, then comes `decode_s`.

    Attributes:
        queued_s: From its arrival to its first step.
        prefill_s: From there to its first token.
        decode_s: From there to its end; None while it runs.
        stages: Seconds of its steps by `stages.STAGES`; empty while it runs.
    """

    queued_s: float
    prefill_s: float
    decode_s: float | None = None
    stages: dict[str, float] = {}


class Stopwatch:
    """Times one request from its first step on.

    Attributes:
        has_told: Whether it was read.
    """

    __slots__ = (
        "_began_s",
        "_clock",
        "_first_s",
        "_queued_s",
        "_stages",
        "_stages_before",
        "has_told",
    )

    def __init__(
        self,
        clock: Callable[[], float],
        stages: Callable[[], Mapping[str, float]],
        arrived_s: float,
    ) -> None:
        """Begin.

        Args:
            clock: Seconds, as in `arrived_s`.
            stages: The shard's seconds by stage so far.
            arrived_s: When the request came.
        """
        self._clock = clock
        self._stages = stages
        self._stages_before = stages()
        self._began_s = clock()
        self._queued_s = max(self._began_s - arrived_s, 0.0)
        self._first_s: float | None = None
        self.has_told = False

    def read(self, *, is_last: bool) -> ShardSeconds:
        """The time so far; read it with the first token, and at the end."""
        self.has_told = True
        now_s = self._clock()
        if self._first_s is None:
            self._first_s = now_s
        prefill_s = self._first_s - self._began_s
        if not is_last:
            return ShardSeconds(self._queued_s, prefill_s)
        before = self._stages_before
        stages = {
            stage: max(seconds - before.get(stage, 0.0), 0.0)
            for stage, seconds in self._stages().items()
        }
        return ShardSeconds(self._queued_s, prefill_s, now_s - self._first_s, stages)
