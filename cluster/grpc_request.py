"""From the messages of `protos/generation.proto` to the requests of `generation`.

Refusals name the field by its path in the message; the frontend's own refusals (ranges, lengths)
name it as HTTP callers know it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ostro.actors.errors import InvalidRequestError
from ostro.cluster.generation import (
    AnswerFormat,
    ChatGeneration,
    ChatMessage,
    Constraint,
    GenerationOptions,
    ImageFile,
    TextGeneration,
    Tool,
    ToolCall,
    ToolChoice,
)
from ostro.cluster.grpc_answer import EFFORT_NUMBERS
from ostro.cluster.images import image_of_uri
from ostro.cluster.openai_request import short_call_id
from ostro.cluster.refusals import refuse
from ostro.protos import generation_pb2 as pb

_ROLES = {
    pb.ROLE_SYSTEM: "system",
    pb.ROLE_USER: "user",
    pb.ROLE_ASSISTANT: "assistant",
    pb.ROLE_TOOL: "tool",
}
_TOOL_MODES: dict[int, str] = {
    pb.ToolChoice.MODE_UNSPECIFIED: "auto",
    pb.ToolChoice.MODE_AUTO: "auto",
    pb.ToolChoice.MODE_NONE: "none",
    pb.ToolChoice.MODE_REQUIRED: "required",
}
_EFFORTS: dict[int, str] = {number: name for name, number in EFFORT_NUMBERS.items()}


def effort_name(effort: int) -> str | None:
    """The effort's name; None for UNSPECIFIED.

    Raises:
        InvalidRequestError: A number that this version does not know.
    """
    if effort == pb.REASONING_EFFORT_UNSPECIFIED:
        return None
    if effort not in _EFFORTS:
        refuse("options.reasoning.effort", f"no effort has the number {effort}")
    return _EFFORTS[effort]


def chat_generation(request: pb.ChatRequest | pb.StreamChatRequest) -> ChatGeneration:
    """The conversation and its options.

    Raises:
        InvalidRequestError: A field makes no sense or is not served; `param` names it.
    """
    return ChatGeneration(
        model=request.model,
        messages=conversation_messages(request.conversation),
        tools=tools_on_offer(request.conversation.tools),
        tool_choice=_tool_choice(request.conversation.tool_choice),
        options=_options(request.options, request.request_id),
    )


def text_generation(request: pb.StreamGenerateRequest) -> TextGeneration:
    """The raw prompt and its options.

    Raises:
        InvalidRequestError: A field makes no sense or is not served; `param` names it.
    """
    which = request.WhichOneof("prompt")
    if which is None:
        refuse("prompt", "send text or tokens")
    return TextGeneration(
        model=request.model,
        prompts=(request.text if which == "text" else tuple(request.tokens.ids),),
        options=_options(request.options, request.request_id),
    )


def conversation_messages(conversation: pb.Conversation) -> tuple[ChatMessage, ...]:
    """The messages of a conversation with at least one."""
    if not conversation.messages:
        refuse("conversation.messages", "at least one message is needed")
    last = len(conversation.messages) - 1
    return tuple(
        _chat_message(message, f"conversation.messages[{i}]", is_last=i == last)
        for i, message in enumerate(conversation.messages)
    )


def tools_on_offer(tools: Sequence[pb.Tool]) -> tuple[Tool, ...]:
    """The tools, their schemas read."""
    return tuple(_tool(tool, f"conversation.tools[{i}]") for i, tool in enumerate(tools))


def _chat_message(message: pb.Message, path: str, *, is_last: bool) -> ChatMessage:
    role = _ROLES.get(message.role)
    if role is None:
        refuse(f"{path}.role", "must be SYSTEM, USER, ASSISTANT or TOOL")
    thinking, text, images = _content(message, path, role)
    if role == "tool":
        if not message.tool_call_id:
            refuse(f"{path}.tool_call_id", "a tool message must name the call it answers")
        return ChatMessage(
            role=role,
            text=text,
            images=images,
            tool_call_id=short_call_id(message.tool_call_id),
        )
    if message.prefix and (role != "assistant" or not is_last):
        refuse(f"{path}.prefix", "only the last message can be continued, an assistant's")
    if message.tool_calls and role != "assistant":
        refuse(f"{path}.tool_calls", "only an assistant calls tools")
    return ChatMessage(
        role=role,
        text=text,
        images=images,
        thinking=thinking or None,
        thinking_closed=any(part.thinking.closed for part in message.parts),
        tool_calls=tuple(
            ToolCall(call_id=short_call_id(call.id), name=call.name, arguments=call.arguments)
            for call in message.tool_calls
        ),
        prefix=message.prefix,
    )


def _content(message: pb.Message, path: str, role: str) -> tuple[str, str, tuple[ImageFile, ...]]:
    """Thinking, text and images of a message's parts."""
    thinking: list[str] = []
    text: list[str] = []
    images: list[ImageFile] = []
    num_chars = 0
    for j, part in enumerate(message.parts):
        where, which = f"{path}.parts[{j}]", part.WhichOneof("part")
        if which == "text":
            text.append(part.text)
            num_chars += len(part.text)
        elif which == "thinking" and role == "assistant":
            thinking.append(part.thinking.text)
        elif which == "image":
            images.append(_image(part.image, where, num_chars))
        else:
            refuse(where, f"a part with {which or 'nothing'} in it is not taken here")
    return "".join(thinking), "".join(text), tuple(images)


def _image(image: pb.Image, where: str, at: int) -> ImageFile:
    if image.WhichOneof("source") == "uri":
        return image_of_uri(image.uri, where, at=at)
    return ImageFile(data=image.data, where=where, at=at)


def _tool(tool: pb.Tool, path: str) -> Tool:
    where = f"{path}.parameters"
    try:
        parameters = msgspec.json.decode(tool.parameters or "{}", type=dict[str, object])
    except (msgspec.MsgspecError, RecursionError):
        raise InvalidRequestError(f"{where}: must be a JSON object", param=where) from None
    return Tool(
        name=tool.name,
        description=tool.description,
        parameters=parameters,
        strict=tool.strict,
        where=where,
    )


def _tool_choice(choice: pb.ToolChoice) -> ToolChoice:
    if choice.mode not in _TOOL_MODES:
        refuse("conversation.tool_choice.mode", f"no mode has the number {choice.mode}")
    name = choice.name or None
    return ToolChoice(
        mode="required" if name else _TOOL_MODES[choice.mode],
        name=name,
        parallel=not choice.forbid_parallel,
    )


def _answer_format(output: pb.OutputFormat) -> AnswerFormat | None:
    which = output.WhichOneof("format")
    if which is None or (which == "json_object" and not output.json_object):
        return None
    text = "" if which == "json_object" else getattr(output, which)
    where = f"options.output_format.{which}"
    return AnswerFormat(constraint=Constraint(which), text=text, where=where)


def _options(options: pb.GenerationOptions, request_id: str) -> GenerationOptions:
    if options.logprobs.prompt:
        refuse("options.logprobs.prompt", "logprobs of prompt tokens are not served")
    reasoning, sampling, stopping = options.reasoning, options.sampling, options.stopping
    budget = reasoning.max_thinking_tokens
    return GenerationOptions(
        request_id=request_id or None,
        effort=effort_name(reasoning.effort),
        thinking_token_budget=budget if reasoning.HasField("max_thinking_tokens") else None,
        omit_thinking=reasoning.omit_thinking,
        temperature=_number(sampling, "temperature"),
        top_p=_number(sampling, "top_p"),
        top_k=sampling.top_k if sampling.HasField("top_k") else None,
        min_p=_number(sampling, "min_p"),
        presence_penalty=_number(sampling, "presence_penalty"),
        frequency_penalty=_number(sampling, "frequency_penalty"),
        repetition_penalty=_number(sampling, "repetition_penalty"),
        seed=sampling.seed if sampling.HasField("seed") else None,
        logit_bias=dict(sampling.logit_bias),
        max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else None,
        min_tokens=stopping.min_tokens,
        stop=tuple(stopping.stop),
        stop_token_ids=tuple(stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
        num_logprobs=options.logprobs.top if options.HasField("logprobs") else None,
        cache_key=options.cache_key,
        priority=options.priority,
        queue_timeout_s=_queue_timeout_s(options),
        return_token_ids=options.return_token_ids,
        answer_format=_answer_format(options.output_format),
        num_choices=options.choices or 1,
        prediction=options.prediction,
    )


def _number(sampling: pb.SamplingOptions, name: str) -> float | None:
    """A set float, rounded to the 7 digits it had as a float32 (0.7, not 0.699999988)."""
    if not sampling.HasField(name):
        return None
    return float(f"{getattr(sampling, name):.7g}")


def _queue_timeout_s(options: pb.GenerationOptions) -> float | None:
    if not options.HasField("queue_timeout"):
        return None
    return options.queue_timeout.seconds + options.queue_timeout.nanos / 1e9
