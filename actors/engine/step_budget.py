"""How many tokens a step may hold: few enough that prompts do not hold up who decodes."""

from __future__ import annotations

from ostro.actors.engine.step import ScheduledStep
from ostro.configs.deployment import EngineConfig

_LEAST_SHARE = 16  # prompts always get this part of a full step, whatever the target
_FASTEST_GROWTH = 1.5  # from one step to the next: one quick step proves little


class StepBudget:
    """Cuts prompts into chunks beside which a step takes `inter_token_target_ms`.

    A step of n prompt tokens beside decodes that took t seconds, T being the target, makes the
    next chunk n * T / t. With t = d + c * n for some d < T and c this settles at t = T; where the
    decodes alone take longer than T, at the least chunk. Nothing has to know d or c, so that
    growing contexts, other shards' work and a busy machine are all heeded by the same rule.

    Attributes:
        num_prompt_tokens: What a step may hold beside decodes.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._most = config.max_tokens_per_step
        self._least = max(self._most // _LEAST_SHARE, 1)
        target_ms = config.inter_token_target_ms
        self._target_s = None if target_ms is None else target_ms / 1000
        self.num_prompt_tokens = self._most

    def beside(self, num_decodes: int) -> int:
        """Tokens of a step with so many decodes, these included."""
        if not num_decodes:
            return self._most
        return min(num_decodes + self.num_prompt_tokens, self._most)

    def record(self, step: ScheduledStep, seconds: float) -> None:
        """Take note of what a step took; only one of decodes and prompts says anything.

        A quick one says something if it was full: less than the budget may have been there to do.
        """
        num_certain = step.num_tokens - step.num_drafts
        num_prompt = num_certain - step.num_decodes
        if self._target_s is None or not step.num_decodes or not num_prompt or seconds <= 0.0:
            return
        fitting = num_prompt * self._target_s / seconds
        if seconds > self._target_s or num_certain == step.budget:
            most = self.num_prompt_tokens * _FASTEST_GROWTH + 1
            self.num_prompt_tokens = int(min(max(fitting, self._least), most, self._most))
