"""From the bodies of `messages_schema` to the requests of `generation`.

One message of the dialect may become several of ours: a user's tool results are messages of the
tool. Says by name what is not served, so that nothing a caller asked for is dropped in silence.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ostro.actors.errors import InvalidRequestError
from ostro.cluster.generation import (
    AnswerFormat,
    ChatGeneration,
    ChatMessage,
    Constraint,
    GenerationOptions,
    ImageFile,
    Tool,
    ToolCall,
    ToolChoice,
)
from ostro.cluster.images import image_of_uri
from ostro.cluster.messages_schema import (
    Block,
    CountTokensRequest,
    CustomTool,
    ImageSource,
    MessageIn,
    MessagesRequest,
)
from ostro.cluster.openai_request import short_call_id
from ostro.cluster.refusals import present, refuse

CALL_ID_PREFIX = "toolu_"

_THINKING_EFFORT = "high"  # what the dialect takes for granted where thinking is asked for
_TOOL_CHOICES = {"auto": "auto", "none": "none", "any": "required", "tool": "required"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reasoning:
    """What `thinking` and `output_config.effort` come to; None is the server's default."""

    effort: str | None = None
    budget_tokens: int | None = None
    is_omitted: bool = False


def message_generation(body: MessagesRequest) -> ChatGeneration:
    """The conversation and its options.

    Raises:
        InvalidRequestError: A field makes no sense or is not served; `param` names it.
    """
    asked = reasoning(body)
    return ChatGeneration(
        model=body.model,
        messages=conversation(body),
        tools=tools_on_offer(body.tools or ()),
        tool_choice=_tool_choice(body),
        options=GenerationOptions(
            request_id=f"msg_{uuid.uuid4().hex}",
            effort=asked.effort,
            thinking_token_budget=asked.budget_tokens,
            omit_thinking=asked.is_omitted,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            max_tokens=body.max_tokens,
            stop=tuple(body.stop_sequences or ()),
            answer_format=_answer_format(body),
        ),
    )


def conversation(body: CountTokensRequest) -> tuple[ChatMessage, ...]:
    """The system prompt and the messages.

    Raises:
        InvalidRequestError: A block is incomplete or not served; `param` is its place.
    """
    messages = []
    if body.system:
        messages.append(_system_message(body.system, "system"))
    last = len(body.messages) - 1
    for i, message in enumerate(body.messages):
        where = f"messages[{i}]"
        if message.role == "system":
            messages.append(_system_message(message.content, f"{where}.content"))
        elif message.role == "assistant":
            messages.append(_assistant_message(message, where, is_last=i == last))
        else:
            messages += _user_messages(message, where)
    return tuple(messages)


def tools_on_offer(tools: Sequence[CustomTool]) -> tuple[Tool, ...]:
    """The tools that the caller runs; Anthropic's own are refused."""
    offered = []
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        if tool.type not in (None, "custom"):
            kind = str(tool.type)[:40]
            refuse(where, f"{kind!r} is a tool of Anthropic's: only custom tools are served")
        where = f"{where}.input_schema"
        offered.append(
            Tool(
                name=tool.name,
                description=tool.description or "",
                parameters=present(tool.input_schema, where),
                strict=bool(tool.strict),
                where=where,
            )
        )
    return tuple(offered)


def reasoning(body: CountTokensRequest) -> Reasoning:
    """The effort and the budget that a body asks for.

    Raises:
        InvalidRequestError: `thinking.budget_tokens` is missing or no budget.
    """
    effort = body.output_config.effort if body.output_config is not None else None
    thinking = body.thinking
    if thinking is None:
        return Reasoning(effort=effort)
    if thinking.type == "disabled":
        return Reasoning(effort="none")
    budget = None
    if thinking.type == "enabled":
        where = "thinking.budget_tokens"
        budget = present(thinking.budget_tokens, where)
        if budget < 1:
            raise InvalidRequestError(f"{where} must be a whole number of at least 1", param=where)
    return Reasoning(
        effort=effort or _THINKING_EFFORT,
        budget_tokens=budget,
        is_omitted=thinking.display == "omitted",
    )


@dataclass(slots=True)
class _Content:
    """Text and images of blocks, joined as the model's own format joins them: without a blank."""

    text: str = ""
    images: list[ImageFile] = field(default_factory=list)

    def add(self, block: Block, where: str) -> None:
        if block.type == "text":
            self.text += present(block.text, f"{where}.text")
        elif block.type == "image":
            source = present(block.source, f"{where}.source")
            self.images.append(_image(source, where, at=len(self.text)))
        else:
            refuse(where, f"blocks of type {block.type[:40]!r} are not served in this place")

    def message(self, role: str, where: str) -> ChatMessage:
        return ChatMessage(role=role, text=self.text, images=tuple(self.images), where=where)


def _blocks(content: str | Sequence[Block], where: str) -> Iterable[tuple[Block, str]]:
    """The blocks of a content, each with its place."""
    if isinstance(content, str):
        return [(Block(type="text", text=content), where)]
    return [(block, f"{where}[{j}]") for j, block in enumerate(content)]


def _system_message(content: str | Sequence[Block], where: str) -> ChatMessage:
    texts = []
    for block, place in _blocks(content, where):
        if block.type != "text":
            refuse(place, "a system prompt is of text blocks")
        texts.append(present(block.text, f"{place}.text"))
    return ChatMessage(role="system", text="\n\n".join(texts), where=where)


def _user_messages(message: MessageIn, where: str) -> Iterable[ChatMessage]:
    """The results among the blocks, and the text and images between them."""
    said: _Content | None = None
    for block, place in _blocks(message.content, f"{where}.content"):
        if block.type != "tool_result":
            said = said or _Content()
            said.add(block, place)
            continue
        if said is not None:
            yield said.message("user", where)
            said = None
        yield _tool_message(block, place)
    if said is not None or not message.content:
        yield (said or _Content()).message("user", where)


def _tool_message(block: Block, where: str) -> ChatMessage:
    call_id = present(block.tool_use_id, f"{where}.tool_use_id")
    # The model's format has no place for a failure but the text.
    result = _Content("Error: " if block.is_error else "")
    for inner, place in _blocks(block.content or "", f"{where}.content"):
        result.add(inner, place)
    return ChatMessage(
        role="tool",
        text=result.text,
        images=tuple(result.images),
        tool_call_id=_call_id(call_id),
        where=where,
    )


def _assistant_message(message: MessageIn, where: str, *, is_last: bool) -> ChatMessage:
    said = _Content()
    thinking: list[str] = []
    calls: list[ToolCall] = []
    for block, place in _blocks(message.content, f"{where}.content"):
        if block.type == "thinking":
            thinking.append(present(block.thinking, f"{place}.thinking"))
        elif block.type == "redacted_thinking":
            continue  # sealed by another server: nobody here can read it
        elif block.type == "tool_use":
            calls.append(_tool_call(block, place))
        else:
            said.add(block, place)
    return ChatMessage(
        role="assistant",
        text=said.text,
        images=tuple(said.images),
        thinking="".join(thinking) or None,
        thinking_closed=True,
        tool_calls=tuple(calls),
        prefix=is_last and not calls,
        where=where,
    )


def _tool_call(block: Block, where: str) -> ToolCall:
    return ToolCall(
        call_id=_call_id(present(block.id, f"{where}.id")),
        name=present(block.name, f"{where}.name"),
        arguments=json.dumps(present(block.input, f"{where}.input"), ensure_ascii=False),
    )


def _call_id(call_id: str) -> str:
    return short_call_id(call_id.removeprefix(CALL_ID_PREFIX))


def _image(source: ImageSource, where: str, *, at: int) -> ImageFile:
    if source.type == "url":
        return image_of_uri(present(source.url, f"{where}.source.url"), where, at=at)
    if source.type != "base64":
        kind = source.type[:40]
        refuse(where, f"images of source {kind!r} are not served: send type 'base64'")
    return ImageFile(data=present(source.data, f"{where}.source.data"), where=where, at=at)


def _tool_choice(body: MessagesRequest) -> ToolChoice:
    choice = body.tool_choice
    if choice is None:
        return ToolChoice()
    name = present(choice.name, "tool_choice.name") if choice.type == "tool" else None
    return ToolChoice(
        mode=_TOOL_CHOICES[choice.type], name=name, parallel=not choice.disable_parallel_tool_use
    )


def _answer_format(body: MessagesRequest) -> AnswerFormat | None:
    if body.output_config is None or body.output_config.format is None:
        return None
    return AnswerFormat(
        constraint=Constraint.JSON_SCHEMA,
        text=json.dumps(body.output_config.format.schema_, ensure_ascii=False),
        where="output_config.format",
    )
