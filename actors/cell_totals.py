"""What a cell has done, over its epochs: what is counted never falls, though ranks begin anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ostro.actors.engine.step import ShardLoad


@dataclass(frozen=True, slots=True)
class CellTotals:
    """What one epoch has done, or several.

    Attributes:
        loads: By attention rank.
        seconds: By stage, over all ranks.
    """

    loads: Mapping[int, ShardLoad] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    num_steps: int = 0

    def then(self, later: CellTotals) -> CellTotals:
        """Both; what a load tells of a moment is told of the later one's."""
        nothing = ShardLoad()
        return CellTotals(
            loads={
                rank: later.loads.get(rank, nothing).after(self.loads.get(rank, nothing))
                for rank in sorted({*self.loads, *later.loads})
            },
            seconds={
                stage: self.seconds.get(stage, 0.0) + later.seconds.get(stage, 0.0)
                for stage in (*later.seconds, *(self.seconds.keys() - later.seconds.keys()))
            },
            num_steps=self.num_steps + later.num_steps,
        )
