"""From the bodies of `openai_schema` to the requests of `generation`.

Says by name what is not served, so that nothing a caller asked for is dropped in silence.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace

from ostro.actors.errors import InvalidRequestError
from ostro.cluster.foreign_fields import refuse_foreign_fields
from ostro.cluster.generation import (
    ChatGeneration,
    ChatMessage,
    GenerationOptions,
    ImageFile,
    TextGeneration,
    Tool,
    ToolCall,
)
from ostro.cluster.images import image_of_uri
from ostro.cluster.openai_constraints import allowed_tools, answer_format, tool_choice
from ostro.cluster.openai_schema import (
    ChatCompletionRequest,
    CompletionFields,
    CompletionRequest,
    Message,
    Part,
    ToolCallIn,
    ToolIn,
)
from ostro.cluster.refusals import present, refuse
from ostro.cluster.wire_schema import SamplingFields

_DEFAULT_COMPLETION_TOKENS = 16  # what the dialect promises for /v1/completions
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
_CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")
_OTHER_IMAGE_TYPES = ("image", "input_image")


def chat_generation(body: ChatCompletionRequest) -> ChatGeneration:
    """The conversation and its options.

    Raises:
        InvalidRequestError: A field makes no sense or is not served; `param` names it.
    """
    _refuse_unserved(body)
    _refuse_unserved_chat(body)
    return ChatGeneration(
        model=body.model,
        messages=chat_messages(body.messages, continue_final=bool(body.continue_final_message)),
        tools=allowed_tools(body, tools_on_offer(body.tools or ())),
        tool_choice=tool_choice(body),
        options=_options(
            body,
            max_tokens=_one_of(body, "max_completion_tokens", "max_tokens"),
            num_logprobs=_num_logprobs(body),
            effort=body.reasoning_effort,
            thinking_token_budget=body.thinking_token_budget,
            omit_thinking=body.reasoning_format == "none",
            prediction=_predicted_text(body),
        ),
    )


def text_generation(body: CompletionRequest) -> TextGeneration:
    """The raw prompt and its options.

    Raises:
        InvalidRequestError: A field makes no sense or is not served; `param` names it.
    """
    _refuse_unserved(body)
    if body.suffix:
        refuse("suffix", "filling in the middle is not served")
    max_tokens = _DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    return TextGeneration(
        model=body.model,
        prompts=_prompts(body.prompt),
        echo=bool(body.echo),
        options=_options(body, max_tokens=max_tokens, num_logprobs=body.logprobs),
    )


def chat_messages(
    messages: Sequence[Message], *, continue_final: bool = False
) -> tuple[ChatMessage, ...]:
    """Messages with their parts joined, and thinking and images told from their text."""
    last = len(messages) - 1
    return tuple(
        _chat_message(
            message,
            f"messages[{i}]",
            is_last=i == last,
            continues=continue_final and i == last,
        )
        for i, message in enumerate(messages)
    )


def tools_on_offer(tools: Sequence[ToolIn]) -> tuple[Tool, ...]:
    """The functions among the tools; other kinds are refused."""
    offered = []
    for i, tool in enumerate(tools):
        if tool.type != "function" or tool.function is None:
            refuse(f"tools[{i}]", "only tools of type 'function' are served")
        function = tool.function
        offered.append(
            Tool(
                name=function.name,
                description=function.description or "",
                parameters=function.parameters or {},
                strict=bool(function.strict),
                where=f"tools[{i}].function.parameters",
            )
        )
    return tuple(offered)


def sampling_options(body: SamplingFields) -> GenerationOptions:
    """The options that dialects have under the same names."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return GenerationOptions(
        request_id=body.request_id,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=0 if body.top_k == -1 else body.top_k,
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        seed=body.seed,
        min_tokens=body.min_tokens or 0,
        stop=tuple(stop),
        ignore_eos=bool(body.ignore_eos),
        cache_key=body.cache_salt or body.prompt_cache_key or "",
        priority=body.priority or 0,
        queue_timeout_s=body.queue_timeout,
    )


def short_call_id(call_id: str) -> str:
    """A tool call id of nine characters of [a-zA-Z0-9]; other ids map to one, always the same."""
    if _CALL_ID.fullmatch(call_id):
        return call_id
    return hashlib.blake2b(call_id.encode(), digest_size=5).hexdigest()[:9]


def _refuse_unserved(body: CompletionFields) -> None:
    refuse_foreign_fields(body)
    if body.best_of is not None and body.best_of != (1 if body.n is None else body.n):
        refuse("best_of", "every sampled answer is returned; leave it out, or let it equal n")
    if body.prompt_logprobs is not None and body.prompt_logprobs is not False:
        refuse("prompt_logprobs", "logprobs of prompt tokens are not served")
    if body.top_prompt_logprobs:
        refuse("top_prompt_logprobs", "logprobs of prompt tokens are not served")
    if body.store:
        refuse("store", "answers are not stored")


def _refuse_unserved_chat(body: ChatCompletionRequest) -> None:
    if body.prompt_mode is not None:
        refuse("prompt_mode", "not known to this model; use reasoning_effort")
    if body.safe_prompt:
        refuse("safe_prompt", "no safety prompt is added")
    if body.guardrails:
        refuse("guardrails", "not served")
    if body.modalities is not None and body.modalities != ["text"]:
        refuse("modalities", "only ['text'] is served")


def _options(
    body: CompletionFields,
    *,
    max_tokens: int | None,
    num_logprobs: int | None,
    effort: str | None = None,
    thinking_token_budget: int | None = None,
    omit_thinking: bool = False,
    prediction: str = "",
) -> GenerationOptions:
    return replace(
        sampling_options(body),
        effort=effort,
        thinking_token_budget=thinking_token_budget,
        omit_thinking=omit_thinking,
        seed=_one_of(body, "seed", "random_seed"),
        logit_bias=_logit_bias(body.logit_bias or {}),
        max_tokens=max_tokens,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        num_logprobs=num_logprobs,
        return_token_ids=bool(body.return_token_ids),
        answer_format=answer_format(body),
        num_choices=1 if body.n is None else body.n,
        prediction=prediction,
    )


def _one_of(body: CompletionFields, name: str, other_name: str) -> int | None:
    """The value of a field with two names; both may be given if they agree."""
    value: int | None = getattr(body, name)
    other: int | None = getattr(body, other_name)
    if value is not None and other is not None and value != other:
        raise InvalidRequestError(
            f"{name}={value} and {other_name}={other} differ: send one of them", param=name
        )
    return other if value is None else value


def _num_logprobs(body: ChatCompletionRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs=true", param="top_logprobs")
    return None


def _predicted_text(body: ChatCompletionRequest) -> str:
    if body.prediction is None:
        return ""
    content = body.prediction.content or ""
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content):
        where = f"prediction.content[{i}]"
        if part.type != "text":
            refuse(where, "a prediction has parts of type 'text' alone")
        texts.append(present(part.text, f"{where}.text"))
    return "".join(texts)


def _logit_bias(bias: dict[str, float]) -> dict[int, float]:
    if not all(map(_TOKEN_ID.fullmatch, bias)):
        raise InvalidRequestError(
            "logit_bias: every key must be a token id in decimal digits", param="logit_bias"
        )
    return {int(token_id): value for token_id, value in bias.items()}


def _prompts(
    prompt: str | list[str] | list[int] | list[list[int]],
) -> tuple[str | tuple[int, ...], ...]:
    """The prompts of a text completion; token ids may stand in one list or in several."""
    if isinstance(prompt, str):
        return (prompt,)
    token_ids = tuple(item for item in prompt if isinstance(item, int))
    if token_ids:
        return (token_ids,)
    return tuple(
        tuple(item) if isinstance(item, list) else item
        for item in prompt
        if not isinstance(item, int)
    )


def _chat_message(message: Message, path: str, *, is_last: bool, continues: bool) -> ChatMessage:
    thinking, text, images = _content(message, path)
    role = "system" if message.role == "developer" else message.role
    if role == "tool":
        return ChatMessage(
            role=role, text=text, images=images, tool_call_id=_answered_call(message, path)
        )
    prefix = bool(message.prefix) or continues
    if prefix and (role != "assistant" or not is_last):
        raise InvalidRequestError(
            f"{path}.prefix: only the last message can be continued, and only an assistant's",
            param=f"{path}.prefix",
        )
    if role != "assistant":
        return ChatMessage(role=role, text=text, images=images)
    return ChatMessage(
        role=role,
        text=text or message.refusal or "",
        images=images,
        thinking=thinking or message.reasoning_content or message.reasoning or None,
        thinking_closed=_closes_thinking(message),
        tool_calls=tuple(_tool_call(call) for call in message.tool_calls or ()),
        prefix=prefix,
    )


def _closes_thinking(message: Message) -> bool:
    if not isinstance(message.content, list):
        return False
    thinking = [part for part in message.content if part.type == "thinking"]
    return bool(thinking) and thinking[-1].closed is True


def _answered_call(message: Message, path: str) -> str:
    where = f"{path}.tool_call_id"
    if message.tool_call_id is None:
        raise InvalidRequestError(
            f"{where}: a tool message must name the call it answers", param=where
        )
    return short_call_id(message.tool_call_id)


def _tool_call(call: ToolCallIn) -> ToolCall:
    arguments = call.function.arguments
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(call_id=short_call_id(call.id), name=call.function.name, arguments=arguments)


def _content(message: Message, path: str) -> tuple[str, str, tuple[ImageFile, ...]]:
    """Thinking, text and images of a message's content."""
    if message.content is None or isinstance(message.content, str):
        return "", message.content or "", ()
    thinking: list[str] = []
    text: list[str] = []
    images: list[ImageFile] = []
    num_chars = 0
    for j, part in enumerate(message.content):
        where = f"{path}.content[{j}]"
        if part.type == "thinking" and message.role == "assistant":
            thinking.append(_thinking_text(part, where))
        elif part.type == "image_url":
            images.append(image_of_uri(_image_url(part, where), where, at=num_chars))
        else:
            is_refusal = part.type == "refusal" and message.role == "assistant"
            text.append(
                present(part.refusal, f"{where}.refusal") if is_refusal else _part_text(part, where)
            )
            num_chars += len(text[-1])
    return "".join(thinking), "".join(text), tuple(images)


def _image_url(part: Part, where: str) -> str:
    if isinstance(part.image_url, str):
        return part.image_url
    return present(part.image_url, f"{where}.image_url").url


def _thinking_text(part: Part, where: str) -> str:
    if isinstance(part.thinking, str):
        return part.thinking
    inner = part.thinking or []
    return "".join(_part_text(piece, f"{where}.thinking[{k}]") for k, piece in enumerate(inner))


def _part_text(part: Part, where: str) -> str:
    if part.type in _OTHER_IMAGE_TYPES:
        refuse(where, "send an image as a part of type 'image_url'")
    if part.type != "text":
        refuse(where, f"parts of type {part.type[:40]!r} are not served in this message")
    return present(part.text, f"{where}.text")
