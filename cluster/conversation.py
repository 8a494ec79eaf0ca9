"""A conversation with a cluster over gRPC: its turns, thinking included, and what each one brought.

Knows no terminal: text goes to a callback as it comes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from ostro.actors.errors import OstroError
from ostro.cluster.cli_connection import named_error
from ostro.protos import generation_pb2, generation_pb2_grpc

_ENDED_BY = {
    generation_pb2.ReasoningReport.ENDED_BY_BUDGET: "cut by its budget",
    generation_pb2.ReasoningReport.ENDED_BY_CALLER: "ended by you",
}
_CUT_SHORT = {
    generation_pb2.FINISH_REASON_LENGTH: "max tokens reached",
    generation_pb2.FINISH_REASON_MODEL_LENGTH: "context full",
    generation_pb2.FINISH_REASON_CANCELLED: "cancelled",
    generation_pb2.FINISH_REASON_ERROR: "failed",
}

Show = Callable[[str, bool], None]


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What a user chose for every turn; None leaves it to the server."""

    effort: str | None = None
    max_tokens: int | None = None
    system: str | None = None
    tools: tuple[generation_pb2.Tool, ...] = ()


@dataclass(slots=True)
class Turn:
    """What one question brought.

    Attributes:
        effort: What the server made of the asked effort.
        first_s: Seconds to the first token; None if none came.
        total_s: Seconds to the last. Both are the server's, which no burst on the way can bend.
    """

    thinking: str = ""
    answer: str = ""
    calls: list[generation_pb2.ToolCall] = field(default_factory=list)
    effort: str = ""
    first_s: float | None = None
    total_s: float = 0.0
    is_cancelled: bool = False
    finish: generation_pb2.Finish = field(default_factory=generation_pb2.Finish)
    usage: generation_pb2.Usage = field(default_factory=generation_pb2.Usage)

    def tokens_per_second(self) -> float | None:
        """Speed after the first token."""
        tokens = self.usage.completion_tokens - 1
        if self.first_s is None or tokens < 1 or self.total_s <= self.first_s:
            return None
        return tokens / (self.total_s - self.first_s)

    def summary(self) -> str:
        """One line for people."""
        usage, report = self.usage, self.finish.report
        parts = [f"{usage.prompt_tokens} prompt"]
        if usage.cached_prompt_tokens:
            parts[0] += f" ({usage.cached_prompt_tokens} cached)"
        if usage.image_tokens:
            parts[0] += f" ({usage.image_tokens} of images)"
        parts[0] += f" + {usage.completion_tokens} tokens"
        if usage.thinking_tokens:
            ended = _ENDED_BY.get(report.ended_by)
            parts.append(f"{usage.thinking_tokens} thinking" + (f", {ended}" if ended else ""))
        if self.effort:
            parts.append(f"effort {self.effort}")
        speed = self.tokens_per_second()
        if speed is not None:
            parts.append(f"{speed:.1f} tok/s, first after {self.first_s:.2f} s")
        if self.finish.reason in _CUT_SHORT:
            parts.append(_CUT_SHORT[self.finish.reason])
        return ", ".join(parts)


class Conversation:
    """The turns so far, thinking included, and the way to the next one."""

    def __init__(self, channel: grpc.Channel, url: str, options: ChatOptions) -> None:
        self._stub = generation_pb2_grpc.GenerationServiceStub(channel)
        self._url = url
        self.options = options
        self._messages: list[generation_pb2.Message] = []
        self._attached: list[bytes] = []

    def reset(self) -> None:
        """Forget all turns, and what is attached to the next one."""
        self._messages = []
        self._attached = []

    def attach(self, image: bytes) -> None:
        """Show an image file with the next question, whatever becomes of that."""
        self._attached.append(image)

    def ask(self, question: str, show: Show) -> Turn:
        """Stream one answer; Ctrl-C cancels it and gives what came so far.

        A turn without an answer (cancelled or cut while it thought) is not kept.

        Args:
            question: The user's text.
            show: Told every piece of text, and whether it is thinking.

        Raises:
            OstroError: The server refused or failed, or nothing answers.
        """
        images = [
            generation_pb2.Part(image=generation_pb2.Image(data=data)) for data in self._attached
        ]
        self._attached = []
        text = generation_pb2.Part(text=question)
        asked = _message(generation_pb2.ROLE_USER, *images, text)
        turn = self._stream([*self._messages, asked], show)
        if turn.answer:
            self._messages += [asked, _answer_message(turn)]
        return turn

    def _stream(self, messages: list[generation_pb2.Message], show: Show) -> Turn:
        turn = Turn()
        call = self._stub.StreamChat(self._request(messages))
        try:
            for event in call:
                _take(event, turn, show)
        except KeyboardInterrupt:
            call.cancel()
            turn.is_cancelled = True
        except grpc.RpcError as error:
            raise named_error(error, self._url) from None
        return turn

    def _request(self, messages: list[generation_pb2.Message]) -> generation_pb2.StreamChatRequest:
        options = generation_pb2.GenerationOptions()
        if self.options.effort is not None:
            name = f"REASONING_EFFORT_{self.options.effort.upper()}"
            options.reasoning.MergeFrom(generation_pb2.ReasoningOptions(effort=name))
        if self.options.max_tokens is not None:
            options.stopping.max_tokens = self.options.max_tokens
        if self.options.system:
            text = generation_pb2.Part(text=self.options.system)
            messages = [_message(generation_pb2.ROLE_SYSTEM, text), *messages]
        conversation = generation_pb2.Conversation(messages=messages, tools=self.options.tools)
        return generation_pb2.StreamChatRequest(conversation=conversation, options=options)


def _take(event: generation_pb2.StreamChatResponse, turn: Turn, show: Show) -> None:
    match event.WhichOneof("event"):
        case "started":
            turn.effort = effort_name(event.started.reasoning.effort)
        case "delta":
            is_thinking = event.delta.channel == generation_pb2.CHANNEL_THINKING
            if is_thinking:
                turn.thinking += event.delta.text
            else:
                turn.answer += event.delta.text
            show(event.delta.text, is_thinking)
        case "tool_call":
            turn.calls.append(event.tool_call.call)
        case "finish":
            turn.finish = event.finish
        case "ended":
            timing = event.ended.timing
            turn.usage = event.ended.usage
            turn.total_s = timing.total.ToMicroseconds() / 1e6
            if timing.HasField("first_token"):
                turn.first_s = timing.first_token.ToMicroseconds() / 1e6
        case "failure":
            raise OstroError(event.failure.message, code=event.failure.reason.lower())


def effort_name(value: generation_pb2.ReasoningEffort) -> str:
    """Our name of a proto effort; empty if unspecified."""
    if value == generation_pb2.REASONING_EFFORT_UNSPECIFIED:
        return ""
    return generation_pb2.ReasoningEffort.Name(value).removeprefix("REASONING_EFFORT_").lower()


def _message(role: generation_pb2.Role, *parts: generation_pb2.Part) -> generation_pb2.Message:
    return generation_pb2.Message(role=role, parts=parts)


def _answer_message(turn: Turn) -> generation_pb2.Message:
    parts = [generation_pb2.Part(text=turn.answer)]
    if turn.thinking:
        thinking = generation_pb2.Thinking(text=turn.thinking, closed=True)
        parts.insert(0, generation_pb2.Part(thinking=thinking))
    return _message(generation_pb2.ROLE_ASSISTANT, *parts)
