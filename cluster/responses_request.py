"""From the bodies of `responses_schema` to the requests of `generation`.

The dialect is served without memory: a caller sends the whole conversation each time. What would
need stored answers, or tools that the server runs, is refused by name.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import replace

from ostro.actors.errors import InvalidRequestError
from ostro.cluster.generation import (
    AnswerFormat,
    ChatGeneration,
    Constraint,
    GenerationOptions,
    Tool,
    ToolChoice,
)
from ostro.cluster.openai_request import sampling_options
from ostro.cluster.refusals import present, refuse
from ostro.cluster.responses_conversation import conversation_messages
from ostro.cluster.responses_schema import (
    LOGPROBS,
    FlatTool,
    InputTokensRequest,
    ResponsesRequest,
)

_NOT_STORED = "nothing is stored: send the whole conversation in input"


def chat_generation(body: ResponsesRequest) -> ChatGeneration:
    """The conversation and its options, with a request id, which is the response's.

    Raises:
        InvalidRequestError: A field makes no sense or is not served; `param` names it.
    """
    if body.background:
        refuse("background", "no answer is made in the background: use stream")
    if body.store:
        refuse("store", "answers are not stored")
    if body.moderation is not None:
        refuse("moderation", "not served")
    chat = prompted_chat(body)
    options = replace(
        sampling_options(body),
        request_id=body.request_id or f"resp_{uuid.uuid4().hex}",
        effort=chat.options.effort,
        answer_format=chat.options.answer_format,
        thinking_token_budget=body.thinking_token_budget,
        max_tokens=body.max_output_tokens,
        num_logprobs=_num_logprobs(body),
    )
    return replace(chat, options=options)


def prompted_chat(body: InputTokensRequest) -> ChatGeneration:
    """What decides the prompt: the conversation, the tools, the effort, the answer's form.

    Raises:
        InvalidRequestError: A field makes no sense or is not served; `param` names it.
    """
    for name in ("previous_response_id", "conversation", "prompt"):
        if getattr(body, name) is not None:
            refuse(name, _NOT_STORED)
    if body.truncation not in (None, "disabled"):
        refuse("truncation", "only 'disabled' is served: what is too long is refused")
    tools, choice = _tools(body)
    return ChatGeneration(
        model=body.model,
        messages=conversation_messages(body.instructions, body.input),
        tools=tools,
        tool_choice=choice,
        options=GenerationOptions(
            effort=None if body.reasoning is None else body.reasoning.effort,
            answer_format=_answer_format(body),
        ),
    )


def _num_logprobs(body: ResponsesRequest) -> int | None:
    if LOGPROBS in (body.include or ()):
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequestError(
            f"top_logprobs needs {LOGPROBS!r} in include", param="top_logprobs"
        )
    return None


def _answer_format(body: InputTokensRequest) -> AnswerFormat | None:
    where = "text.format"
    asked = None if body.text is None else body.text.format
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return AnswerFormat(constraint=Constraint.JSON_OBJECT, where=where)
    if asked.type != "json_schema":
        refuse(f"{where}.type", "must be 'text', 'json_object' or 'json_schema'")
    schema = json.dumps(present(asked.json_schema, f"{where}.schema"), ensure_ascii=False)
    return AnswerFormat(constraint=Constraint.JSON_SCHEMA, text=schema, where=where)


def _tools(body: InputTokensRequest) -> tuple[tuple[Tool, ...], ToolChoice]:
    """The tools on offer and how they are to be used; tools that are not allowed are left out."""
    tools = tuple(_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools or ()))
    names = {tool.name for tool in tools}
    asked = "auto" if body.tool_choice is None else body.tool_choice
    choice = ToolChoice(parallel=body.parallel_tool_calls is not False)
    if isinstance(asked, str):
        choice = replace(choice, mode=_mode(asked, "tool_choice", ("auto", "none", "required")))
    elif asked.get("type") == "function":
        name = _name_on_offer(asked, names, "tool_choice")
        choice = replace(choice, mode="required", name=name)
    elif asked.get("type") == "allowed_tools":
        choice = replace(
            choice, mode=_mode(asked.get("mode"), "tool_choice.mode", ("auto", "required"))
        )
        allowed = _allowed(asked, names)
        tools = tuple(tool for tool in tools if tool.name in allowed)
    else:
        refuse("tool_choice", "only types 'function' and 'allowed_tools' are served")
    if choice.mode == "required" and not tools:
        raise InvalidRequestError("tool_choice: there is no tool to call", param="tool_choice")
    return tools, choice


def _tool(tool: FlatTool, path: str) -> Tool:
    if tool.type != "function":
        refuse(path, "only tools of type 'function' are served: the server runs none itself")
    return Tool(
        name=present(tool.name, f"{path}.name"),
        description=tool.description or "",
        parameters=tool.parameters or {},
        strict=bool(tool.strict),
        where=f"{path}.parameters",
    )


def _mode(asked: object, where: str, known: tuple[str, ...]) -> str:
    if asked not in known:
        shown = ", ".join(map(repr, known))
        raise InvalidRequestError(f"{where}: must be one of {shown}", param=where)
    return str(asked)


def _allowed(asked: dict[str, object], names: set[str]) -> set[str]:
    where = "tool_choice.tools"
    listed = asked.get("tools")
    if not isinstance(listed, list) or not listed:
        raise InvalidRequestError(f"{where}: must list the tools", param=where)
    return {_name_on_offer(tool, names, f"{where}[{i}]") for i, tool in enumerate(listed)}


def _name_on_offer(asked: object, names: set[str], where: str) -> str:
    if not isinstance(asked, dict) or asked.get("type") != "function":
        refuse(where, "only functions can be named")
    name = asked.get("name")
    if not isinstance(name, str) or name not in names:
        raise InvalidRequestError(f"{where}.name: no such tool is on offer", param=f"{where}.name")
    return name
