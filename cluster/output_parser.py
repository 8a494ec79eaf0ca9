"""Output tokens to what a caller sees: thinking, answer, tool calls.

Works by token id, never by text: a model that writes "[THINK]" in letters has written text.

    CONTENT --[THINK]--> THINKING --[/THINK]--> CONTENT
    CONTENT or THINKING --[TOOL_CALLS]--> TOOL_NAME --[ARGS] or "{"--> TOOL_ARGS
    TOOL_NAME or TOOL_ARGS --[TOOL_CALLS]--> TOOL_NAME, --[THINK]--> THINKING

A mark that a state does not know is dropped, and so is every other control token.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from ostro.cluster.detokenizer import Detokenizer, TokenTable
from ostro.cluster.generation import ToolCall
from ostro.cluster.prompt import TOOL_NAME, SpecialTokens

_CALL_ID_LETTERS = string.ascii_letters + string.digits
_CALL_ID_LENGTH = 9  # mistral-common's older formats and Mistral's clients take exactly nine


class Channel(Enum):
    """Where a token went: a text, a tool call, or (the token that ends a generation) nowhere."""

    THINKING = auto()
    ANSWER = auto()
    CALL = auto()
    STOP = auto()


class OutputFormat(Enum):
    """Which marks mean something.

    `RAW` knows none; `CHAT` knows thinking; `TOOLS` knows thinking and tool calls. Under `CHAT` a
    tool call comes out as answer text without its control tokens.
    """

    RAW = auto()
    CHAT = auto()
    TOOLS = auto()


class _State(Enum):
    CONTENT = auto()
    THINKING = auto()
    TOOL_NAME = auto()
    TOOL_ARGS = auto()


class _Mark(Enum):
    BEGIN_THINK = auto()
    END_THINK = auto()
    TOOL_CALLS = auto()
    ARGS = auto()


_CHAT_NEXT = {
    (_State.CONTENT, _Mark.BEGIN_THINK): _State.THINKING,
    (_State.THINKING, _Mark.END_THINK): _State.CONTENT,
    (_State.THINKING, _Mark.TOOL_CALLS): _State.CONTENT,
}
_NEXT = {
    OutputFormat.RAW: {},
    OutputFormat.CHAT: _CHAT_NEXT,
    OutputFormat.TOOLS: _CHAT_NEXT
    | {
        (_State.CONTENT, _Mark.TOOL_CALLS): _State.TOOL_NAME,
        (_State.THINKING, _Mark.TOOL_CALLS): _State.TOOL_NAME,
        (_State.TOOL_NAME, _Mark.ARGS): _State.TOOL_ARGS,
        (_State.TOOL_NAME, _Mark.TOOL_CALLS): _State.TOOL_NAME,
        (_State.TOOL_NAME, _Mark.BEGIN_THINK): _State.THINKING,
        (_State.TOOL_ARGS, _Mark.TOOL_CALLS): _State.TOOL_NAME,
        (_State.TOOL_ARGS, _Mark.BEGIN_THINK): _State.THINKING,
    },
}


@dataclass(slots=True)
class ParsedStep:
    """What some tokens brought.

    Attributes:
        channels: One per token that was taken; none for those after a stop string.
        matched_stop: The stop string that the answer ran into; it is not in `answer`.
    """

    thinking: str = ""
    answer: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    channels: list[Channel] = field(default_factory=list)
    matched_stop: str | None = None

    def add(self, later: ParsedStep) -> None:
        """Join what came after; `later` took no tokens."""
        self.thinking += later.thinking
        self.answer += later.answer
        self.calls += later.calls
        self.matched_stop = later.matched_stop


class StopMatcher:
    """Finds the first stop string in a growing text, and holds back what may become one.

    The first is the one whose last character comes first; of several that end there, the longest.
    Work per character is constant for each stop string (Knuth-Morris-Pratt).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._fallbacks = [_fallbacks(stop) for stop in self._stops]
        self._lengths = [0] * len(self._stops)  # characters of each stop that the text ends with
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that can be shown by now, and the stop string that was found, if one was."""
        if not self._stops:
            return text, None
        for index, character in enumerate(text):
            found = self._advance(character)
            if found:
                shown = self.flush() + text[: index + 1]
                return shown[: len(shown) - len(found)], found
        text = self._held + text
        num_shown = len(text) - max(self._lengths)
        self._held = text[num_shown:]
        return text[:num_shown], None

    def flush(self) -> str:
        """What was held back: no stop string after all. The next text begins afresh."""
        held, self._held = self._held, ""
        self._lengths = [0] * len(self._stops)
        return held

    def _advance(self, character: str) -> str:
        found = ""
        for index, stop in enumerate(self._stops):
            length = self._lengths[index]
            while length and stop[length] != character:
                length = self._fallbacks[index][length - 1]
            length += stop[length] == character
            self._lengths[index] = length
            if length == len(stop) > len(found):
                found = stop
        return found


def _fallbacks(stop: str) -> list[int]:
    """For each prefix of `stop`: the length of its longest proper suffix that is a prefix too."""
    lengths = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = lengths[length - 1]
        length += stop[index] == stop[length]
        lengths[index] = length
    return lengths


class OutputParser:
    """One generation's output, token by token.

    Tool calls come out whole, when the next mark or the end closes them; one without a proper name
    or whose arguments are no JSON object comes out as answer text. Stop strings are looked for in
    the answer alone, not over a thinking block or a call, and not in the first `min_tokens` tokens.

    Args:
        starts_in_thinking: The prompt ends inside an open thinking block.
    """

    def __init__(
        self,
        table: TokenTable,
        special: SpecialTokens,
        output_format: OutputFormat,
        *,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        starts_in_thinking: bool = False,
    ) -> None:
        self._table = table
        self._next = _NEXT[output_format]
        self._marks = {special.tool_calls: _Mark.TOOL_CALLS, special.arguments: _Mark.ARGS}
        if special.begin_think is not None and special.end_think is not None:
            self._marks[special.begin_think] = _Mark.BEGIN_THINK
            self._marks[special.end_think] = _Mark.END_THINK
        self._state = _State.THINKING if starts_in_thinking else _State.CONTENT
        self._detokenizer = Detokenizer(table)
        self._stops = StopMatcher(stop)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._name: list[str] = []
        self._arguments: list[str] = []

    def feed(self, token_ids: Sequence[int]) -> ParsedStep:
        """Take the tokens of one step; those after a stop string are left out."""
        step = ParsedStep()
        for token_id in token_ids:
            self._num_tokens += 1
            step.channels.append(self._take(token_id, step))
            if step.matched_stop is not None:
                break
        return step

    def finish(self) -> ParsedStep:
        """What was held back. Not to be called after a stop string was found."""
        step = ParsedStep()
        self._leave(step, _State.CONTENT)
        return step

    def _take(self, token_id: int, step: ParsedStep) -> Channel:
        mark = self._marks.get(token_id)
        if mark is not None:
            self._move(mark, step)
            is_thinking = mark in (_Mark.BEGIN_THINK, _Mark.END_THINK)
            return Channel.THINKING if is_thinking else Channel.CALL
        if self._table.is_special(token_id):
            return Channel.ANSWER
        return self._append(self._detokenizer.push(token_id), step)

    def _move(self, mark: _Mark, step: ParsedStep) -> None:
        state = self._next.get((self._state, mark))
        if state is not None:
            self._leave(step, state)
            self._state = state

    def _leave(self, step: ParsedStep, state: _State) -> None:
        self._append(self._detokenizer.flush(), step)
        if self._state is _State.CONTENT:
            step.answer += self._stops.flush()
        elif self._state in (_State.TOOL_NAME, _State.TOOL_ARGS) and state is not _State.TOOL_ARGS:
            self._end_call(step)

    def _append(self, text: str, step: ParsedStep) -> Channel:
        if self._state is _State.THINKING:
            step.thinking += text
            return Channel.THINKING
        if self._state is _State.CONTENT:
            self._append_answer(text, step)
            return Channel.ANSWER
        if self._state is _State.TOOL_NAME and "{" in text:
            name, text = text.split("{", 1)
            self._name.append(name)
            self._state, text = _State.TOOL_ARGS, "{" + text
        (self._name if self._state is _State.TOOL_NAME else self._arguments).append(text)
        return Channel.CALL

    def _append_answer(self, text: str, step: ParsedStep) -> None:
        if self._num_tokens > self._min_tokens:
            text, step.matched_stop = self._stops.push(text)
        step.answer += text

    def _end_call(self, step: ParsedStep) -> None:
        name, arguments = "".join(self._name), "".join(self._arguments)
        self._name, self._arguments = [], []
        if TOOL_NAME.fullmatch(name.strip()) and _is_json_object(arguments):
            call = ToolCall(call_id=_call_id(), name=name.strip(), arguments=arguments.strip())
            step.calls.append(call)
        else:
            step.answer += name + arguments


def _call_id() -> str:
    return "".join(secrets.choice(_CALL_ID_LETTERS) for _ in range(_CALL_ID_LENGTH))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _is_json_object(text: str) -> bool:
    try:  # numbers stay text: an integer of thousands of digits is valid JSON, yet int() refuses it
        value = json.loads(text, parse_constant=_refuse_constant, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict)
