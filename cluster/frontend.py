"""One request end to end: checked, sent to the cell, its tokens turned into events for a face.

`RequestBuilder` makes the request, `Answer` reads what comes back; the frontend keeps the clock
and closes the cell's iterator whatever happens, which frees the pages of all choices: they end
well together, or none does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import cast

from ostro.actors.engine.request import TokenEvent
from ostro.actors.errors import (
    DeadlineError,
    InvalidRequestError,
    OstroError,
)
from ostro.cluster.answer import Answer
from ostro.cluster.generation import (
    ChatGeneration,
    ChatMessage,
    GenerationEvent,
    ImageUrl,
    TextGeneration,
    Tool,
)
from ostro.cluster.image_fetch import ImageFetcher
from ostro.cluster.image_workers import ImageWorkers
from ostro.cluster.model_card import ModelCard
from ostro.cluster.prompt import PromptBuilder
from ostro.cluster.request_builder import Prepared, RequestBuilder
from ostro.cluster.seams import Cell
from ostro.configs.deployment import DeploymentConfig

_LONG_PROMPT = 8192  # characters; above it (about 1 ms of work) tokenizing leaves the event loop


def _num_characters(message: ChatMessage) -> int:
    calls = sum(len(call.name) + len(call.arguments) for call in message.tool_calls)
    return len(message.text) + len(message.thinking or "") + calls


def _has_images(messages: Sequence[ChatMessage]) -> bool:
    return any(message.images for message in messages)


def _has_urls(messages: Sequence[ChatMessage]) -> bool:
    return any(isinstance(f.data, ImageUrl) for message in messages for f in message.images)


def _has_schemas(request: ChatGeneration | TextGeneration) -> bool:
    """Whether there are schemas, expressions or grammars, which are slow to check."""
    has_tools = isinstance(request, ChatGeneration) and bool(request.tools)
    return has_tools or request.options.answer_format is not None


class Frontend:
    """Serves requests of one model; the real `FrontendLike`.

    `Started` goes out with the first token, which is when the cached tokens are known; nothing
    waits for it. Each step brings at most one delta of thinking and one of answer, then its calls.
    """

    def __init__(
        self,
        cell: Cell,
        prompts: PromptBuilder,
        card: ModelCard,
        config: DeploymentConfig,
        image_fetcher: ImageFetcher | None = None,
    ) -> None:
        """Take the parts.

        Args:
            cell: Where requests go.
            prompts: The checkpoint's tokenizer.
            card: The served model.
            config: The deployment.
            image_fetcher: Brings images that are named by URL; None makes one from the config.

        Raises:
            ConfigError: The tokenizer has more tokens than the model.
        """
        self._cell = cell
        self._prompts = prompts
        self._card = card
        self._builder = RequestBuilder(prompts, card, config)
        self._image_fetcher = image_fetcher or ImageFetcher(config.serving)
        self._image_workers = ImageWorkers()
        self._request_timeout_s = config.serving.request_timeout_s

    @property
    def card(self) -> ModelCard:
        """The served model."""
        return self._card

    @property
    def cell(self) -> Cell:
        """The cell behind it."""
        return self._cell

    def chat(self, request: ChatGeneration) -> AsyncIterator[GenerationEvent]:
        """One assistant turn; closing the iterator cancels it, also while images are fetched.

        Raises (while iterating):
            InvalidRequestError, NotFoundError: Before anything reached the cell.
            DeadlineError: `queue_timeout_s` or the server's request timeout passed.
            OverloadedError: Too many images wait to be fetched or read.
            OstroError: What the cell raised or reported.
        """
        return self._serve(partial(self._prepare_chat, request))

    def generate(self, request: TextGeneration) -> AsyncIterator[GenerationEvent]:
        """Raw continuations; closing the iterator cancels them. Raises what `chat` raises."""
        return self._serve(partial(self._prepare_text, request))

    async def tokenize_text(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Token ids of plain text."""
        return await asyncio.to_thread(self._prompts.text, text, add_bos=add_bos)

    async def tokenize_chat(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool], effort: str | None
    ) -> list[int]:
        """Token ids of the exact prompt that a chat would get; its work leaves the event loop."""
        if _has_urls(messages):
            self._builder.check_messages(messages, tools, effort)
            messages = await self._image_fetcher.with_files(messages)
        work = partial(self._builder.tokenize_chat, messages, tools, effort)
        if _has_images(messages):
            return await self._image_workers.run(work)
        return await asyncio.to_thread(work)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, control tokens shown.

        Raises:
            InvalidRequestError: An id is not in the vocabulary; `param` is "tokens".
        """
        return await asyncio.to_thread(self._detokenized, token_ids)

    def _detokenized(self, token_ids: Sequence[int]) -> str:
        size = len(self._prompts.table)
        if not all(type(token_id) is int and 0 <= token_id < size for token_id in token_ids):
            raise InvalidRequestError(
                f"tokens takes token ids from 0 to {size - 1}", param="tokens"
            )
        return self._prompts.table.decode(token_ids)

    async def _prepare_chat(self, request: ChatGeneration) -> list[Prepared]:
        if _has_urls(request.messages):
            self._builder.check_chat(request)
            messages = await self._image_fetcher.with_files(request.messages)
            request = replace(request, messages=tuple(messages))
        build = partial(self._builder.chat, request)
        if _has_images(request.messages):
            return await self._image_workers.run(build)
        num_characters = sum(map(_num_characters, request.messages))
        num_characters += len(request.options.prediction)
        is_long = num_characters > _LONG_PROMPT or _has_schemas(request)
        return await asyncio.to_thread(build) if is_long else build()

    async def _prepare_text(self, request: TextGeneration) -> list[Prepared]:
        build = partial(self._builder.text, request)
        num_characters = sum(map(len, request.prompts)) + len(request.options.prediction)
        is_long = num_characters > _LONG_PROMPT or _has_schemas(request)
        return await asyncio.to_thread(build) if is_long else build()

    async def _serve(
        self, prepare: Callable[[], Awaitable[list[Prepared]]]
    ) -> AsyncGenerator[GenerationEvent, None]:
        answer_by = _Deadlines(self._request_timeout_s)
        prepared = await prepare()
        submitted = self._cell.submit(*(of_prompt.request for of_prompt in prepared))
        tokens = cast("AsyncGenerator[TokenEvent, None]", submitted)
        prepared = [of_prompt.without_pixels() for of_prompt in prepared]
        del prepare  # holds the image files; the answer may take long
        answer_by.begin_within(prepared[0].options.queue_timeout_s)
        answer = Answer(prepared, self._prompts, self._card.name, answer_by.arrived_s)
        async with aclosing(tokens):
            is_last = False
            while not is_last:
                event = await answer_by.wait_for(tokens, has_begun=answer.has_begun)
                brought = answer.take(event)
                is_last = answer.is_finished
                if is_last:
                    await tokens.aclose()  # now, not when the caller has read the last event
                elif event.finish_reason is None and brought and answer.has_ended(event.choice):
                    self._cell.drop(event.request_id)  # at a stop string, while others go on
                for item in brought:
                    yield item


class _Deadlines:
    """When one request must have begun, which is when its first token comes, and have ended."""

    def __init__(self, request_timeout_s: float) -> None:
        self.arrived_s = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._begun = self._loop.time()
        self._request_timeout_s = request_timeout_s
        self._queue_timeout_s: float | None = None

    def begin_within(self, queue_timeout_s: float | None) -> None:
        self._queue_timeout_s = queue_timeout_s

    async def wait_for(
        self, tokens: AsyncGenerator[TokenEvent, None], *, has_begun: bool
    ) -> TokenEvent:
        limit_s, what = self._request_timeout_s, "the server's request timeout"
        if not has_begun and (self._queue_timeout_s or limit_s) < limit_s:
            limit_s, what = self._queue_timeout_s or limit_s, "the request's queue timeout"
        try:
            async with asyncio.timeout_at(self._begun + limit_s) as timeout:
                return await anext(tokens)
        except TimeoutError as error:
            if not timeout.expired():
                raise
            raise DeadlineError(f"{what} of {limit_s:g} s passed") from error
        except StopAsyncIteration as error:
            raise OstroError("the cell left a generation without an end") from error
