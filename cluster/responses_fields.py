"""Parts of a `response` object: what its caller asked for, told back, and what it came to."""

from __future__ import annotations

import time

from ostro.actors.errors import InvalidRequestError, OstroError, OverloadedError
from ostro.cluster.error_table import error_fields, in_words_of
from ostro.cluster.generation import GenerationOptions, Usage
from ostro.cluster.openai_fields import Json
from ostro.cluster.responses_schema import FlatTool, ResponsesRequest

# Names that the one request model has from another dialect.
OWN_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
}
_STATUSES = {"length": "incomplete", "model_length": "incomplete", "cancelled": "cancelled"}


def response_head(body: ResponsesRequest, options: GenerationOptions, model: str) -> Json:
    """The response before anything came of it, in the order of its fields."""
    return {
        "id": options.request_id,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": model,
        "output": [],
        "usage": None,
        "reasoning": {"effort": options.effort, "summary": None},
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_logprobs": body.top_logprobs,
        "text": {"format": _format_fields(body)},
        "tools": [_tool_fields(tool) for tool in body.tools or ()],
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "user": body.user,
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
        "service_tier": "default",
        "truncation": "disabled",
        "background": False,
        "store": False,
        "previous_response_id": None,
    }


def status_of(reason: str) -> str:
    """A response's status by the reason that its generation ended for."""
    return _STATUSES.get(reason, "completed")


def response_usage(usage: Usage) -> Json:
    """Token counts under this dialect's names."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_prompt_tokens,
            "cache_write_tokens": 0,  # clients insist on it; here the cache is free to write
            "image_tokens": usage.image_tokens,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.thinking_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def response_error(error: OstroError) -> Json:
    """Why a response failed after it began; the dialect has few codes, the type says more."""
    code = "server_error"
    if isinstance(error, InvalidRequestError):
        code = "invalid_prompt"
    elif isinstance(error, OverloadedError):
        code = "rate_limit_exceeded"
    return {**error_fields(in_words_of(error, OWN_NAMES)), "code": code}


def _format_fields(body: ResponsesRequest) -> Json:
    asked = None if body.text is None else body.text.format
    if asked is None:
        return {"type": "text"}
    if asked.type != "json_schema":
        return {"type": asked.type}
    return {
        "type": asked.type,
        "name": asked.name or "answer",
        "description": asked.description,
        "schema": asked.json_schema,
        "strict": asked.strict,
    }


def _tool_fields(tool: FlatTool) -> Json:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": bool(tool.strict),
    }
