"""Conversations to token ids, by mistral-common and the checkpoint's own tekken.json.

The one place that knows the chat format on the way in (`output_parser` knows it on the way out).
What the library refuses becomes an InvalidRequestError in our words; a tokenizer file that cannot
serve is a ConfigError at start.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mistral_common.exceptions import InvalidToolSchemaException, MistralCommonException
from mistral_common.protocol.instruct.chunk import ContentChunk, TextChunk, ThinkChunk
from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.request import ChatCompletionRequest, ReasoningEffort
from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall
from mistral_common.protocol.instruct.tool_calls import Tool as CommonTool
from mistral_common.protocol.instruct.tool_calls import ToolCall as CommonToolCall
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.base import (
    SpecialTokenPolicy,
    Tokenized,
    TokenizerVersion,
)
from mistral_common.tokens.tokenizers.base import SpecialTokens as Names
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from ostro.actors.errors import InvalidRequestError
from ostro.cluster.detokenizer import TokenTable
from ostro.cluster.generation import ChatMessage, Tool
from ostro.configs.deployment import ReasoningConfig
from ostro.configs.errors import ConfigError

FILE_NAME = "tekken.json"
TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

_OLDEST = TokenizerVersion.v13  # since v13 a tool call is [TOOL_CALLS]name[ARGS]json, without ids
_MAY_FOLLOW = {
    "system": {"system", "user", "assistant"},
    "user": {"system", "user", "assistant"},
    "assistant": {"user", "assistant", "tool"},
    "tool": {"user", "assistant", "tool"},
}

_Message = SystemMessage | UserMessage | AssistantMessage | ToolMessage
_Tokenizer = MistralTokenizer[UserMessage, AssistantMessage, ToolMessage, SystemMessage, Tokenized]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Ids of the control tokens that serving needs; no `begin_think`, no thinking."""

    bos: int
    eos: int
    tool_calls: int
    arguments: int
    begin_think: int | None
    end_think: int | None


def ends_in_thinking(messages: Sequence[ChatMessage]) -> bool:
    """Whether the prompt ends inside an open thinking block.

    So it does if the last message is a prefix that has thinking, not closed, and no text yet.
    """
    last = messages[-1] if messages else None
    if last is None or not last.prefix or last.text:
        return False
    return bool(last.thinking) and not last.thinking_closed


class PromptBuilder:
    """The tokenizer of one checkpoint. Thread-safe.

    Attributes:
        special: Ids of control tokens.
        table: Bytes of every token.
        closing_token_ids: What is forced when a thinking budget ends: the configured phrase and
            `[/THINK]`; empty if the tokenizer knows no thinking.
    """

    def __init__(self, model_dir: Path, reasoning: ReasoningConfig) -> None:
        """Load the tokenizer.

        Raises:
            ConfigError: The file is missing, broken or older than v13, or it declares none of the
                prompt values that the effort table asks for.
        """
        self._path = Path(model_dir) / FILE_NAME
        self._tokenizer = _load(self._path)
        self._tekken = _tekkenizer(self._tokenizer, self._path)
        self.special = self._find_special()
        self.table = TokenTable(
            [
                self._tekken.id_to_byte_piece(token_id, SpecialTokenPolicy.KEEP)
                for token_id in range(self._tekken.n_words)
            ],
            self._tekken.num_special_tokens,
        )
        self._prompt_values = self._map_efforts(reasoning)
        self.closing_token_ids: tuple[int, ...] = ()
        if self.special.end_think is not None:
            phrase = self._tekken.encode(reasoning.closing_phrase, bos=False, eos=False)
            self.closing_token_ids = (*phrase, self.special.end_think)

    def chat(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool], effort: str
    ) -> list[int]:
        """Token ids of the prompt for the next assistant turn.

        Args:
            messages: The conversation; earlier thinking and tool calls are replayed.
            tools: The tools on offer.
            effort: One of `configs.deployment.EFFORTS`.

        Raises:
            InvalidRequestError: `param` is "messages" or "tools"; the text names the message.
        """
        _check_conversation(messages)
        _check_tools(tools)
        if self.special.begin_think is None and any(message.thinking for message in messages):
            raise _refused("this model knows no thinking: leave it out of the messages")
        try:
            request = ChatCompletionRequest(
                model="served",  # the library's strict mode wants some name
                messages=[_message(message) for message in messages],
                tools=[_tool(tool) for tool in tools] or None,
                reasoning_effort=self._prompt_values[effort],
            )
            return list(self._tokenizer.encode_chat_completion(request).tokens)
        except InvalidToolSchemaException as error:
            raise InvalidRequestError(
                "tools: the parameters of a tool are no valid JSON Schema", param="tools"
            ) from error
        except (MistralCommonException, ValueError, AssertionError, RecursionError) as error:
            # ValueError: also tiktoken's answer to a run of a million blanks
            raise _refused(
                "these messages cannot be written as a prompt; very long runs of blanks and very "
                "deep JSON are beyond the tokenizer"
            ) from error

    def text(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Token ids of plain text; names of control tokens in it stay plain text.

        Raises:
            InvalidRequestError: The tokenizer cannot take the text; `param` is "prompt".
        """
        if not _is_unicode(text):
            raise InvalidRequestError("prompt is not valid Unicode text", param="prompt")
        try:
            return self._tekken.encode(text, bos=add_bos, eos=False)
        except ValueError as error:
            raise InvalidRequestError(
                "prompt cannot be tokenized: very long runs of blanks are beyond the tokenizer",
                param="prompt",
            ) from error

    def _find_special(self) -> SpecialTokens:
        thinks = all(self._tekken.is_special(n.value) for n in (Names.begin_think, Names.end_think))
        find = self._tekken.get_special_token
        return SpecialTokens(
            bos=self._tekken.bos_id,
            eos=self._tekken.eos_id,
            tool_calls=find(Names.tool_calls.value),
            arguments=find(Names.args.value),
            begin_think=find(Names.begin_think.value) if thinks else None,
            end_think=find(Names.end_think.value) if thinks else None,
        )

    def _map_efforts(self, reasoning: ReasoningConfig) -> dict[str, ReasoningEffort | None]:
        """Effort -> value in the prompt: its own name if declared, else the table's value."""
        settings = self._tekken.model_settings_builder
        if settings is None or settings.reasoning_effort is None:
            return dict.fromkeys(reasoning.efforts)
        declared = [str(value) for value in settings.reasoning_effort.values]
        mapped: dict[str, ReasoningEffort | None] = {}
        for effort, row in reasoning.efforts.items():
            value = effort if effort in declared else row.prompt_value
            if value not in declared:
                raise ConfigError(
                    f"{self._path}: the tokenizer declares the efforts {declared}, but "
                    f"reasoning.efforts.{effort}.prompt_value is {value!r}"
                )
            mapped[effort] = ReasoningEffort(value)
        return mapped


def _load(path: Path) -> _Tokenizer:
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such file; a checkpoint carries its tokenizer in {FILE_NAME}"
        )
    try:
        return MistralTokenizer.from_file(path, mode=ValidationMode.serving)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise ConfigError(f"{path}: not a Tekken tokenizer ({type(error).__name__})") from error
    except MistralCommonException as error:
        raise ConfigError(f"{path}: not a Tekken tokenizer ({error.message})") from error


def _tekkenizer(tokenizer: _Tokenizer, path: Path) -> Tekkenizer:
    tekken = tokenizer.instruct_tokenizer.tokenizer
    if not isinstance(tekken, Tekkenizer):
        raise ConfigError(f"{path}: not a Tekken tokenizer")
    if tekken.version < _OLDEST:
        raise ConfigError(
            f"{path}: tokenizer version {tekken.version.value} is too old; {_OLDEST.value} or "
            f"newer is served (Mistral Small 4 has v15)"
        )
    if tekken.version.supports_model_settings and tekken.model_settings_builder is None:
        raise ConfigError(
            f"{path}: model_settings_builder is missing, which version {tekken.version.value} needs"
        )
    return tekken


def _refused(text: str) -> InvalidRequestError:
    return InvalidRequestError(text, param="messages")


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON escapes can smuggle in."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_tools(tools: Sequence[Tool]) -> None:
    for index, tool in enumerate(tools):
        if not TOOL_NAME.fullmatch(tool.name):
            raise InvalidRequestError(
                f"tools[{index}]: the name must be 1 to 64 of a-z, A-Z, 0-9, _ and -", param="tools"
            )


def _check_conversation(messages: Sequence[ChatMessage]) -> None:
    """Refuse what makes no conversation, with the place in the text."""
    if not messages:
        raise _refused("messages: at least one message is needed")
    last = len(messages) - 1
    waiting: set[str] = set()  # calls whose results have not come
    previous: str | None = None
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        _check_message(message, where, is_last=index == last)
        if previous is not None and message.role not in _MAY_FOLLOW[previous]:
            raise _refused(f"{where}: role {message.role!r} may not follow role {previous!r}")
        if message.role == "tool":
            if message.tool_call_id not in waiting:
                raise _refused(f"{where}: tool_call_id answers no open tool call")
            waiting.discard(message.tool_call_id)
        elif waiting:
            raise _refused(f"{where}: a tool call before this message has no result")
        waiting |= {call.call_id for call in message.tool_calls}
        previous = message.role
    if waiting:
        raise _refused(f"messages[{last}]: a tool call has no result")
    if previous == "assistant" and (last == 0 or not messages[last].prefix):
        raise _refused(
            f"messages[{last}]: the last message is the assistant's; end with a user or tool "
            f"message, or set prefix to continue it"
        )


def _check_message(message: ChatMessage, where: str, *, is_last: bool) -> None:
    if message.role not in _MAY_FOLLOW:
        raise _refused(f"{where}: role must be one of {sorted(_MAY_FOLLOW)}")
    if not _is_unicode(message.text) or not _is_unicode(message.thinking or ""):
        raise _refused(f"{where}: the content is not valid Unicode text")
    if message.role == "tool" and not message.tool_call_id:
        raise _refused(f"{where}: tool_call_id is missing")
    if message.role != "assistant":
        return
    if not (message.text or message.thinking or message.tool_calls):
        raise _refused(f"{where}: an assistant message needs content, thinking or tool calls")
    if message.prefix and not is_last:
        raise _refused(f"{where}: only the last message can be a prefix")
    call_ids = [call.call_id for call in message.tool_calls]
    if not all(call_ids) or len(set(call_ids)) != len(call_ids):
        raise _refused(f"{where}: tool calls need ids, each of its own")
    if not all(TOOL_NAME.fullmatch(call.name) for call in message.tool_calls):
        raise _refused(f"{where}: a tool call's name must be 1 to 64 of a-z, A-Z, 0-9, _ and -")


def _tool(tool: Tool) -> CommonTool:
    return CommonTool(
        function=Function(
            name=tool.name, description=tool.description, parameters=dict(tool.parameters)
        )
    )


def _message(message: ChatMessage) -> _Message:
    if message.role == "system":
        return SystemMessage(content=message.text)
    if message.role == "user":
        return UserMessage(content=message.text)
    if message.role == "tool":
        return ToolMessage(
            content=message.text, tool_call_id=_common_id(message.tool_call_id or "")
        )
    calls = [
        CommonToolCall(
            id=_common_id(call.call_id),
            function=FunctionCall(name=call.name, arguments=call.arguments),
        )
        for call in message.tool_calls
    ]
    return AssistantMessage(
        content=_assistant_content(message), tool_calls=calls or None, prefix=message.prefix
    )


def _assistant_content(message: ChatMessage) -> str | list[ContentChunk] | None:
    if not message.thinking:
        return message.text or None
    is_closed = not ends_in_thinking([message])
    chunks: list[ContentChunk] = [ThinkChunk(thinking=message.thinking, closed=is_closed)]
    if message.text:
        chunks.append(TextChunk(text=message.text))
    return chunks


def _common_id(call_id: str) -> str:
    """Any id, in a form that the library takes ("null" it would not); ids are never written out."""
    return f"call {call_id}"
