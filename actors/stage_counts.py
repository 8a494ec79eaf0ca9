"""What an attention shard counts of its time in one epoch, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping

from ostro.actors.engine.stages import step_stages
from ostro.actors.fabric.local_exchange import ExchangeCounters


class StageCounts:
    """Seconds since the epoch began; of the decoder and the transport, read where they count.

    Attributes:
        host: Of the engine's loop; it adds to them.
    """

    def __init__(self, decoder_seconds: Mapping[str, float], counters: ExchangeCounters) -> None:
        self.host = {"plan": 0.0, "forward": 0.0, "sample": 0.0, "deliver": 0.0}
        self._decoder_seconds = decoder_seconds
        self._before = dict(decoder_seconds)  # the decoder outlives epochs
        self._counters = counters
        self._add_s = 0.0

    def counted(self) -> dict[str, float]:
        """As `stages.step_stages` reads them; none ever falls."""
        before = self._before
        seconds = {stage: s - before.get(stage, 0.0) for stage, s in self._decoder_seconds.items()}
        wait_s, experts_s = self._counters.wait_s, self._counters.experts_s
        # A rank with both roles also waits and computes outside of "combine".
        self._add_s = max(self._add_s, seconds.get("combine", 0.0) - wait_s - experts_s)
        own = {"wait": wait_s, "experts": experts_s, "add": self._add_s}
        return {**seconds, **self.host, **own}

    def by_stage(self) -> dict[str, float]:
        """By the stages of a step; see `step_stages`."""
        return step_stages(self.counted())
