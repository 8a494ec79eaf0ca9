"""A frontend that answers with a script, for the tests of the faces; and a server to put it behind.

It notes what it was asked and how each iterator ended, so that tests can see a cancel arrive.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace

import uvicorn
from wait_for import wait_for

from ostro.actors.engine.request import GenerationRequest, TokenEvent
from ostro.actors.engine.stages import STAGES
from ostro.actors.engine.step import ShardLoad
from ostro.actors.errors import InvalidRequestError, NotReadyError, OstroError
from ostro.actors.fabric.messages import ActorStatus, State
from ostro.cluster.generation import (
    ChatGeneration,
    ChatMessage,
    Finished,
    GenerationEvent,
    ReasoningReport,
    Started,
    TextDelta,
    TextGeneration,
    Timing,
    TokenText,
    Tool,
    ToolCall,
    ToolCallDone,
    Usage,
)
from ostro.cluster.model_card import ModelCard, check_model_name
from ostro.configs.reasoning import EFFORTS

MODEL = "tiny-small-4"
ALIAS = "small"
STARTED = Started(
    request_id="gen-1",
    model=MODEL,
    num_prompt_tokens=7,
    num_cached_tokens=4,
    effort="low",
    budget_tokens=2048,
)
FINISHED = Finished(
    reason="stop",
    usage=Usage(
        prompt_tokens=7,
        cached_prompt_tokens=4,
        completion_tokens=11,
        thinking_tokens=5,
        image_tokens=3,
    ),
    reasoning=ReasoningReport(
        effort="low", budget_tokens=2048, thinking_tokens=5, ended_by="model"
    ),
    timing=Timing(
        queued_s=0.01,
        first_token_s=0.05,
        first_answer_token_s=0.2,
        total_s=0.5,
        prefill_s=0.03,
        decode_s=0.44,
        stages=dict(zip(STAGES, (0.01, 0.1, 0.02, 0.2, 0.03, 0.01, 0.05, 0.02), strict=True)),
    ),
)
CALL = ToolCallDone(
    index=0, call=ToolCall(call_id="abcDEF123", name="weather", arguments='{"city": "Oslo"}')
)
THOUGHTFUL: tuple[GenerationEvent, ...] = (
    STARTED,
    TextDelta(text="Let ", thinking=True),
    TextDelta(text="me see.", thinking=True),
    TextDelta(text="Hel"),
    TextDelta(text="lo"),
    FINISHED,
)
WITH_LOGPROBS: tuple[GenerationEvent, ...] = (
    STARTED,
    TextDelta(
        text="Hel",
        token_ids=(5,),
        logprobs=(
            TokenText(
                token_id=5, text=b"Hel", logprob=-0.1, top=((5, b"Hel", -0.1), (9, b"J", -2.5))
            ),
        ),
    ),
    TextDelta(
        text="lo",
        token_ids=(6,),
        logprobs=(TokenText(token_id=6, text=b"lo", logprob=-0.2, top=((6, b"lo", -0.2),)),),
    ),
    FINISHED,
)

# Three answers at once: the first thinks, the second thinks and calls, the third just answers.
THREE: tuple[GenerationEvent, ...] = (
    replace(STARTED, num_choices=3),
    TextDelta(text="Let ", thinking=True),
    TextDelta(text="Well", thinking=True, choice=1),
    *(replace(delta, choice=2) for delta in WITH_LOGPROBS[1:3]),
    TextDelta(text="me see.", thinking=True),
    replace(FINISHED, choice=2, is_last=False, reason="length"),
    *WITH_LOGPROBS[1:3],
    replace(CALL, choice=1),
    replace(FINISHED, is_last=False),
    replace(FINISHED, choice=1, reason="tool_calls"),
)


@dataclass
class ScriptedCell:
    """A cell whose state is fixed and whose controls are noted."""

    is_ready: bool = True
    controls: list[tuple[str, str]] = field(default_factory=list)
    running: set[str] = field(default_factory=lambda: {"gen-1"})
    num_output_tokens: int = 50
    steered_tenants: list[str | None] = field(default_factory=list)
    counted_tenants: list[str] = field(default_factory=list)
    quota_error: OstroError | None = None

    @property
    def ready(self) -> bool:
        return self.is_ready

    async def submit(self, *requests: GenerationRequest) -> AsyncIterator[TokenEvent]:
        raise NotImplementedError
        yield

    def drop(self, request_id: str) -> None:
        raise NotImplementedError

    async def cancel(self, request_id: str, *, tenant: str | None = None) -> bool:
        self.steered_tenants.append(tenant)
        self.controls.append(("cancel", request_id))
        return request_id in self.running

    async def end_thinking(self, request_id: str, *, tenant: str | None = None) -> bool:
        self.steered_tenants.append(tenant)
        self.controls.append(("end_thinking", request_id))
        return request_id in self.running

    async def count_request(self, tenant: str) -> None:
        self.counted_tenants.append(tenant)
        if self.quota_error is not None:
            raise self.quota_error

    async def state(self) -> State:
        if not self.is_ready:
            raise NotReadyError("no router")
        load = ShardLoad(
            num_running=2,
            num_waiting=1,
            num_free_pages=75,
            num_pages=100,
            num_preemptions=3,
            num_prompt_tokens=40,
            num_output_tokens=self.num_output_tokens,
            prefix_queries_tokens=40,
            prefix_hits_tokens=10,
            num_drafted=(20, 10),
            num_accepted=(8, 2),
        )
        actor = ActorStatus(
            "attention-0", "attention", "ready", "node-1", "", 0, 1.0, 10, 100, 1700000000.0
        )
        expert = ActorStatus(
            "experts-1", "expert", "ready", "node-1", "", 1, 1.0, 10, 100, 1700000000.0, 2
        )
        return State(
            tag=0,
            epoch=3,
            ready=True,
            actors=[actor, expert],
            loads={0: load},
            rows_LE=[[6, 2], [4, 0]],
            physical_to_logical=[0, 1],
            rank_of_physical=[1, 2],
            seconds={"attention": 1.5, "wait": 0.5},
            num_steps=20,
        )


class ScriptedFrontend:
    """Yields `script`; an exception in it is raised, a number is slept, None waits for ever."""

    def __init__(self, *script: GenerationEvent | BaseException | float | None) -> None:
        self.script = script or THOUGHTFUL
        self.cell = ScriptedCell()
        self.asked: list[ChatGeneration | TextGeneration] = []
        self.num_closed = 0
        self.num_completed = 0
        self.closed = threading.Event()
        self.heeds_predictions = True

    @property
    def card(self) -> ModelCard:
        return ModelCard(
            name=MODEL,
            description="scripted",
            created_s=1700000000,
            max_context=4096,
            vocab_size=1000,
            num_layers=2,
            num_experts=2,
            num_experts_per_token=1,
            weight_dtype="float32",
            kv_dtype="float32",
            efforts=EFFORTS,
            default_effort="none",
            aliases=(ALIAS,),
            heeds_predictions=self.heeds_predictions,
        )

    def chat(self, request: ChatGeneration) -> AsyncIterator[GenerationEvent]:
        self.asked.append(request)
        return self._play(request.model)

    def generate(self, request: TextGeneration) -> AsyncIterator[GenerationEvent]:
        self.asked.append(request)
        return self._play(request.model)

    async def tokenize_text(self, text: str, *, add_bos: bool = True) -> list[int]:
        return [1] * add_bos + [ord(letter) for letter in text]

    async def tokenize_chat(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool], effort: str | None
    ) -> list[int]:
        return [1, len(messages), len(tools)]

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        if not all(0 <= token_id < self.card.vocab_size for token_id in token_ids):
            raise InvalidRequestError("tokens takes token ids from 0 to 999", param="tokens")
        return "".join(chr(token_id) for token_id in token_ids)

    async def _play(self, model: str) -> AsyncIterator[GenerationEvent]:
        check_model_name(self.card, model)
        is_completed = False
        try:
            for item in self.script:
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    await asyncio.Event().wait()
                elif isinstance(item, int | float):
                    await asyncio.sleep(item)
                else:
                    yield item
            is_completed = True
        finally:
            self.num_completed += is_completed
            self.num_closed += not is_completed
            self.closed.set()


@contextlib.contextmanager
def served(app: object) -> Iterator[str]:
    """Serve an ASGI application with uvicorn in a thread; gives its base URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()
