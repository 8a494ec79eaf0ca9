"""A conversation with a cluster over gRPC: its turns, thinking included, and what each one brought.

Knows no terminal: text goes to a callback as it comes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

from ostro.cluster.client import Client
from ostro.cluster.client_requests import Asked, assistant, effort_name, system, user
from ostro.cluster.client_streams import Event
from ostro.protos import generation_pb2

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

    def __init__(self, client: Client, options: ChatOptions) -> None:
        self._client = client
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
        asked = user(question, images=self._attached)
        self._attached = []
        turn = self._stream([*self._messages, asked], show)
        if turn.answer:
            self._messages += [asked, assistant(turn.answer, thinking=turn.thinking)]
        return turn

    def _stream(self, messages: list[generation_pb2.Message], show: Show) -> Turn:
        options, turn = self.options, Turn()
        asked = Asked()
        if options.effort is not None:
            asked["effort"] = options.effort
        if options.max_tokens is not None:
            asked["max_tokens"] = options.max_tokens
        if options.system:
            messages = [system(options.system), *messages]
        with closing(self._client.stream_chat(messages, tools=options.tools, **asked)) as events:
            try:
                for event in events:
                    _take(event, turn, show)
            except KeyboardInterrupt:
                turn.is_cancelled = True
        return turn


def _take(event: Event, turn: Turn, show: Show) -> None:
    match event:
        case generation_pb2.Started():
            turn.effort = effort_name(event.reasoning.effort)
        case generation_pb2.Delta():
            is_thinking = event.channel == generation_pb2.CHANNEL_THINKING
            if is_thinking:
                turn.thinking += event.text
            else:
                turn.answer += event.text
            show(event.text, is_thinking)
        case generation_pb2.ToolCallDone():
            turn.calls.append(event.call)
        case generation_pb2.Finish():
            turn.finish = event
        case generation_pb2.Ended():
            turn.usage = event.usage
            turn.total_s = event.timing.total.ToMicroseconds() / 1e6
            if event.timing.HasField("first_token"):
                turn.first_s = event.timing.first_token.ToMicroseconds() / 1e6
