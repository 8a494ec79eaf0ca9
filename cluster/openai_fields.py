"""Parts of the OpenAI dialect's answers: what streams and whole answers have in common.

One superset satisfies the openai and the mistralai client; only the thinking text needs a choice:
`fields` (`reasoning_content` and `reasoning` beside the content) or `chunks` (Mistral's thinking
chunks inside the content).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from ostro.cluster.generation import (
    Finished,
    ReasoningReport,
    Started,
    TokenText,
    ToolCallDone,
    Usage,
)

Json = dict[str, object]


class ThinkingForm(Enum):
    """How thinking text is shown."""

    FIELDS = "fields"
    CHUNKS = "chunks"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerStyle:
    """What the caller asked of the answer's form.

    Attributes:
        usage_chunk: Usage comes in an extra chunk without choices, not on the finish chunk.
    """

    form: ThinkingForm = ThinkingForm.FIELDS
    logprobs: bool = False
    token_ids: bool = False
    usage_chunk: bool = False


def head(event: Started, object_name: str) -> Json:
    """The fields that an answer and all its chunks begin with."""
    return {
        "id": event.request_id,
        "object": object_name,
        "created": int(time.time()),
        "model": event.model,
    }


def usage_fields(usage: Usage) -> Json:
    """Token counts under the names that both clients read."""
    completion_details = {"reasoning_tokens": usage.thinking_tokens}
    num_accepted, num_rejected = usage.accepted_prediction_tokens, usage.rejected_prediction_tokens
    if num_accepted or num_rejected:
        completion_details["accepted_prediction_tokens"] = num_accepted
        completion_details["rejected_prediction_tokens"] = num_rejected
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_prompt_tokens,
            "image_tokens": usage.image_tokens,
        },
        "completion_tokens_details": completion_details,
        "num_cached_tokens": usage.cached_prompt_tokens,
    }


def reasoning_fields(report: ReasoningReport) -> Json:
    """What the server made of the asked effort."""
    return {
        "effort": report.effort,
        "budget": report.budget_tokens,
        "tokens": report.thinking_tokens,
        "ended_by": report.ended_by,
    }


def whole_reasoning(reports: Sequence[ReasoningReport]) -> Json:
    """The same of all choices: their tokens together, and what ended them if it was one thing."""
    ended_by = {report.ended_by for report in reports}
    return {
        **reasoning_fields(reports[0]),
        "tokens": sum(report.thinking_tokens for report in reports),
        "ended_by": ended_by.pop() if len(ended_by) == 1 else None,
    }


def tool_call_fields(event: ToolCallDone) -> Json:
    """A whole call, as both clients read it."""
    function = {"name": event.call.name, "arguments": event.call.arguments}
    return {
        "index": event.index,
        "id": event.call.call_id,
        "type": "function",
        "function": function,
    }


def finish_reason(reason: str, form: ThinkingForm) -> str:
    """OpenAI's few words under `fields`, ours under `chunks` (Mistral's client takes any)."""
    if form is ThinkingForm.CHUNKS:
        return reason
    return {"model_length": "length", "cancelled": "stop"}.get(reason, reason)


def stop_reason(event: Finished) -> str | int | None:
    """What exactly ended the answer: a stop string, a stop token, or its caller."""
    if event.reason == "cancelled":
        return event.reason
    return event.stop_token_id if event.matched_stop is None else event.matched_stop


def chat_logprobs(tokens: Sequence[TokenText]) -> Json:
    """Logprobs of a chat choice."""
    return {"content": token_logprobs(tokens), "refusal": None}


def token_logprobs(tokens: Sequence[TokenText]) -> list[Json]:
    """Logprobs of tokens; `token_id` is what the mistralai client insists on in chats."""
    return [
        {
            **_token_fields(token.token_id, token.text, token.logprob),
            "top_logprobs": [_token_fields(*alternative) for alternative in token.top],
        }
        for token in tokens
    ]


def text_logprobs(tokens: Sequence[TokenText], offset: int) -> Json:
    """Logprobs of a text choice whose first token begins at character `offset` of the answer."""
    texts = [_text(token.text) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            {_text(text): logprob for _, text, logprob in token.top} for token in tokens
        ],
        "text_offset": offsets,
    }


def _token_fields(token_id: int, text: bytes, logprob: float) -> Json:
    return {
        "token": _text(text),
        "token_id": token_id,
        "logprob": logprob,
        "bytes": list(text),
    }


def thinking_chunk(text: str, *, closed: bool = False) -> Json:
    """Mistral's form of a piece of thinking."""
    chunk: Json = {"type": "thinking", "thinking": [{"type": "text", "text": text}]}
    if closed:
        chunk["closed"] = True
    return chunk


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
