"""Each field that a client documents for a chat is heeded, refused by name or named as ignored.

A client that gains a field fails `test_no_client_knows_a_field_that_is_not_here`: say here what
becomes of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import httpx
import mistralai.client.models as mistral
import openai.types.chat as openai
import pytest
from http_face import face
from openai.types.chat.chat_completion_content_part_image_param import ImageURL
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from openai.types.shared_params import FunctionDefinition
from scripted_frontend import MODEL, THOUGHTFUL, WITH_LOGPROBS, ScriptedFrontend

from ostro.cluster import openai_schema


class Fate(Enum):
    """What becomes of a field."""

    HEEDED = "the request that was made of it, or the answer, is another one"
    REFUSED = "4xx, and `param` names it"
    NAMED = "`x-ignored-fields` names it, and `strict` refuses it"
    LABEL = "none of these: it asks nothing of the answer"


HEEDED, REFUSED, NAMED, LABEL = Fate


@dataclass(frozen=True)
class Sent:
    """A field with a value that asks for something, and what stands beside it."""

    name: str
    value: Any
    fate: Fate
    beside: dict[str, Any] = field(default_factory=dict)


HELLO = {"role": "user", "content": "Say hello."}
ANSWER = {"role": "assistant", "content": "Hel"}
PLAIN = {"model": MODEL, "messages": [HELLO]}
TOOL = {"type": "function", "function": {"name": "f"}}
JSON = {"type": "json_object"}
TOOLS = {"tools": [TOOL]}
STREAM = {"stream": True}

FIELDS = [
    # What both clients have.
    Sent("model", "another", REFUSED),
    Sent("messages", [{"role": "user", "content": "Say goodbye."}], HEEDED),
    Sent("stream", True, HEEDED),
    Sent("temperature", 0.5, HEEDED),
    Sent("top_p", 0.5, HEEDED),
    Sent("presence_penalty", 0.5, HEEDED),
    Sent("frequency_penalty", 0.5, HEEDED),
    Sent("max_tokens", 5, HEEDED),
    Sent("stop", ["END"], HEEDED),
    Sent("stop", "END", HEEDED),
    Sent("n", 2, HEEDED),
    Sent("tools", [TOOL], HEEDED),
    Sent("tools", [{"type": "web_search"}], REFUSED),
    Sent("tools", [{"type": "custom", "custom": {"name": "f"}}], REFUSED),
    Sent("tool_choice", "none", HEEDED, TOOLS),
    Sent("parallel_tool_calls", False, HEEDED, TOOLS),
    Sent("response_format", JSON, HEEDED),
    Sent("response_format", {"type": "text"}, LABEL),
    Sent("logprobs", True, HEEDED),
    Sent("top_logprobs", 2, HEEDED, {"logprobs": True}),
    Sent("top_logprobs", 2, REFUSED),
    Sent("reasoning_effort", "high", HEEDED),
    Sent("prediction", {"type": "content", "content": "Hello"}, HEEDED),
    Sent("prediction", {"content": [{"type": "text", "text": "Hello"}]}, HEEDED),
    Sent("prediction", {"type": "content", "content": ""}, LABEL),
    Sent("prediction", {"type": "content", "content": [{"type": "image_url"}]}, REFUSED),
    Sent("prediction", {"type": "content", "content": [{"type": "text"}]}, REFUSED),
    Sent("prediction", {"type": "content", "content": 5}, REFUSED),
    Sent("prediction", {"type": "file", "content": "Hello"}, REFUSED),
    Sent("prediction", "Hello", REFUSED),
    Sent("prompt_cache_key", "team", HEEDED),
    Sent("prompt_cache_key", "team", NAMED, {"cache_salt": "pepper"}),
    Sent("service_tier", "auto", LABEL),
    Sent("service_tier", "flex", NAMED),
    Sent("metadata", {"team": "a"}, LABEL),
    # OpenAI's.
    Sent("max_completion_tokens", 5, HEEDED),
    Sent("max_completion_tokens", 5, REFUSED, {"max_tokens": 6}),
    Sent("seed", 7, HEEDED),
    Sent("logit_bias", {"5": -100}, HEEDED),
    Sent("logit_bias", {"hello": 1}, REFUSED),
    Sent("logit_bias", {"05": 1}, REFUSED),
    Sent("logit_bias", {"5_0": 1}, REFUSED),
    Sent("logit_bias", {"\u0665": 1}, REFUSED),  # a digit, but no decimal one
    Sent("logit_bias", [[5, 1]], REFUSED),
    Sent("stream_options", {"include_usage": True}, HEEDED, STREAM),
    Sent("stream_options", {"include_usage": True}, NAMED),
    Sent("store", True, REFUSED),
    Sent("store", False, LABEL),
    Sent("user", "me", LABEL),
    Sent("safety_identifier", "me", LABEL),
    Sent("modalities", ["text"], LABEL),
    Sent("modalities", ["text", "audio"], REFUSED),
    Sent("audio", {"format": "mp3", "voice": "alloy"}, REFUSED),
    Sent("functions", [{"name": "f"}], REFUSED),
    Sent("function_call", "auto", REFUSED),
    Sent("web_search_options", {"search_context_size": "low"}, REFUSED),
    Sent("moderation", {"model": "omni"}, REFUSED),
    Sent("verbosity", "low", NAMED),
    Sent("prompt_cache_options", {"ttl": "30m"}, NAMED),
    Sent("prompt_cache_retention", "24h", NAMED),
    # Mistral's.
    Sent("random_seed", 7, HEEDED),
    Sent("seed", 7, REFUSED, {"random_seed": 1}),
    Sent("min_tokens", 2, HEEDED),
    Sent("top_k", 5, HEEDED),
    Sent("repetition_penalty", 1.5, HEEDED),
    Sent("prompt_logprobs", True, REFUSED),
    Sent("prompt_logprobs", False, LABEL),
    Sent("top_prompt_logprobs", 2, REFUSED),
    Sent("prompt_mode", "reasoning", REFUSED),
    Sent("safe_prompt", True, REFUSED),
    Sent("safe_prompt", False, LABEL),
    Sent("guardrails", [{"block_on_error": True}], REFUSED),
    # Other servers', and ours.
    Sent("request_id", "mine", HEEDED),
    Sent("min_p", 0.5, HEEDED),
    Sent("stop_token_ids", [5], HEEDED),
    Sent("ignore_eos", True, HEEDED),
    Sent("cache_salt", "pepper", HEEDED),
    Sent("priority", 1, HEEDED),
    Sent("queue_timeout", 1.5, HEEDED),
    Sent("return_token_ids", True, HEEDED),
    Sent("continue_final_message", True, HEEDED, {"messages": [HELLO, ANSWER]}),
    Sent("best_of", 2, REFUSED),
    Sent("best_of", 2, LABEL, {"n": 2}),
    Sent("reasoning_format", "none", HEEDED),
    Sent("reasoning_format", "chunks", HEEDED),
    Sent("reasoning_format", "tags", REFUSED),
    Sent("thinking_token_budget", 5, HEEDED),
    Sent("reasoning", {"effort": "high"}, REFUSED),
    Sent("thinking", {"type": "disabled"}, REFUSED),
    Sent("enable_thinking", False, REFUSED),
    Sent("thinking_budget", 5, REFUSED),
    Sent("thinking_budget_tokens", 5, REFUSED),
    Sent("reasoning_budget_tokens", 5, REFUSED),
    Sent("chat_template", "{{ messages }}", REFUSED),
    Sent("chat_template_kwargs", {"enable_thinking": False}, REFUSED),
    Sent("chat_template_kwargs", {}, NAMED),
    Sent("documents", [{"text": "a"}], REFUSED),
    Sent("allowed_token_ids", [5], REFUSED),
    Sent("bad_words", ["a"], REFUSED),
    Sent("structured_outputs", {"regex": "a+"}, HEEDED),
    Sent("guided_json", {"type": "object"}, REFUSED),
    Sent("guided_regex", None, LABEL),
    Sent("add_generation_prompt", False, NAMED),
    Sent("reasoning_control", True, NAMED),
    Sent("custom_params", {"thinking_budget": 5}, NAMED),
    Sent("length_penalty", 1.5, NAMED),
    Sent("mood", None, LABEL),
]
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgAB"
    "SK+kcQAAAABJRU5ErkJggg=="
)
THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}
CALL = {"id": "abcDEF123", "type": "function", "function": {"name": "f", "arguments": "{}"}}


# Fields of a message, by its role.
NOT_AN_ASSISTANTS = [
    Sent("role", "function", REFUSED),
    Sent("content", "Again.", HEEDED),
    Sent("name", "Ada", NAMED),
    Sent("tool_calls", [CALL], NAMED),
    Sent("tool_call_id", "abcDEF123", NAMED),
    Sent("reasoning", "Hm.", NAMED),
    Sent("reasoning_content", "Hm.", NAMED),
    Sent("refusal", "No.", NAMED),
    Sent("prefix", True, REFUSED),
]
MESSAGE_FIELDS = {
    "system": NOT_AN_ASSISTANTS,
    "developer": NOT_AN_ASSISTANTS,
    "user": NOT_AN_ASSISTANTS,
    "assistant": [
        Sent("role", "model", REFUSED),
        Sent("content", "Again.", HEEDED),
        Sent("name", "Ada", NAMED),
        Sent("prefix", True, HEEDED),
        Sent("tool_calls", [CALL], HEEDED),
        Sent("tool_call_id", "abcDEF123", NAMED),
        Sent("reasoning_content", "Hm.", HEEDED),
        Sent("reasoning_content", "Hm.", NAMED, {"content": [THOUGHT]}),
        Sent("reasoning", "Hm.", HEEDED),
        Sent("reasoning", "Hm.", LABEL, {"reasoning_content": "Hm."}),
        Sent("reasoning", "Hm?", NAMED, {"reasoning_content": "Hm."}),
        Sent("refusal", "No.", NAMED),
        Sent("refusal", "No.", HEEDED, {"content": None}),
        Sent("function_call", {"name": "f", "arguments": "{}"}, NAMED),
        Sent("audio", {"id": "a"}, NAMED),
    ],
    "tool": [
        Sent("role", "function", REFUSED),
        Sent("content", "5", HEEDED),
        Sent("tool_call_id", "abcDEF124", HEEDED),
        Sent("tool_call_id", None, REFUSED),
        Sent("name", "f", LABEL),
    ],
}
# Fields of a part, by its type; and its plain form, which an assistant says, or a user shows.
IMAGE = {"type": "image_url", "image_url": {"url": PIXEL}}
PART_FIELDS = {
    "text": [
        Sent("text", "Again.", HEEDED),
        Sent("text", None, REFUSED),
        Sent("image_url", PIXEL, NAMED),
        Sent("prompt_cache_breakpoint", {"mode": "explicit"}, NAMED),
    ],
    "refusal": [Sent("refusal", "Never.", HEEDED), Sent("refusal", None, REFUSED)],
    "thinking": [
        Sent("thinking", "Let me see.", HEEDED),
        Sent("closed", True, HEEDED),
        Sent("signature", "seal", LABEL),
    ],
    "image_url": [
        Sent("image_url", PIXEL.replace("gAAAAA", "gAAAAB"), HEEDED),
        Sent("image_url", {"url": PIXEL, "detail": "auto"}, LABEL),
        Sent("prompt_cache_breakpoint", {"mode": "explicit"}, NAMED),
    ],
}
PLAIN_PARTS = {
    "text": {"type": "text", "text": "Hi."},
    "refusal": {"type": "refusal", "refusal": "No."},
    "thinking": THOUGHT,
    "image_url": IMAGE,
}
OTHER_PARTS = ("input_audio", "file", "document_url", "reference", "resource", "resource_link")
FUNCTION_FIELDS = [
    Sent("name", "g", HEEDED),
    Sent("description", "Sums.", HEEDED),
    Sent("parameters", {"type": "object"}, HEEDED),
    Sent("strict", True, HEEDED),
]


def cases() -> Iterator[object]:
    """Path of what is sent, its fate, the body with it and the body without it."""
    for sent in FIELDS:
        plain = PLAIN | sent.beside
        yield of(sent, "", plain, plain | {sent.name: sent.value})
    for role, fields in MESSAGE_FIELDS.items():
        for sent in fields:
            message = {"role": role, "content": "4"} | sent.beside
            if role == "tool":
                message["tool_call_id"] = "abcDEF123"
            bodies = [with_message(message), with_message(message | {sent.name: sent.value})]
            yield of(sent, "messages[1].", *bodies, title=f"{role}.{sent.name}")
    for kind, fields in PART_FIELDS.items():
        for sent in fields:
            part = PLAIN_PARTS[kind]
            bodies = [with_part(part), with_part(part | {sent.name: sent.value})]
            yield of(sent, "messages[1].content[0].", *bodies, title=f"{kind}.{sent.name}")
    for kind in OTHER_PARTS:
        sent = Sent("", None, REFUSED)
        yield of(sent, "messages[1].content[0]", PLAIN, with_part({"type": kind}), title=kind)
    for sent in FUNCTION_FIELDS:
        function = {"name": "f", sent.name: sent.value}
        body = PLAIN | {"tools": [{"type": "function", "function": function}]}
        yield of(sent, "tools[0].function.", PLAIN | TOOLS, body)
    for name in ("include_obfuscation", "continuous_usage_stats"):
        plain = PLAIN | STREAM | {"stream_options": {}}
        body = plain | {"stream_options": {name: True}}
        yield of(Sent(name, True, NAMED), "stream_options.", plain, body)
    body = with_part(IMAGE | {"image_url": {"url": PIXEL, "detail": "low"}})
    yield of(Sent("detail", "", NAMED), "messages[1].content[0].image_url.", PLAIN, body)


def of(sent: Sent, path: str, plain: dict, body: dict, title: str = "") -> object:
    name = f"{title or path + sent.name}-{sent.fate.name}"
    return pytest.param(path + sent.name, sent.fate, plain, body, id=name)


def with_message(message: dict[str, Any]) -> dict[str, Any]:
    return PLAIN | {"messages": [HELLO, message]}


def with_part(part: dict[str, Any]) -> dict[str, Any]:
    role = "user" if part["type"] == "image_url" else "assistant"
    return with_message({"role": role, "content": [part]})


@pytest.fixture(scope="module")
def chats() -> Iterator[tuple[ScriptedFrontend, httpx.Client]]:
    frontend = ScriptedFrontend(*THOUGHTFUL[:3], *WITH_LOGPROBS[1:])
    with face(frontend) as http:
        yield frontend, http


@pytest.mark.parametrize(("path", "fate", "plain", "body"), list(cases()))
def test_no_field_is_ignored_in_silence(chats, path, fate, plain, body):
    frontend, http = chats

    def ask(fields: dict[str, Any]) -> tuple[httpx.Response, object]:
        """The answer, and all that it and the request made of it say but the time."""
        frontend.asked.clear()
        answer = http.post("/v1/chat/completions", json=fields)
        return answer, (frontend.asked[:], re.sub(r'"created":\d+', "", answer.text))

    answer, told = ask(body)
    if answer.is_error:
        seen = REFUSED
        assert answer.status_code in (400, 404, 422), answer.text
        assert answer.json()["error"]["param"].startswith(path.rstrip("."))
    elif "x-ignored-fields" in answer.headers:
        seen = NAMED
        assert answer.headers["x-ignored-fields"] == path
        strict, _ = ask(body | {"strict": True})
        assert (strict.status_code, strict.json()["error"]["param"]) == (422, path)
    else:
        seen = LABEL if ask(plain)[1] == told else HEEDED
    assert seen is fate


PREDICTED_FIELDS = [
    Sent("content", "Hello", HEEDED),
    Sent("content", None, LABEL),
    Sent("type", "content", LABEL),
    Sent("type", "file", REFUSED),
    Sent("mood", "good", NAMED),
]


@pytest.mark.parametrize("sent", PREDICTED_FIELDS, ids=lambda sent: f"{sent.name}-{sent.fate.name}")
def test_no_field_of_a_prediction_is_ignored_in_silence(chats, sent):
    body = PLAIN | {"prediction": {sent.name: sent.value}}
    path = f"prediction.{sent.name}"
    test_no_field_is_ignored_in_silence(chats, path, sent.fate, PLAIN, body)


@pytest.mark.parametrize("fields", [{}, {"stream": True}], ids=["whole", "streamed"])
def test_a_deployment_without_drafts_says_that_it_heeds_no_prediction(fields):
    frontend = ScriptedFrontend()
    frontend.heeds_predictions = False
    body = PLAIN | {"prediction": {"type": "content", "content": "Hello"}} | fields
    with face(frontend) as http:
        heedless = http.post("/v1/chat/completions", json=body)
        refused = http.post("/v1/chat/completions", json=body | {"strict": True})
    assert (heedless.status_code, heedless.headers["x-ignored-fields"]) == (200, "prediction")
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "prediction")
    assert "this deployment" in refused.json()["error"]["message"]


@pytest.mark.parametrize("form", ["fields", "chunks"])
def test_an_answer_goes_back_in_as_it_came(chats, form):
    frontend, http = chats
    body = PLAIN | {"reasoning_format": form, "strict": True}
    answer = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    answer |= {"annotations": None, "audio": None, "function_call": None}  # as a client has it
    again = http.post("/v1/chat/completions", json=body | {"messages": [HELLO, answer, HELLO]})
    assert again.status_code == 200, again.text
    message = frontend.asked[-1].messages[1]
    assert (message.thinking, message.text) == ("Let me see.", "Hello")


def names(kind: Any) -> set[str]:
    """Fields of a model of pydantic's or of a typed dictionary."""
    if hasattr(kind, "model_fields"):
        return {model_field.alias or name for name, model_field in kind.model_fields.items()}
    return set(kind.__required_keys__ | kind.__optional_keys__)


def sent_names(fields: list[Sent]) -> set[str]:
    return {sent.name for sent in fields}


DOCUMENTED = {
    "chat": (
        sent_names(FIELDS) | {"strict"},  # which each test of a named field sends
        [
            CompletionCreateParamsNonStreaming,
            mistral.ChatCompletionRequest,
            mistral.ChatCompletionStreamRequest,
            openai_schema.ChatCompletionRequest,
        ],
    ),
    "system": (
        sent_names(MESSAGE_FIELDS["system"]),
        [openai.ChatCompletionSystemMessageParam, mistral.SystemMessage],
    ),
    "developer": (
        sent_names(MESSAGE_FIELDS["developer"]),
        [openai.ChatCompletionDeveloperMessageParam],
    ),
    "user": (
        sent_names(MESSAGE_FIELDS["user"]),
        [openai.ChatCompletionUserMessageParam, mistral.UserMessage, openai_schema.Message],
    ),
    "assistant": (
        sent_names(MESSAGE_FIELDS["assistant"]),
        [
            openai.ChatCompletionAssistantMessageParam,
            mistral.AssistantMessage,
            openai_schema.Message,
        ],
    ),
    "tool": (
        sent_names(MESSAGE_FIELDS["tool"]),
        [openai.ChatCompletionToolMessageParam, mistral.ToolMessage],
    ),
    "text": (
        {"type"} | sent_names(PART_FIELDS["text"]),
        [openai.ChatCompletionContentPartTextParam, mistral.TextChunk],
    ),
    "refusal": (
        {"type"} | sent_names(PART_FIELDS["refusal"]),
        [openai.ChatCompletionContentPartRefusalParam],
    ),
    "thinking": ({"type"} | sent_names(PART_FIELDS["thinking"]), [mistral.ThinkChunk]),
    "image_url": (
        {"type"} | sent_names(PART_FIELDS["image_url"]),
        [openai.ChatCompletionContentPartImageParam, mistral.ImageURLChunk],
    ),
    "image": ({"url", "detail"}, [ImageURL, mistral.ImageURL]),
    "function": (
        sent_names(FUNCTION_FIELDS),
        [FunctionDefinition, mistral.Function, openai_schema.FunctionIn],
    ),
    "prediction": (
        sent_names(PREDICTED_FIELDS),
        [
            openai.ChatCompletionPredictionContentParam,
            mistral.Prediction,
            openai_schema.Prediction,
        ],
    ),
    "stream_options": (
        {"include_usage", "include_obfuscation"},
        [openai.ChatCompletionStreamOptionsParam, openai_schema.StreamOptions],
    ),
}


@pytest.mark.parametrize(("known", "kinds"), DOCUMENTED.values(), ids=DOCUMENTED)
def test_no_client_knows_a_field_that_is_not_here(known, kinds):
    for kind in kinds:
        assert names(kind) <= known, kind
