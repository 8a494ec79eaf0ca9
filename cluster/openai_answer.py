"""Generation events gathered into one JSON answer of the OpenAI dialect."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from ostro.actors.errors import OstroError
from ostro.cluster.generation import (
    Finished,
    GenerationEvent,
    Started,
    TextDelta,
    TokenText,
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


@dataclass(slots=True)
class WholeAnswer:
    """Gathers events until they can be told as one JSON object."""

    style: AnswerStyle
    started: Started | None = None
    finished: Finished | None = None
    thinking: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    calls: list[Json] = field(default_factory=list)
    logprobs: list[TokenText] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    def add(self, event: GenerationEvent) -> None:
        """Take the next event."""
        if isinstance(event, TextDelta):
            (self.thinking if event.thinking else self.text).append(event.text)
            self.logprobs.extend(event.logprobs)
            self.token_ids.extend(event.token_ids)
        elif isinstance(event, ToolCallDone):
            self.calls.append(tool_call_fields(event))
        elif isinstance(event, Started):
            self.started = event
        else:
            self.finished = event

    def chat_body(self) -> bytes:
        """A `chat.completion`."""
        choice: Json = {"index": 0, "message": self._message()}
        choice["logprobs"] = chat_logprobs(self.logprobs) if self.style.logprobs else None
        return self._body("chat.completion", choice)

    def text_body(self) -> bytes:
        """A `text_completion`."""
        choice: Json = {"index": 0, "text": "".join(self.text)}
        choice["logprobs"] = text_logprobs(self.logprobs, 0) if self.style.logprobs else None
        return self._body("text_completion", choice)

    def _message(self) -> Json:
        thinking, text = "".join(self.thinking), "".join(self.text)
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        if not text and self.calls:
            message["content"] = None
        if self.calls:
            message["tool_calls"] = self.calls
        if thinking and self.style.form is ThinkingForm.CHUNKS:
            answer = [{"type": "text", "text": text}] if text else []
            message["content"] = [thinking_chunk(thinking, closed=True), *answer]
        elif thinking:
            message["reasoning_content"] = message["reasoning"] = thinking
        return message

    def _body(self, object_name: str, choice: Json) -> bytes:
        started, finished = self.started, self.finished
        if started is None or finished is None:
            raise OstroError("the generation ended without its first or last event")
        choice["finish_reason"] = finish_reason(finished.reason, self.style.form)
        choice["stop_reason"] = stop_reason(finished)
        if self.style.token_ids:
            choice["token_ids"] = self.token_ids
        return _encode(
            {
                **head(started, object_name),
                "choices": [choice],
                "usage": usage_fields(finished.usage),
                "reasoning": reasoning_fields(finished.reasoning),
            }
        )
