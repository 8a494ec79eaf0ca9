"""Generation events gathered into one JSON answer of the OpenAI dialect."""

from __future__ import annotations

from abc import ABC, abstractmethod
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
    whole_reasoning,
)

_encode = msgspec.json.Encoder().encode


@dataclass(slots=True)
class _Choice:
    """What one choice has brought so far."""

    thinking: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    calls: list[Json] = field(default_factory=list)
    logprobs: list[TokenText] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finished: Finished | None = None

    def message(self, form: ThinkingForm) -> Json:
        thinking, text = "".join(self.thinking), "".join(self.text)
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        if not text and self.calls:
            message["content"] = None
        if self.calls:
            message["tool_calls"] = self.calls
        if thinking and form is ThinkingForm.CHUNKS:
            answer = [{"type": "text", "text": text}] if text else []
            message["content"] = [thinking_chunk(thinking, closed=True), *answer]
        elif thinking:
            message["reasoning_content"] = message["reasoning"] = thinking
        return message


class WholeAnswer(ABC):
    """Gathers events until they can be told as one JSON object."""

    object_name = ""

    def __init__(self, style: AnswerStyle) -> None:
        self._style = style
        self._started: Started | None = None
        self._choices: list[_Choice] = []
        self._last: Finished | None = None

    def add(self, event: GenerationEvent) -> None:
        """Take the next event."""
        if isinstance(event, Started):
            self._started = event
            self._choices = [_Choice() for _ in range(event.num_choices)]
            return
        choice = self._choices[event.choice]
        if isinstance(event, TextDelta):
            (choice.thinking if event.thinking else choice.text).append(event.text)
            choice.logprobs.extend(event.logprobs)
            choice.token_ids.extend(event.token_ids)
        elif isinstance(event, ToolCallDone):
            choice.calls.append(tool_call_fields(event))
        else:
            choice.finished = event
            self._last = event if event.is_last else None

    @abstractmethod
    def _brought(self, choice: _Choice) -> Json:
        """What a choice came to, and its logprobs."""

    def body(self) -> bytes:
        """The whole answer.

        Raises:
            OstroError: It has no beginning, or a choice of it no end.
        """
        started, last = self._started, self._last
        if started is None or last is None:
            raise OstroError("the generation ended without its first or last event")
        choices, reports = [], []
        for index, choice in enumerate(self._choices):
            finished = choice.finished
            if finished is None:
                raise OstroError(f"the generation ended without the end of choice {index}")
            reports.append(finished.reasoning)
            fields = {
                "index": index,
                **self._brought(choice),
                "finish_reason": finish_reason(finished.reason, self._style.form),
                "stop_reason": stop_reason(finished),
                "reasoning": reasoning_fields(finished.reasoning),
            }
            if self._style.token_ids:
                fields["token_ids"] = choice.token_ids
            choices.append(fields)
        return _encode(
            {
                **head(started, self.object_name),
                "choices": choices,
                "usage": usage_fields(last.usage),
                "reasoning": whole_reasoning(reports),
            }
        )


class WholeChat(WholeAnswer):
    """A `chat.completion`."""

    object_name = "chat.completion"

    def _brought(self, choice: _Choice) -> Json:
        logprobs = chat_logprobs(choice.logprobs) if self._style.logprobs else None
        return {"message": choice.message(self._style.form), "logprobs": logprobs}


class WholeText(WholeAnswer):
    """A `text_completion`."""

    object_name = "text_completion"

    def _brought(self, choice: _Choice) -> Json:
        logprobs = text_logprobs(choice.logprobs, 0) if self._style.logprobs else None
        return {"text": "".join(choice.text), "logprobs": logprobs}
