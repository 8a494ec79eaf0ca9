"""A cell that plays a script of token events, for tests of the frontend."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ostro.actors.engine.request import FinishReason, GenerationRequest, TokenEvent
from ostro.actors.errors import OstroError
from ostro.actors.fabric.messages import State
from ostro.cluster.model_card import ModelCard
from ostro.cluster.prompt import PromptBuilder
from ostro.configs.deployment import DeploymentConfig, Layout, LayoutConfig, ServingConfig
from ostro.configs.reasoning import EFFORTS

EOS, TOOL_CALLS, ARGS, THINK, END_THINK = 2, 9, 32, 34, 35
VOCAB, CONTEXT = 1024, 512
CARD = ModelCard(
    name="small",
    description="",
    created_s=0,
    max_context=CONTEXT,
    vocab_size=VOCAB,
    num_layers=1,
    num_experts=4,
    num_experts_per_token=2,
    weight_dtype="float32",
    kv_dtype="float32",
    efforts=EFFORTS,
    default_effort="none",
)
CONFIG = DeploymentConfig(
    model="embedded",
    layout=LayoutConfig(layout=Layout.SINGLE, num_attention_shards=1, num_expert_shards=1),
    serving=ServingConfig(request_timeout_s=5.0),
)


class FakeCell:
    """Plays a script of TokenEvents and remembers what was asked and whether it was closed."""

    def __init__(self, script: Sequence[TokenEvent | OstroError], *, hangs: bool = False) -> None:
        self.script = script
        self.hangs = hangs
        self.requests: list[GenerationRequest] = []
        self.dropped: list[str] = []
        self.is_open = False
        self.num_played = 0
        self.was_asked = asyncio.Event()

    @property
    def ready(self) -> bool:
        return True

    async def submit(self, *requests: GenerationRequest) -> AsyncIterator[TokenEvent]:
        self.requests.extend(requests)
        self.is_open = True
        self.was_asked.set()
        try:
            for item in self.script:
                if isinstance(item, OstroError):
                    raise item
                self.num_played += 1
                yield item
            if self.hangs:
                await asyncio.Event().wait()
        finally:
            self.is_open = False

    def drop(self, request_id: str) -> None:
        self.dropped.append(request_id)

    async def cancel(self, request_id: str) -> bool:
        return False

    async def end_thinking(self, request_id: str) -> bool:
        return False

    async def state(self) -> State:
        raise NotImplementedError


class Script:
    """Builds a choice's TokenEvents with the right `first_index`: a step per call of `step`."""

    def __init__(self, prompts: PromptBuilder, choice: int = 0) -> None:
        self.prompts = prompts
        self.choice = choice
        self.events: list[TokenEvent] = []
        self.num_tokens = 0

    def step(self, *parts: str | int, **fields: Any) -> Script:
        token_ids = [
            token_id
            for part in parts
            for token_id in (
                [part] if isinstance(part, int) else self.prompts.text(part, add_bos=False)
            )
        ]
        event = TokenEvent(
            f"r.{self.choice}", self.num_tokens, token_ids, choice=self.choice, **fields
        )
        self.events.append(event)
        self.num_tokens += len(token_ids)
        return self

    def end(self, reason: FinishReason = FinishReason.STOP, **fields: Any) -> Script:
        if reason is FinishReason.STOP:
            return self.step(EOS, finish_reason=reason, stop_token_id=EOS, **fields)
        return self.step(finish_reason=reason, **fields)
