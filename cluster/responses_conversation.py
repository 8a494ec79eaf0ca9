"""The items of /v1/responses as the messages of a conversation.

What one assistant's turn is to the model (thinking, then text, then calls) is an item each in
this dialect: items that follow each other in this order are one message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ostro.actors.errors import InvalidRequestError
from ostro.cluster.generation import ChatMessage, ImageFile, ToolCall
from ostro.cluster.images import image_of_uri
from ostro.cluster.openai_request import short_call_id
from ostro.cluster.refusals import present, refuse
from ostro.cluster.responses_schema import InputItem, ItemPart

_TEXT_TYPES = ("input_text", "output_text", "reasoning_text", "text")


def conversation_messages(
    instructions: str | None, items: str | Sequence[InputItem] | None
) -> tuple[ChatMessage, ...]:
    """The messages that instructions and input amount to; each knows its place among the items.

    Raises:
        InvalidRequestError: Nothing to answer, or an item that is not served; `param` names it.
    """
    if not items:
        raise InvalidRequestError("input is missing: there is nothing to answer", param="input")
    conversation = _Conversation()
    if instructions is not None:
        conversation.add(ChatMessage(role="system", text=instructions, where="instructions"))
    if isinstance(items, str):
        conversation.add(ChatMessage(role="user", text=items, where="input"))
    else:
        for i, item in enumerate(items):
            conversation.add_item(item, f"input[{i}]")
    return conversation.messages()


@dataclass(slots=True)
class _Turn:
    """An assistant's message as its items come."""

    where: str
    thinking: list[str] = field(default_factory=list)
    text: str | None = None
    calls: list[ToolCall] = field(default_factory=list)

    def message(self) -> ChatMessage:
        return ChatMessage(
            role="assistant",
            text=self.text or "",
            thinking="".join(self.thinking) or None,
            tool_calls=tuple(self.calls),
            where=self.where,
        )


class _Conversation:
    """Messages in the making; the last assistant's turn stays open until another item ends it."""

    def __init__(self) -> None:
        self._messages: list[ChatMessage] = []
        self._turn: _Turn | None = None

    def messages(self) -> tuple[ChatMessage, ...]:
        self._end_turn()
        return tuple(self._messages)

    def add(self, message: ChatMessage) -> None:
        self._end_turn()
        self._messages.append(message)

    def add_item(self, item: InputItem, path: str) -> None:
        if item.type in (None, "message"):
            self._add_message(item, path)
        elif item.type == "reasoning":
            self._add_thinking(item, path)
        elif item.type == "function_call":
            self._add_call(item, path)
        elif item.type == "function_call_output":
            self._add_result(item, path)
        elif item.type == "item_reference":
            refuse(path, "nothing is stored: send the item itself")
        else:
            refuse(path, f"items of type {(item.type or '')[:40]!r} are not served")

    def _add_message(self, item: InputItem, path: str) -> None:
        asked_role = present(item.role, f"{path}.role")
        text, images = _content(item.content, f"{path}.content")
        if asked_role != "assistant":
            role = "system" if asked_role == "developer" else asked_role
            self.add(ChatMessage(role=role, text=text, images=images, where=path))
            return
        if images:
            refuse(images[0].where, "an assistant's message has no images")
        turn = self._turn
        if turn is None or turn.text is not None or turn.calls:
            turn = self._begin_turn(path)
        turn.text = text

    def _add_thinking(self, item: InputItem, path: str) -> None:
        if not item.content:  # only a summary, or what another server encrypted
            return
        text, _ = _content(item.content, f"{path}.content")
        turn = self._turn
        if turn is None or turn.text is not None or turn.calls:
            turn = self._begin_turn(path)
        turn.thinking.append(text)

    def _add_call(self, item: InputItem, path: str) -> None:
        call = ToolCall(
            call_id=short_call_id(present(item.call_id, f"{path}.call_id")),
            name=present(item.name, f"{path}.name"),
            arguments=present(item.arguments, f"{path}.arguments"),
        )
        turn = self._turn or self._begin_turn(path)
        turn.calls.append(call)

    def _add_result(self, item: InputItem, path: str) -> None:
        call_id = short_call_id(present(item.call_id, f"{path}.call_id"))
        text, images = _content(item.output, f"{path}.output")
        self.add(
            ChatMessage(role="tool", text=text, images=images, tool_call_id=call_id, where=path)
        )

    def _begin_turn(self, where: str) -> _Turn:
        self._end_turn()
        self._turn = _Turn(where)
        return self._turn

    def _end_turn(self) -> None:
        if self._turn is not None:
            self._messages.append(self._turn.message())
            self._turn = None


def _content(
    content: str | Sequence[ItemPart] | None, path: str
) -> tuple[str, tuple[ImageFile, ...]]:
    """Text and images of an item."""
    if isinstance(content, str):
        return content, ()
    text: list[str] = []
    images: list[ImageFile] = []
    num_chars = 0
    for j, part in enumerate(present(content, path)):
        where = f"{path}[{j}]"
        if part.type == "input_image":
            images.append(image_of_uri(_image_url(part, where), where, at=num_chars))
        else:
            text.append(_part_text(part, where))
            num_chars += len(text[-1])
    return "".join(text), tuple(images)


def _image_url(part: ItemPart, where: str) -> str:
    if part.file_id is not None:
        refuse(f"{where}.file_id", "no files are stored: send the image in image_url")
    return present(part.image_url, f"{where}.image_url")


def _part_text(part: ItemPart, where: str) -> str:
    name = "refusal" if part.type == "refusal" else "text"
    if name == "text" and part.type not in _TEXT_TYPES:
        refuse(where, f"parts of type {part.type[:40]!r} are not served")
    return present(part.refusal if name == "refusal" else part.text, f"{where}.{name}")
