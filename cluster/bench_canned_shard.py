"""An attention shard that computes nothing: it says the same tokens at a set pace.

Everything around the model is the real thing: the actor, its epoch, the scheduler, the engine's
loop and the token stream. What is left is the cost of ingress, router and engine loop.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ostro.actors.attention_engine import StepExchange
from ostro.actors.attention_shard import num_pages
from ostro.actors.engine.grammar import GrammarCompiler
from ostro.actors.engine.grammar_masks import MaskMaker
from ostro.actors.engine.step import SampledToken
from ostro.actors.fabric.local_exchange import ExchangeCounters
from ostro.actors.fabric.messages import StepPlan
from ostro.actors.model.batch import Batch
from ostro.actors.model.decoder import ExpertExchange
from ostro.actors.model.sampler import SamplingRow
from ostro.actors.rank import RankSpec
from ostro.cluster.placed_shard import PlacedAttentionShard
from ostro.configs.model import ModelConfig


class CannedShard(PlacedAttentionShard):
    """Remote surface: that of an attention shard, and `set_pace`. For a layout of one rank.

    Args:
        name: The actor's name.
        socket_dir: As `PlacedAttentionShard`.
        token_ids: Every answer is these, over and over.
        pace_s: See `set_pace`.
    """

    def __init__(
        self, name: str, socket_dir: str | None, token_ids: tuple[int, ...], pace_s: float
    ) -> None:
        super().__init__(name, socket_dir)
        self._canned_decoder = PacedDecoder(pace_s)
        self._canned_sampler = CannedSampler(token_ids)

    def set_pace(self, pace_s: float) -> None:
        """Seconds that the forward pass of a step takes; 0 leaves the engine's loop alone."""
        self._canned_decoder.pace_s = pace_s

    def _load(self, spec: RankSpec, config: ModelConfig) -> None:
        self._config = config
        self._num_pages = num_pages(spec, config)
        self._decoder = self._canned_decoder
        self._sampler = self._canned_sampler
        self._grammars = GrammarCompiler(Path(spec.model_dir), config.vocab_size)
        self._masks = MaskMaker(config.vocab_size)

    def _make_exchange(self, _spec: RankSpec) -> StepExchange:
        return NoExchange()


class PacedDecoder:
    """Takes its time for each step and makes no logits.

    Attributes:
        pace_s: See `CannedShard.set_pace`.
        seconds: None by stage.
    """

    def __init__(self, pace_s: float) -> None:
        self.pace_s = pace_s
        self.seconds: dict[str, float] = {}

    def forward(self, _batches: Sequence[Batch], _exchange: ExpertExchange) -> list[torch.Tensor]:
        """Sleep for as long as a model would compute."""
        if self.pace_s:
            time.sleep(self.pace_s)
        return []


class CannedSampler:
    """Says the next of its tokens, whatever the logits."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._tokens = [SampledToken(token_id) for token_id in token_ids]

    def sample(
        self, _logits: Sequence[torch.Tensor], rows: Sequence[SamplingRow]
    ) -> list[SampledToken]:
        """One token for each row, by its place in the output."""
        tokens = self._tokens
        return [tokens[len(row.progress.output_token_ids) % len(tokens)] for row in rows]


class NoExchange:
    """An exchange without experts."""

    def __init__(self) -> None:
        self.counters = ExchangeCounters()

    def begin_step(self, plan: StepPlan) -> None:
        """Nothing to make ready."""

    def end_step(self) -> None:
        """Nothing to wait for."""

    def serve_all(self, num_layers: int) -> None:
        """Nobody has rows."""

    def dispatch(
        self,
        layer: int,
        micro_batch: int,
        x_TD: torch.Tensor,
        expert_TK: torch.Tensor,
        weight_TK: torch.Tensor,
    ) -> None:
        """Never called: there is no decoder.

        Raises:
            RuntimeError: It was.
        """
        raise RuntimeError("a canned shard has no experts")

    def combine(self, layer: int, micro_batch: int) -> torch.Tensor:
        """Never called; see `dispatch`."""
        raise RuntimeError("a canned shard has no experts")
