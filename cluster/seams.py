"""Where the faces meet the frontend, and the frontend the cell: what each may ask of the other."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from ostro.actors.engine.request import GenerationRequest, TokenEvent
from ostro.actors.fabric.messages import State
from ostro.cluster.generation import (
    ChatGeneration,
    ChatMessage,
    GenerationEvent,
    TextGeneration,
    Tool,
)
from ostro.cluster.model_card import ModelCard


class Cell(Protocol):
    """The serving cell as an ingress sees it; `cell_client` is the real one."""

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        ...

    def submit(self, *requests: GenerationRequest) -> AsyncIterator[TokenEvent]:
        """Serve what one caller asked for, under one request id. Closing the iterator cancels.

        Several requests have different prompts. Events of all their choices come in the order in
        which they happen; the last one of each choice has a finish reason.

        Raises (while iterating):
            OverloadedError: Queues are full; `retry_after_s` is set.
            NotReadyError: The cell is loading, draining or being mended.
            ShardLostError: A rank failed while the request ran.
        """
        ...

    def drop(self, request_id: str) -> None:
        """Stop one choice, by the id in its events; others go on. Does not wait for the end."""
        ...

    async def cancel(self, request_id: str, *, tenant: str | None = None) -> bool:
        """Stop all choices of a caller's request; False if none of that id runs.

        Args:
            request_id: The caller's.
            tenant: Of its requests only; None is everybody's.

        Raises:
            NotReadyError: The cell is being mended, and what waits for that is not found.
        """
        ...

    async def end_thinking(self, request_id: str, *, tenant: str | None = None) -> bool:
        """Close the thinking of all choices at their next step; otherwise as `cancel`."""
        ...

    async def count_request(self, tenant: str) -> None:
        """Count a request that never reaches the cell against its tenant's quota.

        Raises:
            QuotaError: It is one too many in this minute.
            NotReadyError: The router, which counts, cannot be reached.
        """
        ...

    async def state(self) -> State:
        """The cell at this moment."""
        ...


class FrontendLike(Protocol):
    """What the faces call; `frontend.Frontend` is the real one.

    Iterators raise `OstroError`s: InvalidRequestError before anything reached the cell.
    """

    @property
    def card(self) -> ModelCard:
        """The served model."""
        ...

    @property
    def cell(self) -> Cell:
        """The cell behind it."""
        ...

    def chat(self, request: ChatGeneration) -> AsyncIterator[GenerationEvent]:
        """One assistant turn; closing the iterator cancels it."""
        ...

    def generate(self, request: TextGeneration) -> AsyncIterator[GenerationEvent]:
        """A raw continuation; closing the iterator cancels it."""
        ...

    async def tokenize_text(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Token ids of plain text; its work leaves the event loop."""
        ...

    async def tokenize_chat(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool], effort: str | None
    ) -> list[int]:
        """Token ids of the exact prompt that a chat would get; its work leaves the event loop."""
        ...

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens shown; its work leaves the event loop.

        Raises:
            InvalidRequestError: An id is out of range.
        """
        ...
