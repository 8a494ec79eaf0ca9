"""How a broken stream goes on: a request whose prompt has what was received already.

Servers keep nothing of a stream whose connection broke, so the client asks anew, for each of its
choices by itself, with that choice's seed and what is left of its limits. Draws depend on the seed
and the place in the text alone: the continuation is what the unbroken stream would have said
wherever the text received is tokenized as the model wrote it (it mostly is) and no penalties are
set, which count from the seam on.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Protocol

from ostro.actors.engine.choice_seed import SEED_RANGE, choice_seed
from ostro.protos import generation_pb2 as pb

StreamRequest = pb.StreamChatRequest | pb.StreamGenerateRequest


@dataclass(slots=True)
class Received:
    """What one choice of a stream has brought so far.

    Attributes:
        opens_thinking: Whether thinking begins with its mark; it may be open in the prompt.
        answer: Text, calls excepted.
        token_ids: Of all that came.
        num_thinking_ids: How many of them were thinking, its marks included.
        budget_tokens: The thinking budget that the server told; None is unlimited.
        fits_a_prompt: One thinking, then text, and nothing else.
        num_open_blanks: Blanks at the answer's end that the continuation may say once more.
        is_finished: Nothing is left to come.
    """

    opens_thinking: bool = True
    thinking: str = ""
    answer: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_thinking_ids: int = 0
    budget_tokens: int | None = None
    fits_a_prompt: bool = True
    num_open_blanks: int = 0
    is_finished: bool = False
    _num_thinking_before: int = 0
    _num_thinking_told: int | None = None

    def add(self, delta: pb.Delta) -> None:
        """Take note of the next piece; blanks that were shown already are cut off it."""
        self.token_ids.extend(delta.token_ids)
        if delta.channel == pb.CHANNEL_THINKING:
            # A prompt has thinking before text only.
            self.fits_a_prompt &= not (self.answer and delta.text)
            self.thinking += delta.text
            self.num_thinking_ids += len(delta.token_ids)
            return
        if self.num_open_blanks and delta.text:
            text = delta.text.lstrip(" ")
            num_blanks = min(len(delta.text) - len(text), self.num_open_blanks)
            self.num_open_blanks = 0 if text else self.num_open_blanks - num_blanks
            delta.text = delta.text[num_blanks:]
        self.answer += delta.text

    @property
    def size(self) -> int:
        """Grows with everything that comes."""
        return len(self.token_ids) + len(self.thinking) + len(self.answer)

    @property
    def num_thinking_tokens(self) -> int:
        """Thinking as the server counts it, without its marks; as it told, once it has ended."""
        if self._num_thinking_told is not None:
            return self._num_thinking_told
        num_marks = self.opens_thinking + bool(self.answer)
        return max(self.num_thinking_ids - num_marks, 0)

    def break_off(self) -> None:
        """What comes from now on is of another call, which counts from 0."""
        self._num_thinking_before = self.num_thinking_tokens

    def finish(self, finish: pb.Finish) -> None:
        """Take note of the end, and have it tell the figures of all calls."""
        self.is_finished = True
        if self._num_thinking_before:
            finish.report.thinking_tokens += self._num_thinking_before
        self._num_thinking_told = finish.report.thinking_tokens


def nothing_of(asked: StreamRequest) -> Received:
    """A choice of which nothing has come yet."""
    messages = asked.conversation.messages if isinstance(asked, pb.StreamChatRequest) else ()
    parts = messages[-1].parts if messages and messages[-1].prefix else ()
    is_open = any(p.WhichOneof("part") == "thinking" and not p.thinking.closed for p in parts)
    return Received(opens_thinking=not is_open)


def choice_alone(asked: StreamRequest, choice: int) -> StreamRequest:
    """A request for one choice of several: a copy, in which it is the only and first one."""
    request = copy.copy(asked)
    if choice:
        sampling = request.options.sampling
        sampling.seed = choice_seed(sampling.seed % SEED_RANGE, choice)
    request.options.ClearField("choices")
    return request


class Continue(Protocol):
    """Makes the request that goes on after what was received; None if none can."""

    def __call__(self, asked: StreamRequest, received: Received) -> StreamRequest | None:
        """Leave `asked` as it is."""
        ...


def continued_chat(asked: StreamRequest, received: Received) -> pb.StreamChatRequest | None:
    """The chat with the answer so far as the prefix of its last message."""
    assert isinstance(asked, pb.StreamChatRequest)  # noqa: S101
    if asked.options.HasField("output_format") and received.answer:
        return None  # a grammar begins where the answer does
    request = pb.StreamChatRequest()
    request.CopyFrom(asked)
    if not _shrink_limits(request.options, received):
        return None
    answer = received.answer.rstrip(" ")  # a server would cut them off itself
    received.num_open_blanks = len(received.answer) - len(answer)
    if not (received.thinking or answer):
        return request
    messages = request.conversation.messages
    if not messages or not messages[-1].prefix:
        messages.add(role=pb.ROLE_ASSISTANT, prefix=True)
    if received.thinking:
        messages[-1].parts.add(thinking=pb.Thinking(text=received.thinking, closed=bool(answer)))
    if answer:
        messages[-1].parts.add(text=answer)
    return request


def continued_text(asked: StreamRequest, received: Received) -> pb.StreamGenerateRequest | None:
    """The raw prompt with what came after it: as text, or as token ids if it was token ids."""
    assert isinstance(asked, pb.StreamGenerateRequest)  # noqa: S101
    request = pb.StreamGenerateRequest()
    request.CopyFrom(asked)
    if request.options.HasField("output_format") or not _shrink_limits(request.options, received):
        return None
    if request.WhichOneof("prompt") == "text":
        request.text += received.answer
        return request
    if request.options.stopping.stop:
        return None  # ids have come whose text is held back: a stop string may begin with it
    request.tokens.ids.extend(received.token_ids)
    return request


def _shrink_limits(options: pb.GenerationOptions, received: Received) -> bool:
    """Take what was received off the limits; False if nothing is left."""
    stopping, num_received = options.stopping, len(received.token_ids)
    stopping.min_tokens = max(stopping.min_tokens - num_received, 0)
    if stopping.HasField("max_tokens"):
        if stopping.max_tokens <= num_received:
            return False
        stopping.max_tokens -= num_received
    if received.budget_tokens and received.num_thinking_tokens:
        left = received.budget_tokens - received.num_thinking_tokens
        # Not 0: that would forbid thinking, and what is open must be closed.
        options.reasoning.max_thinking_tokens = max(left, 1)
    return True
