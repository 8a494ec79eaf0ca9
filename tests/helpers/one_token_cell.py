"""A cell that answers with one token, behind a real frontend: what it was asked is what counts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from scripted_frontend import MODEL

from ostro.actors.engine.request import FinishReason, GenerationRequest, TokenEvent
from ostro.cluster.model_card import ModelCard
from ostro.configs.deployment import DeploymentConfig, Layout, LayoutConfig
from ostro.configs.reasoning import EFFORTS

CONFIG = DeploymentConfig(
    model="embedded",
    layout=LayoutConfig(layout=Layout.SINGLE, num_attention_shards=1, num_expert_shards=1),
)
CARD = ModelCard(
    name=MODEL,
    description="",
    created_s=0,
    max_context=4096,
    vocab_size=1024,
    num_layers=1,
    num_experts=4,
    num_experts_per_token=2,
    weight_dtype="float32",
    kv_dtype="float32",
    efforts=EFFORTS,
    default_effort="none",
    has_vision=True,
)


@dataclass
class OneTokenCell:
    """Answers everything with one token; keeps what it was asked."""

    requests: list[GenerationRequest] = field(default_factory=list)
    ready: bool = True

    async def submit(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        self.requests.append(request)
        yield TokenEvent(
            request.request_id, 0, [300, 2], finish_reason=FinishReason.STOP, stop_token_id=2
        )
