"""A frontend that knows who asks: whose generation it is, how long it may be, who may steer it.

The faces see this one and never the one behind it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace
from typing import TypeVar

import msgspec

from ostro.actors.engine.request import GenerationRequest, TokenEvent
from ostro.actors.errors import InvalidRequestError, SpentQuotaError
from ostro.actors.fabric.messages import State
from ostro.cluster.door import Call, Door, current_call
from ostro.cluster.generation import (
    ChatGeneration,
    ChatMessage,
    Finished,
    GenerationEvent,
    Started,
    TextGeneration,
    Tool,
)
from ostro.cluster.key_ring import Caller
from ostro.cluster.metrics import closing_events
from ostro.cluster.model_card import ModelCard
from ostro.cluster.seams import Cell, FrontendLike
from ostro.configs.key_table import Scope

_Generation = TypeVar("_Generation", ChatGeneration, TextGeneration)


class GuardedFrontend:
    """A `FrontendLike` for callers that came in by a door.

    What it adds is the server's word against the caller's: the tenant is always that of the key,
    and what never reaches the cell counts against the tenant's requests per minute all the same.
    """

    def __init__(self, frontend: FrontendLike, door: Door) -> None:
        self._frontend = frontend
        self._door = door

    @property
    def card(self) -> ModelCard:
        """The served model."""
        return self._frontend.card

    @property
    def cell(self) -> Cell:
        """The cell, in which callers steer their own generations alone."""
        return _GuardedCell(self._frontend.cell)

    def chat(self, request: ChatGeneration) -> AsyncIterator[GenerationEvent]:
        """One assistant turn. Raises at once what `_of_caller` does, the rest while iterating."""
        call = current_call()
        return self._watched(self._frontend.chat(_of_caller(request, call.caller)), call)

    def generate(self, request: TextGeneration) -> AsyncIterator[GenerationEvent]:
        """A raw continuation. Raises at once what `_of_caller` does, the rest while iterating."""
        call = current_call()
        return self._watched(self._frontend.generate(_of_caller(request, call.caller)), call)

    async def tokenize_text(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Token ids of plain text."""
        await self._count_request()
        return await self._frontend.tokenize_text(text, add_bos=add_bos)

    async def tokenize_chat(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool], effort: str | None
    ) -> list[int]:
        """Token ids of the exact prompt that a chat would get."""
        await self._count_request()
        return await self._frontend.tokenize_chat(messages, tools, effort)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids."""
        await self._count_request()
        return await self._frontend.detokenize(token_ids)

    async def _count_request(self) -> None:
        """One more request of the caller's. Raises what `Cell.count_request` does."""
        caller = current_call().caller
        if caller.quota.requests_per_minute is not None:
            await self._frontend.cell.count_request(caller.tenant)

    def _watched(
        self, events: AsyncIterator[GenerationEvent], call: Call
    ) -> AsyncIterator[GenerationEvent]:
        if self._door.audits or call.caller.quota.is_per_minute:
            return _watching(events, call, self._door)
        return events


async def _watching(
    events: AsyncIterator[GenerationEvent], call: Call, door: Door
) -> AsyncGenerator[GenerationEvent, None]:
    """The same events; what the audit log wants of them stays with the call."""
    async with closing_events(events) as source:
        door.check_quota(call.caller)
        try:
            async for event in source:
                if isinstance(event, Started):
                    call.generation_id = event.request_id
                    call.num_prompt_tokens = event.num_prompt_tokens
                elif isinstance(event, Finished):
                    call.usage, call.finish_reason = event.usage, event.reason
                yield event
        except SpentQuotaError as error:
            door.note_spent(call.caller, error)
            raise


class _GuardedCell:
    """A `Cell` for one caller."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell

    @property
    def ready(self) -> bool:
        return self._cell.ready

    def submit(self, *requests: GenerationRequest) -> AsyncIterator[TokenEvent]:
        tenant = current_call().caller.tenant
        theirs = [msgspec.structs.replace(request, tenant=tenant) for request in requests]
        return self._cell.submit(*theirs)

    def drop(self, request_id: str) -> None:
        self._cell.drop(request_id)

    async def cancel(self, request_id: str, *, tenant: str | None = None) -> bool:
        return await self._cell.cancel(request_id, tenant=_steered_tenant(tenant))

    async def end_thinking(self, request_id: str, *, tenant: str | None = None) -> bool:
        return await self._cell.end_thinking(request_id, tenant=_steered_tenant(tenant))

    async def count_request(self, tenant: str) -> None:
        await self._cell.count_request(tenant)

    async def state(self) -> State:
        return await self._cell.state()


def _steered_tenant(asked: str | None) -> str | None:
    """Whose generations the caller may steer; None is everybody's."""
    caller = current_call().caller
    return asked if Scope.ADMIN in caller.scopes else caller.tenant


def _of_caller(request: _Generation, caller: Caller) -> _Generation:
    """The request as it holds for this caller.

    Raises:
        InvalidRequestError: More tokens are asked for than the tenant may have in one request.
    """
    most = caller.quota.max_tokens_per_request
    options = request.options
    max_tokens = options.max_tokens
    if most is not None:
        if max_tokens is not None and max_tokens > most:
            raise InvalidRequestError(
                f"max_tokens={max_tokens}: tenant {caller.tenant} may ask for at most {most}, its "
                f"max_tokens_per_request",
                code="above_quota",
                param="max_tokens",
            )
        max_tokens = most if max_tokens is None else max_tokens
    if (caller.tenant, max_tokens) == (options.tenant, options.max_tokens):
        return request
    options = replace(options, tenant=caller.tenant, max_tokens=max_tokens)
    return replace(request, options=options)
