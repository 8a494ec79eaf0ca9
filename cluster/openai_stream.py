"""Generation events to server-sent events of the OpenAI dialect.

A plain delta is written from a prebuilt prefix: one string is encoded per token, nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import msgspec

from ostro.actors.errors import OstroError
from ostro.cluster.error_table import error_fields
from ostro.cluster.generation import (
    Finished,
    GenerationEvent,
    Started,
    TextDelta,
    ToolCallDone,
)
from ostro.cluster.openai_fields import (
    AnswerStyle,
    Json,
    ThinkingForm,
    chat_logprobs,
    finish_reason,
    head,
    reasoning_fields,
    stop_reason,
    text_logprobs,
    thinking_chunk,
    tool_call_fields,
    usage_fields,
)

_encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"


class EventWriter(ABC):
    """Writes one generation's events as server-sent events; knows what went before."""

    object_name = ""
    end = DONE

    def __init__(self, style: AnswerStyle) -> None:
        self._style = style
        self._plain = not (style.logprobs or style.token_ids)
        self._head: Json = {"id": "", "object": self.object_name, "created": 0, "model": ""}
        self._prefix = b""

    def write(self, event: GenerationEvent) -> bytes:
        """The bytes of an event, ready to send; may hold several chunks or none."""
        if isinstance(event, TextDelta):
            return self._delta(event)
        if isinstance(event, Started):
            self._head = head(event, self.object_name)
            self._prefix = b"data: " + _encode(self._head)[:-1] + b',"choices":[{"index":0,'
            return self._begin(event)
        if isinstance(event, ToolCallDone):
            return self._tool_call(event)
        choice = self._end(finish_reason(event.reason, self._style.form))
        return self._before_end() + self._last({**choice, "stop_reason": stop_reason(event)}, event)

    def failure(self, error: OstroError) -> bytes:
        """The last chunk of a stream that failed after it began, readable for both clients."""
        last = self._chunk(self._end("error"), error=error_fields(error))
        return self._before_end() + last

    def _begin(self, event: Started) -> bytes:
        return b""

    @abstractmethod
    def _delta(self, event: TextDelta) -> bytes: ...

    def _tool_call(self, event: ToolCallDone) -> bytes:
        return b""

    def _before_end(self) -> bytes:
        return b""

    @abstractmethod
    def _end(self, reason: str) -> Json:
        """The choice of the last chunk."""

    def _chunk(self, choice: Json, **more: object) -> bytes:
        choice = {"index": 0, **choice}
        return b"data: " + _encode({**self._head, "choices": [choice], **more}) + b"\n\n"

    def _last(self, choice: Json, event: Finished) -> bytes:
        usage = {"usage": usage_fields(event.usage)}
        extra = {"reasoning": reasoning_fields(event.reasoning)}
        if not self._style.usage_chunk:
            return self._chunk(choice, **usage, **extra)
        body = {**self._head, "choices": [], **usage}
        return self._chunk(choice, **extra) + b"data: " + _encode(body) + b"\n\n"


class ChatEventWriter(EventWriter):
    """Writes `chat.completion.chunk`s."""

    object_name = "chat.completion.chunk"

    def __init__(self, style: AnswerStyle) -> None:
        super().__init__(style)
        self._thinking_open = False

    def _begin(self, event: Started) -> bytes:
        delta = {"role": "assistant", "content": ""}
        reasoning = {"effort": event.effort, "budget": event.budget_tokens}
        return self._chunk({"delta": delta, "finish_reason": None}, reasoning=reasoning)

    def _delta(self, event: TextDelta) -> bytes:
        if not self._plain:
            return self._full_delta(event)
        if event.thinking or self._thinking_open:
            delta = _encode(self._delta_fields(event))
        else:
            delta = b'{"content":' + _encode(event.text) + b"}"
        return self._prefix + b'"delta":' + delta + b',"finish_reason":null}]}\n\n'

    def _tool_call(self, event: ToolCallDone) -> bytes:
        delta = {"tool_calls": [tool_call_fields(event)]}
        return self._before_end() + self._chunk({"delta": delta, "finish_reason": None})

    def _before_end(self) -> bytes:
        if not self._thinking_open:
            return b""
        self._thinking_open = False
        delta = {"content": [thinking_chunk("", closed=True)]}
        return self._chunk({"delta": delta, "finish_reason": None})

    def _end(self, reason: str) -> Json:
        return {"delta": {"content": ""}, "finish_reason": reason}

    def _delta_fields(self, event: TextDelta) -> Json:
        if event.thinking:
            self._thinking_open = self._style.form is ThinkingForm.CHUNKS
            if self._thinking_open:
                return {"content": [thinking_chunk(event.text)]}
            return {"reasoning_content": event.text, "reasoning": event.text}
        if self._thinking_open:
            self._thinking_open = False
            closed = thinking_chunk("", closed=True)
            return {"content": [closed, {"type": "text", "text": event.text}]}
        return {"content": event.text}

    def _full_delta(self, event: TextDelta) -> bytes:
        choice: Json = {"delta": self._delta_fields(event), "finish_reason": None}
        if self._style.logprobs:
            choice["logprobs"] = chat_logprobs(event.logprobs)
        if self._style.token_ids:
            choice["token_ids"] = event.token_ids
        return self._chunk(choice)


class TextEventWriter(EventWriter):
    """Writes streamed `text_completion`s."""

    object_name = "text_completion"

    def __init__(self, style: AnswerStyle) -> None:
        super().__init__(style)
        self._num_chars = 0

    def _delta(self, event: TextDelta) -> bytes:
        if self._plain:
            text = _encode(event.text)
            return (
                self._prefix + b'"text":' + text + b',"logprobs":null,"finish_reason":null}]}\n\n'
            )
        choice: Json = {"text": event.text, "logprobs": None, "finish_reason": None}
        if self._style.logprobs:
            choice["logprobs"] = text_logprobs(event.logprobs, self._num_chars)
        if self._style.token_ids:
            choice["token_ids"] = event.token_ids
        self._num_chars += len(event.text)
        return self._chunk(choice)

    def _end(self, reason: str) -> Json:
        return {"text": "", "logprobs": None, "finish_reason": reason}
