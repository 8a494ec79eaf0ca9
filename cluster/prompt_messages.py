"""Our messages and tools as mistral-common takes them."""

from __future__ import annotations

from collections.abc import Sequence

from mistral_common.protocol.instruct.chunk import (
    ContentChunk,
    ImageChunk,
    TextChunk,
    ThinkChunk,
)
from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall
from mistral_common.protocol.instruct.tool_calls import Tool as CommonTool
from mistral_common.protocol.instruct.tool_calls import ToolCall as CommonToolCall

from ostro.cluster.generation import ChatMessage, Tool
from ostro.cluster.image_encoding import UnreadImage

CommonMessage = SystemMessage | UserMessage | AssistantMessage | ToolMessage


def ends_in_thinking(messages: Sequence[ChatMessage]) -> bool:
    """Whether the prompt ends inside an open thinking block.

    So it does if the last message is a prefix that has thinking, not closed, and no text yet.
    """
    last = messages[-1] if messages else None
    if last is None or not last.prefix or last.text:
        return False
    return bool(last.thinking) and not last.thinking_closed


def common_tool(tool: Tool) -> CommonTool:
    """A tool as the library takes it."""
    return CommonTool(
        function=Function(
            name=tool.name, description=tool.description, parameters=dict(tool.parameters)
        )
    )


def common_message(message: ChatMessage) -> CommonMessage:
    """A message as the library takes it, its images unread."""
    if message.role == "system":
        return SystemMessage(content=message.text)
    if message.role == "user":
        return UserMessage(content=_content(message))
    if message.role == "tool":
        call_id = _common_id(message.tool_call_id or "")
        return ToolMessage(content=_content(message), tool_call_id=call_id)
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


def _content(message: ChatMessage) -> str | list[ContentChunk]:
    """Text with the images at their places in it."""
    if not message.images:
        return message.text
    chunks: list[ContentChunk] = []
    done = 0
    for file in message.images:
        if file.at > done:
            chunks.append(TextChunk(text=message.text[done : file.at]))
        chunks.append(ImageChunk(image=UnreadImage(file)))
        done = file.at
    if message.text[done:]:
        chunks.append(TextChunk(text=message.text[done:]))
    return chunks


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
