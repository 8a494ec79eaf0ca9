"""Generation events to server-sent events of the OpenAI dialect.

A plain delta is written from its choice's prebuilt prefix: one string is encoded per token,
nothing else.
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
    opening = b""  # of what a delta brings, at the end of the prebuilt prefix
    end = DONE

    def __init__(self, style: AnswerStyle) -> None:
        self._style = style
        self._plain = not (style.logprobs or style.token_ids)
        self._head: Json = {"id": "", "object": self.object_name, "created": 0, "model": ""}
        self._open = {0}  # choices that have not ended
        self._prefixes: list[bytes] = []  # by choice

    def write(self, event: GenerationEvent) -> bytes:
        """The bytes of an event, ready to send; may hold several chunks or none."""
        if isinstance(event, TextDelta):
            return self._delta(event)
        if isinstance(event, Started):
            return self._start(event)
        if isinstance(event, ToolCallDone):
            return self._tool_call(event)
        self._open.discard(event.choice)
        return self._before_end(event.choice) + self._finish(event)

    def failure(self, error: OstroError) -> bytes:
        """The last chunk of a stream that failed after it began, readable for both clients.

        It ends all choices that had not ended.
        """
        still_open = sorted(self._open)
        ends = [{"index": choice, **self._end("error")} for choice in still_open]
        last = self._chunk(*ends, error=error_fields(error))
        return b"".join(map(self._before_end, still_open)) + last

    def _start(self, event: Started) -> bytes:
        choices = range(event.num_choices)
        self._head, self._open = head(event, self.object_name), set(choices)
        start = b"data: " + _encode(self._head)[:-1]
        self._prefixes = [
            start + b',"choices":[{"index":%d,' % choice + self.opening for choice in choices
        ]
        return b"".join(self._begin(event, choice) for choice in choices)

    def _begin(self, event: Started, choice: int) -> bytes:
        return b""

    @abstractmethod
    def _delta(self, event: TextDelta) -> bytes: ...

    def _tool_call(self, event: ToolCallDone) -> bytes:
        return b""

    def _before_end(self, choice: int) -> bytes:
        return b""

    @abstractmethod
    def _end(self, reason: str) -> Json:
        """The choice of its last chunk, without its index."""

    def _chunk(self, *choices: Json, **more: object) -> bytes:
        return b"data: " + _encode({**self._head, "choices": choices, **more}) + b"\n\n"

    def _finish(self, event: Finished) -> bytes:
        """The last chunk of a choice; the last choice's tells the usage, or one behind it does."""
        choice = {
            "index": event.choice,
            **self._end(finish_reason(event.reason, self._style.form)),
            "stop_reason": stop_reason(event),
        }
        extra = {"reasoning": reasoning_fields(event.reasoning)}
        if not event.is_last:
            return self._chunk(choice, **extra)
        usage = usage_fields(event.usage)
        if self._style.usage_chunk:
            return self._chunk(choice, **extra) + self._chunk(usage=usage)
        return self._chunk(choice, usage=usage, **extra)


class ChatEventWriter(EventWriter):
    """Writes `chat.completion.chunk`s."""

    object_name = "chat.completion.chunk"
    opening = b'"delta":'

    def __init__(self, style: AnswerStyle) -> None:
        super().__init__(style)
        self._thinking_open: set[int] = set()  # choices whose last chunk was one of thinking

    def _begin(self, event: Started, choice: int) -> bytes:
        delta: Json = {"role": "assistant", "content": ""}
        reasoning = {"effort": event.effort, "budget": event.budget_tokens}
        return self._delta_chunk(choice, delta, reasoning=reasoning)

    def _delta(self, event: TextDelta) -> bytes:
        if not self._plain:
            return self._full_delta(event)
        choice = event.choice
        if event.thinking or choice in self._thinking_open:
            delta = _encode(self._delta_fields(event))
        else:
            delta = b'{"content":' + _encode(event.text) + b"}"
        return self._prefixes[choice] + delta + b',"finish_reason":null}]}\n\n'

    def _tool_call(self, event: ToolCallDone) -> bytes:
        delta: Json = {"tool_calls": [tool_call_fields(event)]}
        return self._before_end(event.choice) + self._delta_chunk(event.choice, delta)

    def _before_end(self, choice: int) -> bytes:
        if choice not in self._thinking_open:
            return b""
        self._thinking_open.discard(choice)
        return self._delta_chunk(choice, {"content": [thinking_chunk("", closed=True)]})

    def _delta_chunk(self, choice: int, delta: Json, **more: object) -> bytes:
        return self._chunk({"index": choice, "delta": delta, "finish_reason": None}, **more)

    def _end(self, reason: str) -> Json:
        return {"delta": {"content": ""}, "finish_reason": reason}

    def _delta_fields(self, event: TextDelta) -> Json:
        if event.thinking:
            if self._style.form is ThinkingForm.CHUNKS:
                self._thinking_open.add(event.choice)
                return {"content": [thinking_chunk(event.text)]}
            return {"reasoning_content": event.text, "reasoning": event.text}
        if event.choice in self._thinking_open:
            self._thinking_open.discard(event.choice)
            closed = thinking_chunk("", closed=True)
            return {"content": [closed, {"type": "text", "text": event.text}]}
        return {"content": event.text}

    def _full_delta(self, event: TextDelta) -> bytes:
        choice: Json = {
            "index": event.choice,
            "delta": self._delta_fields(event),
            "finish_reason": None,
        }
        if self._style.logprobs:
            choice["logprobs"] = chat_logprobs(event.logprobs)
        if self._style.token_ids:
            choice["token_ids"] = event.token_ids
        return self._chunk(choice)


class TextEventWriter(EventWriter):
    """Writes streamed `text_completion`s."""

    object_name = "text_completion"
    opening = b'"text":'

    def __init__(self, style: AnswerStyle) -> None:
        super().__init__(style)
        self._num_chars: dict[int, int] = {}  # told yet, by choice

    def _delta(self, event: TextDelta) -> bytes:
        if self._plain:
            text = _encode(event.text)
            return (
                self._prefixes[event.choice]
                + text
                + b',"logprobs":null,"finish_reason":null}]}\n\n'
            )
        choice: Json = {
            "index": event.choice,
            "text": event.text,
            "logprobs": None,
            "finish_reason": None,
        }
        num_chars = self._num_chars.get(event.choice, 0)
        if self._style.logprobs:
            choice["logprobs"] = text_logprobs(event.logprobs, num_chars)
        if self._style.token_ids:
            choice["token_ids"] = event.token_ids
        self._num_chars[event.choice] = num_chars + len(event.text)
        return self._chunk(choice)

    def _end(self, reason: str) -> Json:
        return {"text": "", "logprobs": None, "finish_reason": reason}
