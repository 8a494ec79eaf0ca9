"""One request end to end: checked, sent to the cell, its tokens turned into events for a face.

`RequestBuilder` makes the request, `_Answer` reads what comes back; the frontend keeps the clock
and closes the cell's iterator whatever happens, which frees the request's pages.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import cast

from ostro.actors.engine.request import FinishReason, TokenEvent, TokenLogprob
from ostro.actors.errors import (
    DeadlineError,
    InvalidRequestError,
    OstroError,
    OverloadedError,
)
from ostro.cluster.detokenizer import TokenTable
from ostro.cluster.generation import (
    Cell,
    ChatGeneration,
    ChatMessage,
    Finished,
    GenerationEvent,
    ModelCard,
    ReasoningReport,
    Started,
    TextDelta,
    TextGeneration,
    Timing,
    TokenText,
    Tool,
    ToolCallDone,
    Usage,
)
from ostro.cluster.image_workers import ImageWorkers
from ostro.cluster.output_parser import Channel, OutputParser, ParsedStep
from ostro.cluster.prompt import PromptBuilder
from ostro.cluster.request_builder import Prepared, RequestBuilder
from ostro.configs.deployment import DeploymentConfig

_LONG_PROMPT = 8192  # characters; above it (about 1 ms of work) tokenizing leaves the event loop
# What a shard says of a request that it does not take; the router and the client raise the rest.
_ERRORS: dict[str, type[OstroError]] = {
    OverloadedError.code: OverloadedError,
    InvalidRequestError.code: InvalidRequestError,
    "context_length_exceeded": InvalidRequestError,  # more than the shard's cache holds
}


def _num_characters(message: ChatMessage) -> int:
    calls = sum(len(call.name) + len(call.arguments) for call in message.tool_calls)
    return len(message.text) + len(message.thinking or "") + calls


def _has_images(messages: Sequence[ChatMessage]) -> bool:
    return any(message.images for message in messages)


class Frontend:
    """Serves requests of one model; the real `FrontendLike`.

    `Started` goes out with the first token, which is when the cached tokens are known; nothing
    waits for it. Each step brings at most one delta of thinking and one of answer, then its calls.
    """

    def __init__(
        self, cell: Cell, prompts: PromptBuilder, card: ModelCard, config: DeploymentConfig
    ) -> None:
        """Take the parts.

        Raises:
            ConfigError: The tokenizer has more tokens than the model.
        """
        self._cell = cell
        self._prompts = prompts
        self._card = card
        self._builder = RequestBuilder(prompts, card, config)
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
        """One assistant turn; closing the iterator cancels it.

        Raises (while iterating):
            InvalidRequestError, NotFoundError: Before anything reached the cell.
            DeadlineError: `queue_timeout_s` or the server's request timeout passed.
            OstroError: What the cell raised or reported.
        """
        num_characters = sum(map(_num_characters, request.messages))
        is_long = num_characters > _LONG_PROMPT or bool(request.tools)  # schemas are slow to check
        build = partial(self._builder.chat, request)
        return self._serve(build, is_long=is_long, has_images=_has_images(request.messages))

    def generate(self, request: TextGeneration) -> AsyncIterator[GenerationEvent]:
        """A raw continuation; closing the iterator cancels it. Raises what `chat` raises."""
        is_long = len(request.prompt) > _LONG_PROMPT
        return self._serve(partial(self._builder.text, request), is_long=is_long)

    def tokenize_text(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Token ids of plain text."""
        return self._prompts.text(text, add_bos=add_bos)

    async def tokenize_chat(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool], effort: str | None
    ) -> list[int]:
        """Token ids of the exact prompt that a chat would get; its work leaves the event loop."""
        work = partial(self._builder.tokenize_chat, messages, tools, effort)
        if _has_images(messages):
            return await self._image_workers.run(work)
        return await asyncio.to_thread(work)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, control tokens shown.

        Raises:
            InvalidRequestError: An id is not in the vocabulary; `param` is "tokens".
        """
        size = len(self._prompts.table)
        if not all(type(token_id) is int and 0 <= token_id < size for token_id in token_ids):
            raise InvalidRequestError(
                f"tokens takes token ids from 0 to {size - 1}", param="tokens"
            )
        return self._prompts.table.decode(token_ids)

    async def _serve(
        self, build: Callable[[], Prepared], *, is_long: bool, has_images: bool = False
    ) -> AsyncGenerator[GenerationEvent, None]:
        answer_by = _Deadlines(self._request_timeout_s)
        if has_images:
            prepared = await self._image_workers.run(build)
        else:
            prepared = await asyncio.to_thread(build) if is_long else build()
        tokens = cast("AsyncGenerator[TokenEvent, None]", self._cell.submit(prepared.request))
        prepared = prepared.without_pixels()
        del build  # holds the image files; the answer may take long
        answer_by.begin_within(prepared.options.queue_timeout_s)
        answer = _Answer(prepared, self._prompts, self._card.name, answer_by.arrived_s)
        async with aclosing(tokens):
            is_last = False
            while not is_last:
                event = await answer_by.wait_for(tokens, has_begun=answer.has_begun)
                brought = answer.take(event)
                is_last = answer.is_finished
                if is_last:
                    await tokens.aclose()  # now, not when the caller has read the last event
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


class _Answer:
    """What one generation has brought so far: `TokenEvent`s in, events for the face out."""

    def __init__(
        self, prepared: Prepared, prompts: PromptBuilder, model: str, arrived_s: float
    ) -> None:
        self.has_begun = False
        self.is_finished = False
        self._prepared = prepared
        self._table: TokenTable = prompts.table
        self._model = model
        self._arrived_s = arrived_s
        self._parser = OutputParser(
            prompts.table,
            prompts.special,
            prepared.output_format,
            stop=prepared.options.stop,
            min_tokens=prepared.options.min_tokens,
            starts_in_thinking=prepared.starts_in_thinking,
        )
        self._num_received = 0  # output tokens that came, repeats not counted
        self._num_tokens = 0  # of these, all up to a stop string
        self._num_calls = 0
        self._num_cached_tokens = 0
        self._num_thinking_tokens = 0
        self._thinking_ended_by: str | None = None
        self._queued_s = 0.0
        self._first_token_s: float | None = None
        self._first_answer_token_s: float | None = None

    def take(self, event: TokenEvent) -> list[GenerationEvent]:
        """Read one event of the cell. An ERROR event is raised as what its code says."""
        if event.finish_reason is FinishReason.ERROR:
            raise self._error(event)
        token_ids, logprobs = self._new_tokens(event)
        self._note(event)
        brought: list[GenerationEvent] = []
        if not self.has_begun:
            self.has_begun = True
            brought.append(self._started())
        ends_on_token = event.stop_token_id is not None and bool(token_ids)
        step = self._parser.feed(token_ids[:-1] if ends_on_token else token_ids)
        if ends_on_token and step.matched_stop is None:
            step.channels.append(Channel.STOP)
        self._num_tokens += len(step.channels)
        self.is_finished = event.finish_reason is not None or step.matched_stop is not None
        if self.is_finished and step.matched_stop is None:
            step.add(self._parser.finish())
        self._mark_times(step)
        brought += self._deltas(step, token_ids, logprobs)
        for call in step.calls:
            brought.append(ToolCallDone(index=self._num_calls, call=call))
            self._num_calls += 1
        if self.is_finished:
            brought.append(self._finished(event, step.matched_stop))
        return brought

    def _new_tokens(self, event: TokenEvent) -> tuple[list[int], list[TokenLogprob]]:
        num_repeated = self._num_received - event.first_index
        if num_repeated < 0 and event.token_ids:
            raise OstroError(f"output tokens from {self._num_received} on were lost on their way")
        token_ids = event.token_ids[max(num_repeated, 0) :]
        self._num_received += len(token_ids)
        return token_ids, (event.logprobs or [])[max(num_repeated, 0) :]

    def _note(self, event: TokenEvent) -> None:
        if not self.has_begun:
            self._queued_s = event.queued_s
            self._num_cached_tokens = event.num_cached_tokens
        self._num_thinking_tokens = max(self._num_thinking_tokens, event.num_thinking_tokens)
        self._thinking_ended_by = event.thinking_ended_by or self._thinking_ended_by

    def _mark_times(self, step: ParsedStep) -> None:
        now_s = time.monotonic() - self._arrived_s
        if self._first_token_s is None and step.channels:
            self._first_token_s = now_s
        if self._first_answer_token_s is None and (step.answer or step.calls):
            self._first_answer_token_s = now_s

    def _deltas(
        self, step: ParsedStep, token_ids: list[int], logprobs: list[TokenLogprob]
    ) -> list[TextDelta]:
        deltas = []
        for text, is_thinking in ((step.thinking, True), (step.answer, False)):
            if is_thinking and self._prepared.options.omit_thinking:
                continue
            places = [
                place
                for place, channel in enumerate(step.channels)
                if (channel is Channel.THINKING) is is_thinking
            ]
            delta = TextDelta(
                text=text,
                thinking=is_thinking,
                token_ids=self._shown_ids(token_ids, places),
                logprobs=self._shown_logprobs(step, logprobs, places),
            )
            if delta.text or delta.token_ids or delta.logprobs:
                deltas.append(delta)
        return deltas

    def _shown_ids(self, token_ids: list[int], places: list[int]) -> tuple[int, ...]:
        if not self._prepared.options.return_token_ids:
            return ()
        return tuple(token_ids[place] for place in places)

    def _shown_logprobs(
        self, step: ParsedStep, logprobs: list[TokenLogprob], places: list[int]
    ) -> tuple[TokenText, ...]:
        """Of tokens that are text: control tokens, calls and stop tokens are not the reader's."""
        num_top = self._prepared.options.num_logprobs
        if num_top is None:
            return ()
        return tuple(
            self._token_text(logprobs[place], num_top)
            for place in places
            if place < len(logprobs)
            and step.channels[place] in (Channel.THINKING, Channel.ANSWER)
            and not self._table.is_special(logprobs[place].token_id)
        )

    def _token_text(self, logprob: TokenLogprob, num_top: int) -> TokenText:
        return TokenText(
            token_id=logprob.token_id,
            text=self._table.name(logprob.token_id),
            logprob=logprob.logprob,
            top=tuple((i, self._table.name(i), value) for i, value in logprob.top[:num_top]),
        )

    def _started(self) -> Started:
        request = self._prepared.request
        return Started(
            request_id=request.request_id,
            model=self._model,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_cached_tokens=self._num_cached_tokens,
            effort=self._prepared.effort,
            budget_tokens=self._prepared.budget_tokens,
        )

    def _finished(self, event: TokenEvent, matched_stop: str | None) -> Finished:
        is_callers_token = event.stop_token_id in self._prepared.options.stop_token_ids
        return Finished(
            reason=self._reason(event, matched_stop),
            usage=Usage(
                prompt_tokens=len(self._prepared.request.prompt_token_ids),
                cached_prompt_tokens=self._num_cached_tokens,
                completion_tokens=self._num_tokens,
                thinking_tokens=self._num_thinking_tokens,
                image_tokens=self._prepared.num_image_tokens,
            ),
            reasoning=ReasoningReport(
                effort=self._prepared.effort,
                budget_tokens=self._prepared.budget_tokens,
                thinking_tokens=self._num_thinking_tokens,
                ended_by=self._thinking_ended_by,
            ),
            timing=Timing(
                queued_s=self._queued_s,
                first_token_s=self._first_token_s,
                first_answer_token_s=self._first_answer_token_s,
                total_s=time.monotonic() - self._arrived_s,
            ),
            matched_stop=matched_stop,
            stop_token_id=event.stop_token_id if is_callers_token and not matched_stop else None,
        )

    def _reason(self, event: TokenEvent, matched_stop: str | None) -> str:
        reason = FinishReason.STOP if matched_stop else event.finish_reason
        if reason is FinishReason.LENGTH and self._prepared.length_is_context:
            reason = FinishReason.MODEL_LENGTH
        if reason is FinishReason.STOP and self._num_calls:
            return "tool_calls"
        return (reason or FinishReason.STOP).value

    def _error(self, event: TokenEvent) -> OstroError:
        code = event.error_code or OstroError.code
        kind = _ERRORS.get(code, OstroError)
        return kind(
            event.error_message or "the generation failed",
            code=code,
            param=self._prepared.prompt_field if kind is InvalidRequestError else None,
        )
