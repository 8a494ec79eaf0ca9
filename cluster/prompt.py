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
from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.request import ChatCompletionRequest, ReasoningEffort
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.base import (
    SpecialTokenPolicy,
    Tokenized,
    TokenizerVersion,
)
from mistral_common.tokens.tokenizers.base import SpecialTokens as Names
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from ostro.actors.engine.request import ImageInput
from ostro.actors.engine.vocabulary import FILE_NAME
from ostro.actors.errors import InvalidRequestError
from ostro.cluster.detokenizer import TokenTable
from ostro.cluster.generation import ChatMessage, Tool
from ostro.cluster.image_encoding import OneByOneEncoder
from ostro.cluster.image_inputs import image_inputs
from ostro.cluster.images import check_images, no_vision
from ostro.cluster.prompt_messages import common_message, common_tool
from ostro.configs.deployment import ServingConfig
from ostro.configs.errors import ConfigError
from ostro.configs.reasoning import ReasoningConfig
from ostro.configs.vision import VisionConfig

TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

_IMAGES_IN_TOOL_RESULTS = TokenizerVersion.v15
_OLDEST = TokenizerVersion.v13  # since v13 a tool call is [TOOL_CALLS]name[ARGS]json, without ids
_MAY_FOLLOW = {
    "system": {"system", "user", "assistant"},
    "user": {"system", "user", "assistant"},
    "assistant": {"user", "assistant", "tool"},
    "tool": {"user", "assistant", "tool"},
}

_Tokenizer = MistralTokenizer[UserMessage, AssistantMessage, ToolMessage, SystemMessage, Tokenized]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads: tokens, and the images that stand among them."""

    token_ids: list[int]
    images: tuple[ImageInput, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Ids of the control tokens that serving needs; no `begin_think`, no thinking."""

    bos: int
    eos: int
    tool_calls: int
    arguments: int
    begin_think: int | None
    end_think: int | None


class PromptBuilder:
    """The tokenizer of one checkpoint. Thread-safe.

    Attributes:
        model_dir: Holds its file.
        special: Ids of control tokens.
        table: Bytes of every token.
        closing_token_ids: What is forced when a thinking budget ends: the configured phrase and
            `[/THINK]`; empty if the tokenizer knows no thinking.
    """

    def __init__(
        self, model_dir: Path, reasoning: ReasoningConfig, serving: ServingConfig | None = None
    ) -> None:
        """Load the tokenizer.

        Args:
            model_dir: Holds its file.
            reasoning: The effort table.
            serving: Limits of images; None takes the defaults.

        Raises:
            ConfigError: The file is missing, broken or older than v13, or it declares none of the
                prompt values that the effort table asks for.
        """
        self.model_dir = Path(model_dir)
        self._path = self.model_dir / FILE_NAME
        self._tokenizer = _load(self._path)
        self._tekken = _tekkenizer(self._tokenizer, self._path)
        self._serving = ServingConfig() if serving is None else serving
        instruct = self._tokenizer.instruct_tokenizer
        if instruct.image_encoder is not None:
            instruct.image_encoder = OneByOneEncoder(instruct.image_encoder, self._serving)
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

    @property
    def takes_images(self) -> bool:
        """Whether the tokenizer knows how images stand in a prompt."""
        return self._tekken.image is not None

    def serves_images(self, vision: VisionConfig | None) -> bool:
        """Whether a checkpoint with this tower takes images.

        Raises:
            ConfigError: The tokenizer makes images ready for another tower.
        """
        image = self._tekken.image
        if image is None or vision is None:
            return False
        side = image.image_patch_size * image.spatial_merge_size
        image_token_id = self._tekken.get_special_token(Names.img.value)
        if (
            side != vision.token_side()
            or image_token_id != vision.image_token_id
            or image.max_image_size > vision.longest_side()
        ):
            raise ConfigError(
                f"{self._path}: an image token is id {image_token_id} for squares of {side} pixels "
                f"in images of up to {image.max_image_size}; config.json says id "
                f"{vision.image_token_id}, {vision.token_side()} and {vision.longest_side()}: they "
                f"do not belong together"
            )
        return True

    def chat(self, messages: Sequence[ChatMessage], tools: Sequence[Tool], effort: str) -> Prompt:
        """The prompt for the next assistant turn.

        Args:
            messages: The conversation; earlier thinking and tool calls are replayed.
            tools: The tools on offer.
            effort: One of `configs.reasoning.EFFORTS`.

        Raises:
            InvalidRequestError: `param` is "messages", "tools", or the place of a message or image.
        """
        self.check(messages, tools)
        if self.special.begin_think is None and any(message.thinking for message in messages):
            raise _refused("this model knows no thinking: leave it out of the messages")
        try:
            request = ChatCompletionRequest(
                model="served",  # the library's strict mode wants some name
                messages=[common_message(message) for message in messages],
                tools=[common_tool(tool) for tool in tools] or None,
                reasoning_effort=self._prompt_values[effort],
            )
            tokenized = self._tokenizer.encode_chat_completion(request)
        except InvalidRequestError:
            raise  # of an image
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
        return Prompt(list(tokenized.tokens), self._placed_images(tokenized))

    def check(self, messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> None:
        """Refuse what can make no prompt, before images are fetched and read. Raises as `chat`."""
        _check_conversation(messages)
        _check_tools(tools)
        self._check_images(messages)

    def text(self, text: str, *, add_bos: bool = True, field: str = "prompt") -> list[int]:
        """Token ids of plain text; names of control tokens in it stay plain text.

        Raises:
            InvalidRequestError: The tokenizer cannot take the text; `param` is `field`.
        """
        if not _is_unicode(text):
            raise InvalidRequestError(f"{field} is not valid Unicode text", param=field)
        try:
            return self._tekken.encode(text, bos=add_bos, eos=False)
        except ValueError as error:
            raise InvalidRequestError(
                f"{field} cannot be tokenized: very long runs of blanks are beyond the tokenizer",
                param=field,
            ) from error

    def _check_images(self, messages: Sequence[ChatMessage]) -> None:
        """Refuse images where the tokenizer has no place for them."""
        with_images = [message for message in messages if message.images]
        if not with_images:
            return
        if not self.takes_images:
            raise no_vision(with_images[0])
        check_images(messages, self._serving)
        tools = [message.images[0] for message in with_images if message.role == "tool"]
        if tools and self._tekken.version < _IMAGES_IN_TOOL_RESULTS:
            raise InvalidRequestError(
                f"{tools[0].where}: this model takes no image in a tool's result: put it in a user "
                f"message",
                code="unsupported_value",
                param=tools[0].where,
            )

    def _placed_images(self, tokenized: Tokenized) -> tuple[ImageInput, ...]:
        if not tokenized.images:
            return ()
        return image_inputs(
            tokenized.tokens,
            tokenized.images,
            image_token_id=self._tekken.get_special_token(Names.img.value),
            end_token_id=self._tekken.get_special_token(Names.img_end.value),
        )

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


def _refused_at(where: str, why: str) -> InvalidRequestError:
    return InvalidRequestError(f"{where}: {why}", param=where)


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
    where = ""
    for index, message in enumerate(messages):
        where = message.where or f"messages[{index}]"
        _check_message(message, where, is_last=index == last)
        if previous is not None and message.role not in _MAY_FOLLOW[previous]:
            raise _refused_at(where, f"role {message.role!r} may not follow role {previous!r}")
        if message.role == "tool":
            if message.tool_call_id not in waiting:
                raise _refused_at(where, "tool_call_id answers no open tool call")
            waiting.discard(message.tool_call_id)
        elif waiting:
            raise _refused_at(where, "a tool call before this message has no result")
        waiting |= {call.call_id for call in message.tool_calls}
        previous = message.role
    if waiting:
        raise _refused_at(where, "a tool call has no result")
    if previous == "assistant" and (last == 0 or not messages[last].prefix):
        raise _refused_at(
            where,
            "the last message is the assistant's; end with a user or tool message, or set prefix "
            "to continue it",
        )


def _check_message(message: ChatMessage, where: str, *, is_last: bool) -> None:
    if message.role not in _MAY_FOLLOW:
        raise _refused_at(where, f"role must be one of {sorted(_MAY_FOLLOW)}")
    if not _is_unicode(message.text) or not _is_unicode(message.thinking or ""):
        raise _refused_at(where, "the content is not valid Unicode text")
    if message.role == "tool" and not message.tool_call_id:
        raise _refused_at(where, "tool_call_id is missing")
    if message.role != "assistant":
        return
    if not (message.text or message.thinking or message.tool_calls):
        raise _refused_at(where, "an assistant message needs content, thinking or tool calls")
    if message.prefix and not is_last:
        raise _refused_at(where, "only the last message can be a prefix")
    call_ids = [call.call_id for call in message.tool_calls]
    if not all(call_ids) or len(set(call_ids)) != len(call_ids):
        raise _refused_at(where, "tool calls need ids, each of its own")
    if not all(TOOL_NAME.fullmatch(call.name) for call in message.tool_calls):
        raise _refused_at(where, "a tool call's name must be 1 to 64 of a-z, A-Z, 0-9, _ and -")
