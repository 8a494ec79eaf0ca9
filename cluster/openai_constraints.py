"""What the OpenAI dialect says of an answer's form and of the tools it calls.

`response_format` is OpenAI's and Mistral's, `structured_outputs` vLLM's.
"""

from __future__ import annotations

import json

from ostro.cluster.generation import AnswerFormat, Constraint, Tool, ToolChoice
from ostro.cluster.openai_schema import (
    ChatCompletionRequest,
    CompletionFields,
    ResponseFormat,
    StructuredOutputs,
)
from ostro.cluster.refusals import refuse

_MODES = {"auto": "auto", "none": "none", "required": "required", "any": "required"}
_KNOWN_MODES = "must be 'auto', 'none', 'required', 'any', a function or allowed_tools"


def answer_format(body: CompletionFields) -> AnswerFormat | None:
    """The form that the answer must have; None leaves it free.

    Raises:
        InvalidRequestError: A form that is not known, or two of them; `param` names the field.
    """
    response = None if body.response_format is None else _response_format(body.response_format)
    if body.structured_outputs is None:
        return response
    if response is not None:
        refuse("structured_outputs", "does not go with response_format: send one of them")
    return _structured_outputs(body.structured_outputs)


def tool_choice(body: ChatCompletionRequest) -> ToolChoice:
    """Which tools the answer may or must call.

    Raises:
        InvalidRequestError: A choice that is not known; `param` is "tool_choice".
    """
    choice = "auto" if body.tool_choice is None else body.tool_choice
    parallel = body.parallel_tool_calls is not False
    if isinstance(choice, str):
        if choice not in _MODES:
            refuse("tool_choice", _KNOWN_MODES)
        return ToolChoice(mode=_MODES[choice], parallel=parallel)
    if choice.get("type", "function") == "function":
        return ToolChoice(mode="required", name=_function_name(choice), parallel=parallel)
    mode = _allowed(choice).get("mode")
    if mode not in ("auto", "required"):
        refuse("tool_choice.allowed_tools.mode", "must be 'auto' or 'required'")
    return ToolChoice(mode=str(mode), parallel=parallel)


def allowed_tools(body: ChatCompletionRequest, tools: tuple[Tool, ...]) -> tuple[Tool, ...]:
    """The tools on offer; those that `tool_choice` does not allow are left out.

    Raises:
        InvalidRequestError: It allows what is not on offer; `param` is "tool_choice".
    """
    choice = body.tool_choice
    if not isinstance(choice, dict) or choice.get("type", "function") == "function":
        return tools
    allowed = _allowed(choice).get("tools")
    if not isinstance(allowed, list) or not allowed:
        refuse("tool_choice.allowed_tools.tools", "must be a list of functions")
    names = {_function_name(function) for function in allowed}
    unknown = sorted(names - {tool.name for tool in tools})
    if unknown:
        refuse("tool_choice.allowed_tools.tools", f"{unknown[0][:100]!r} is not on offer")
    return tuple(tool for tool in tools if tool.name in names)


def _allowed(choice: dict[str, object]) -> dict[str, object]:
    allowed = choice.get("allowed_tools")
    if choice["type"] != "allowed_tools" or not isinstance(allowed, dict):
        refuse("tool_choice", _KNOWN_MODES)
    return allowed


def _function_name(choice: object) -> str:
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        refuse("tool_choice", "a function is named by {'type': 'function', 'function': {'name'}}")
    return name


def _response_format(response: ResponseFormat) -> AnswerFormat | None:
    if response.type == "text":
        return None
    if response.type == "json_object":
        return AnswerFormat(constraint=Constraint.JSON_OBJECT)
    if response.type != "json_schema":
        refuse("response_format.type", "must be 'text', 'json_object' or 'json_schema'")
    where = "response_format.json_schema.schema"
    if response.json_schema is None or response.json_schema.schema_ is None:
        refuse(where, "is missing")
    return _json_schema(response.json_schema.schema_, where)


def _structured_outputs(asked: StructuredOutputs) -> AnswerFormat:
    path = "structured_outputs"
    for name, value in (asked.model_extra or {}).items():
        if value not in (None, False):  # vLLM's client sends its defaults along
            refuse(f"{path}.{name[:100]}", "not served")
    found: list[AnswerFormat] = []
    if asked.json_ is not None:
        found.append(_json_schema(asked.json_, f"{path}.json"))
    if asked.regex is not None:
        where = f"{path}.regex"
        found.append(AnswerFormat(constraint=Constraint.REGEX, text=asked.regex, where=where))
    if asked.choice is not None:
        found.append(_choice(asked.choice, f"{path}.choice"))
    if asked.grammar is not None:
        found.append(_lark(asked.grammar, f"{path}.grammar"))
    if asked.json_object:
        where = f"{path}.json_object"
        found.append(AnswerFormat(constraint=Constraint.JSON_OBJECT, where=where))
    if len(found) != 1:
        refuse(path, "takes one of json, regex, choice, grammar and json_object")
    return found[0]


def _json_schema(schema: str | dict[str, object], where: str) -> AnswerFormat:
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
    except RecursionError:
        refuse(where, "is too deep")
    return AnswerFormat(constraint=Constraint.JSON_SCHEMA, text=text, where=where)


def _choice(choices: list[str], where: str) -> AnswerFormat:
    if not choices:
        refuse(where, "needs at least one text")
    text = "start: " + " | ".join(map(json.dumps, choices))
    return AnswerFormat(constraint=Constraint.LARK, text=text, where=where)


def _lark(grammar: str, where: str) -> AnswerFormat:
    if "::=" in grammar:
        refuse(where, "write it in Lark: 'start: ...', not 'root ::= ...'")
    return AnswerFormat(constraint=Constraint.LARK, text=grammar, where=where)
