"""Parts of the Anthropic dialect's answers: what streams, whole answers and refusals share."""

from __future__ import annotations

from ostro.actors.errors import OstroError
from ostro.cluster.error_table import answer_for, public_message
from ostro.cluster.generation import Finished, Started
from ostro.cluster.messages_request import CALL_ID_PREFIX

Json = dict[str, object]

# Clients demand a signature and send it back. Thinking is taken from whoever sends it, so there is
# nothing to sign.
SIGNATURE = "ostro-unsigned"

_STOP_REASONS = {
    "stop": "end_turn",
    "cancelled": "end_turn",
    "length": "max_tokens",
    "model_length": "model_context_window_exceeded",
    "tool_calls": "tool_use",
}
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
# Names that the one request model has from another dialect.
OWN_NAMES = {
    "stop": "stop_sequences",
    "reasoning_effort": "output_config.effort",
    "thinking_token_budget": "thinking.budget_tokens",
}


def head(event: Started) -> Json:
    """The fields of a message that are known when it begins."""
    return {
        "id": event.request_id,
        "type": "message",
        "role": "assistant",
        "model": event.model,
    }


def input_usage(num_prompt_tokens: int, num_cached_tokens: int) -> Json:
    """Prompt tokens in this dialect's way: those from the cache are not among `input_tokens`."""
    return {
        "input_tokens": num_prompt_tokens - num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": num_cached_tokens,
    }


def usage_fields(event: Finished) -> Json:
    """All token counts of a message."""
    usage = event.usage
    return {
        **input_usage(usage.prompt_tokens, usage.cached_prompt_tokens),
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.thinking_tokens},
    }


def stop_fields(event: Finished) -> Json:
    """Why the message ended."""
    if event.reason == "stop" and event.matched_stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": event.matched_stop}
    return {"stop_reason": _STOP_REASONS[event.reason], "stop_sequence": None}


def tool_use_fields(call_id: str, name: str) -> Json:
    """A call without its input."""
    return {"type": "tool_use", "id": CALL_ID_PREFIX + call_id, "name": name}


def message_error(error: OstroError, request_id: str) -> Json:
    """The error body of this dialect; `details` has what its four words cannot say."""
    return {
        "type": "error",
        "error": {
            "type": _ERROR_TYPES.get(answer_for(error).http_status, "api_error"),
            "message": public_message(error),
            "details": {"error_code": error.code, "param": error.param},
        },
        "request_id": request_id,
    }
