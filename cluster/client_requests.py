"""Builds the requests of both clients from what a caller would like to write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from ostro.actors.errors import InvalidRequestError
from ostro.protos import generation_pb2 as pb

_PREFIX = "REASONING_EFFORT_"


class Asked(TypedDict, total=False):
    """What can be asked of a generation by name; all else is in `options`.

    Attributes:
        effort: "none", "minimal", "low", "medium", "high", "xhigh" or "max".
        max_thinking_tokens: 0 forbids thinking.
        max_tokens: Thinking and answer together.
        stop: Strings that end the answer, or one.
        json_schema: The answer is JSON of this schema.
        prediction: What the answer will mostly be, such as a file that it edits: it comes sooner
            then where the deployment drafts, and never differently.
        options: Taken first; what is given by name overrides it.
        request_id: To act on the generation while it runs; made up if it is left out.
        model: The served one if it is left out.
    """

    effort: str
    max_thinking_tokens: int
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: str | Sequence[str]
    json_schema: str | Mapping[str, Any]
    prediction: str
    options: pb.GenerationOptions
    request_id: str
    model: str


_PLACES = {
    "max_thinking_tokens": "reasoning",
    "max_tokens": "stopping",
    "temperature": "sampling",
    "top_p": "sampling",
    "seed": "sampling",
}
Messages = str | Sequence[pb.Message] | pb.Conversation
Prompt = str | Sequence[int]


def system(text: str) -> pb.Message:
    """A system message."""
    return pb.Message(role=pb.ROLE_SYSTEM, parts=[pb.Part(text=text)])


def user(text: str, *, images: Sequence[bytes] = ()) -> pb.Message:
    """A user's message; `images` are files (PNG, JPEG, WebP, GIF) that stand before the text."""
    parts = [pb.Part(image=pb.Image(data=data)) for data in images]
    return pb.Message(role=pb.ROLE_USER, parts=[*parts, pb.Part(text=text)])


def assistant(
    text: str, *, thinking: str = "", tool_calls: Sequence[pb.ToolCall] = ()
) -> pb.Message:
    """An earlier answer, as it is replayed; thinking should be, the model expects it."""
    message = pb.Message(role=pb.ROLE_ASSISTANT, tool_calls=tool_calls)
    if thinking:
        message.parts.add(thinking=pb.Thinking(text=thinking, closed=True))
    if text:
        message.parts.add(text=text)
    return message


def tool_result(call: pb.ToolCall, text: str) -> pb.Message:
    """What a tool gave, for the call that asked for it."""
    return pb.Message(role=pb.ROLE_TOOL, parts=[pb.Part(text=text)], tool_call_id=call.id)


def tool(name: str, description: str, parameters: str | Mapping[str, Any]) -> pb.Tool:
    """A tool on offer; `parameters` is its JSON Schema, as a mapping or as JSON text."""
    return pb.Tool(name=name, description=description, parameters=_json_text(parameters))


def text_of(message: pb.Message) -> str:
    """A message's text."""
    return "".join(part.text for part in message.parts)


def thinking_of(message: pb.Message) -> str:
    """The thinking that stands before an answer's text."""
    return "".join(part.thinking.text for part in message.parts)


def chat_request(messages: Messages, tools: Sequence[pb.Tool], asked: Asked) -> pb.ChatRequest:
    """A request for `Chat`. Raises what `options_of` does."""
    return pb.ChatRequest(**_fields(messages, tools, asked))


def stream_chat_request(
    messages: Messages, tools: Sequence[pb.Tool], asked: Asked
) -> pb.StreamChatRequest:
    """A request for `StreamChat`. Raises what `options_of` does."""
    return pb.StreamChatRequest(**_fields(messages, tools, asked))


def stream_generate_request(prompt: Prompt, asked: Asked) -> pb.StreamGenerateRequest:
    """A request for `StreamGenerate`. Raises what `options_of` does."""
    request = pb.StreamGenerateRequest(
        model=asked.get("model", ""),
        request_id=asked.get("request_id", ""),
        options=options_of(asked),
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.tokens.ids.extend(prompt)
        request.tokens.SetInParent()
    return request


def tokenize_request(
    text: str | Messages, tools: Sequence[pb.Tool], effort: str | None
) -> pb.TokenizeRequest:
    """A request for `Tokenize`: of plain text, or of a conversation."""
    request = pb.TokenizeRequest()
    if effort is not None:
        _set(request, "effort", effort_number(effort))
    if isinstance(text, str):
        request.text = text
    else:
        request.conversation.CopyFrom(conversation_of(text, tools))
    return request


def conversation_of(messages: Messages, tools: Sequence[pb.Tool] = ()) -> pb.Conversation:
    """A conversation; a plain string is one message of the user."""
    if isinstance(messages, str):
        messages = (user(messages),)
    if not isinstance(messages, pb.Conversation):
        return pb.Conversation(messages=messages, tools=tools)
    conversation = pb.Conversation()
    conversation.CopyFrom(messages)
    conversation.tools.extend(tools)
    return conversation


def options_of(asked: Asked) -> pb.GenerationOptions:
    """The options of a request.

    Raises:
        InvalidRequestError: No such option, or a value that its field cannot hold; `param` names
            it.
    """
    for name in asked.keys() - Asked.__annotations__.keys():
        names = ", ".join(Asked.__annotations__)
        raise InvalidRequestError(f"{name}: no such option; there are {names}", param=name)
    options = pb.GenerationOptions()
    if "options" in asked:
        options.CopyFrom(asked["options"])
    for name, place in _PLACES.items():
        value = asked.get(name)
        if value is not None:
            _set(getattr(options, place), name, value)
    if asked.get("prediction") is not None:
        _set(options, "prediction", asked["prediction"])
    if asked.get("effort") is not None:
        _set(options.reasoning, "effort", effort_number(asked["effort"]))
    stop = asked.get("stop")
    if stop is not None:
        options.stopping.stop[:] = [stop] if isinstance(stop, str) else stop
    if asked.get("json_schema") is not None:
        options.output_format.json_schema = _json_text(asked["json_schema"])
    return options


def effort_number(name: str) -> int:
    """The proto's number of an effort.

    Raises:
        InvalidRequestError: There is no such effort.
    """
    try:
        return pb.ReasoningEffort.Value(f"{_PREFIX}{name.upper()}")
    except ValueError:
        names = ", ".join(effort_name(number) for number in pb.ReasoningEffort.values() if number)
        raise InvalidRequestError(
            f"effort {name!r}: must be one of {names}", code="unsupported_value", param="effort"
        ) from None


def effort_name(number: int) -> str:
    """Our name of a proto effort; empty if unspecified."""
    if number == pb.REASONING_EFFORT_UNSPECIFIED:
        return ""
    return pb.ReasoningEffort.Name(number).removeprefix(_PREFIX).lower()


def _fields(messages: Messages, tools: Sequence[pb.Tool], asked: Asked) -> dict[str, Any]:
    return {
        "model": asked.get("model", ""),
        "request_id": asked.get("request_id", ""),
        "conversation": conversation_of(messages, tools),
        "options": options_of(asked),
    }


def _set(place: object, name: str, value: object) -> None:
    try:
        setattr(place, name, value)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"{name} {value!r}: {error}", param=name) from None


def _json_text(schema: str | Mapping[str, Any]) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema)
