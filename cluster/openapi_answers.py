"""Answers of the HTTP face that are of no dialect, and refusals, as its OpenAPI document has them.

Nothing is built from these models: answers are written by hand for speed. Tests hold every answer
against them. None as a default: the field may be absent; None without one: it may be null.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class ErrorFields(BaseModel):
    """What went wrong: a message for people, a code for programs, the field at fault."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorDetail(BaseModel):
    """One field that broke the schema of the body."""

    type: str
    loc: list[str | int]
    msg: str
    input: object


class Error(ErrorFields):
    """A refusal or a failure; `detail` comes with status 422 alone."""

    object: Literal["error"]
    error: ErrorFields
    detail: list[ErrorDetail] | None = None


class ControlResult(BaseModel):
    """`applied` is false where no generation of that id runs."""

    id: str
    action: Literal["reasoning_end", "cancel"]
    applied: bool


class Capabilities(BaseModel):
    """What the model can do."""

    completion_chat: bool
    function_calling: bool
    reasoning: bool
    vision: bool
    completion_fim: bool
    fine_tuning: bool


class Model(BaseModel):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    type: str
    name: str
    description: str
    capabilities: Capabilities
    max_context_length: int
    max_model_len: int
    aliases: list[str]
    reasoning_efforts: list[str]
    default_reasoning_effort: str


class ModelList(BaseModel):
    """All served models: one."""

    object: Literal["list"]
    data: list[Model]


class Tokens(BaseModel):
    """Token ids of a text or a conversation."""

    count: int
    max_model_len: int
    tokens: list[int]


class Text(BaseModel):
    """The text of token ids."""

    prompt: str


class Health(BaseModel):
    """Of a server that is well."""

    status: Literal["ready", "live"]
