"""One request model and one stream of answers behind both faces (HTTP and gRPC).

A face turns its wire format into `ChatGeneration` or `TextGeneration`; `frontend` answers with
`GenerationEvent`s; the face writes them out. What is None was not asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

BETWEEN_STEPS = "between_steps"  # a part of a request's time


class Constraint(Enum):
    """What the answer must be; thinking stays free."""

    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """The form an answer must have.

    Attributes:
        text: The JSON Schema as JSON text (the order of its properties is kept), the regular
            expression or the Lark grammar; empty for JSON_OBJECT.
        where: Name of the field it came from, as its caller knows it.
    """

    constraint: Constraint
    text: str = ""
    where: str = "response_format"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """Which tools the answer may or must call.

    Attributes:
        mode: "auto", "none" or "required".
        name: With "required": this tool and no other.
        parallel: Whether one turn may call several times.
    """

    mode: str = "auto"
    name: str | None = None
    parallel: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """How to generate; None takes the effort's or the server's default.

    Attributes:
        request_id: The caller's id, or None to make one.
        effort: One of `configs.reasoning.EFFORTS`.
        thinking_token_budget: Overrides the effort's budget; -1 is unlimited, 0 forbids thinking.
        omit_thinking: Leave the thinking text out of the answer (usage still counts it).
        temperature: 0 .. 2.
        seed: Any whole number; None draws one. Further choices get seeds that follow from it.
        max_tokens: Thinking and answer together.
        stop: Strings that end the answer; never matched inside thinking.
        num_logprobs: None for none, n for the chosen token's and n alternatives.
        cache_key: Separates prefix caches.
        queue_timeout_s: Give up if generation has not begun by then.
        num_choices: Answers to sample from each prompt; the first is what one alone would be.
        answer_format: Constrains the answer; None leaves it free.
        prediction: What the answer will mostly be, as the caller believes; "" says nothing. It
            comes sooner then, never differently.
        tenant: Whose request it is, by the server's own word (never the caller's); "" for nobody.
    """

    request_id: str | None = None
    effort: str | None = None
    thinking_token_budget: int | None = None
    omit_thinking: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int | None = None
    cache_key: str = ""
    priority: int = 0
    queue_timeout_s: float | None = None
    return_token_ids: bool = False
    num_choices: int = 1
    answer_format: AnswerFormat | None = None
    prediction: str = field(default="", repr=False)
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of a tool; `arguments` is JSON text; `call_id` is nine characters of [a-zA-Z0-9]."""

    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ImageUrl:
    """Where an image is to be fetched from, which only `image_fetch` does."""

    text: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFile:
    """An image in a message, as it came; `images` reads it.

    Attributes:
        data: The file, or its text in base64, or its URL until it is fetched.
        where: Its place in the request, as its caller knows it.
        at: Characters of the message's text that stand before it.
    """

    data: bytes | str | ImageUrl = field(repr=False)
    where: str
    at: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One message of a conversation, already normalised.

    Attributes:
        role: "system", "user", "assistant" or "tool".
        text: The text parts, joined.
        images: User and tool only: the images among the text, in order.
        thinking: Assistant only: the thinking that stood before the text, to be replayed.
        thinking_closed: Of a prefix without text: the thinking is over, the answer comes next.
        tool_calls: Assistant only.
        tool_call_id: Tool only: the call this answers.
        prefix: Last assistant message only: the answer continues this text.
        where: Its place in the request, as its caller knows it; "" for `messages` and its index.
    """

    role: str
    text: str = ""
    images: tuple[ImageFile, ...] = ()
    thinking: str | None = None
    thinking_closed: bool = False
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    prefix: bool = False
    where: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A tool on offer.

    Attributes:
        parameters: JSON Schema of its arguments.
        strict: Hold the arguments to it.
        where: The place of `parameters` in the request, as its caller knows it; "" for that of
            chat completions.
    """

    name: str
    description: str = ""
    parameters: dict[str, object] = field(default_factory=dict)
    strict: bool = False
    where: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatGeneration:
    """One assistant turn to produce.

    Attributes:
        model: Name the caller used; "" for the one served model.
    """

    messages: tuple[ChatMessage, ...]
    model: str = ""
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    options: GenerationOptions = GenerationOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class TextGeneration:
    """Raw continuation of text or token ids, with no chat format and no thinking budget.

    Attributes:
        prompts: Choice j of prompt i is choice `i * num_choices + j` of the answer.
        echo: Begin each choice with its prompt.
    """

    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool = False
    model: str = ""
    options: GenerationOptions = GenerationOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenText:
    """One output token with its logprob, for faces that were asked for logprobs.

    Attributes:
        text: The token's bytes; they may be a part of a UTF-8 character.
        top: (token id, bytes, logprob), best first.
    """

    token_id: int
    text: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """First event: what the server made of the request.

    Attributes:
        num_prompt_tokens: Of all prompts.
        num_cached_tokens: Of the prompt that began first.
        effort: The effort in force.
        budget_tokens: Thinking budget in force; None is unlimited.
        num_choices: Of all prompts.
        tenant: `GenerationOptions.tenant`.
    """

    request_id: str
    model: str
    num_prompt_tokens: int
    num_cached_tokens: int
    effort: str
    budget_tokens: int | None
    num_choices: int = 1
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """Text to append to a choice; whole characters only. `thinking` tells the channel."""

    text: str
    thinking: bool = False
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenText, ...] = ()
    choice: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallDone:
    """A whole tool call of a choice, once its arguments are complete."""

    index: int
    call: ToolCall
    choice: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts; images are part of the prompt, thinking of the completion.

    Attributes:
        accepted_prediction_tokens: Of the predictions of all choices, what their answers had.
        rejected_prediction_tokens: The rest of these; in none of the other counts.
    """

    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    thinking_tokens: int
    image_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningReport:
    """What became of the thinking.

    `ended_by` is "model", "budget" or "caller"; None if there was none or it is still open.
    """

    effort: str
    budget_tokens: int | None
    thinking_tokens: int
    ended_by: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """When what happened, in seconds since the request arrived, and where the time went.

    Gateway, queue, prefill and decode follow one another and make up `total_s`; the gateway's
    part is what passes before the shard has the request and after it has told of an event. Of
    several choices they are those of the one that ended last.

    Attributes:
        first_token_s: None where it never came, as the next.
        prefill_s: From a request's first step to its first token; None if the shard did not tell.
        decode_s: From there to the end.
        stages: Seconds of the steps from the first to the last by `stages.STAGES`; not divided
            among the requests that shared them. Empty where a stop string ended the request.
    """

    queued_s: float
    first_token_s: float | None
    first_answer_token_s: float | None
    total_s: float
    prefill_s: float | None = None
    decode_s: float | None = None
    stages: Mapping[str, float] = field(default_factory=dict)

    def gap_s(self, num_tokens: float) -> float | None:
        """Mean seconds between so many tokens; None where there are no two."""
        if self.first_token_s is None or num_tokens <= 1:
            return None
        return (self.total_s - self.first_token_s) / (num_tokens - 1)

    def parts(self) -> dict[str, float]:
        """Seconds by part, as far as the shard told: those that make up the whole, then the stages.

        BETWEEN_STEPS is what prefill and decode spent in none of the stages: waiting for a plan,
        or for a place in a step.
        """
        if self.prefill_s is None or self.decode_s is None:
            return {}
        computing_s = self.prefill_s + self.decode_s
        split = {
            "gateway": max(self.total_s - self.queued_s - computing_s, 0.0),
            "queue": self.queued_s,
            "prefill": self.prefill_s,
            "decode": self.decode_s,
        }
        if not self.stages:
            return split
        between_s = max(computing_s - sum(self.stages.values()), 0.0)
        return {**split, **self.stages, BETWEEN_STEPS: between_s}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Last event of a choice that ended well; with the last choice's the generation ends.

    Attributes:
        is_last: Whether no choice goes on.
        reason: "stop", "length", "model_length", "tool_calls" or "cancelled".
        matched_stop: The stop string that ended it, if one did.
        stop_token_id: The stop token that ended it, if one did.
        usage: Of all choices that have ended by now; a prompt is counted once.
        timing: Of all choices together.
    """

    reason: str
    usage: Usage
    reasoning: ReasoningReport
    timing: Timing
    matched_stop: str | None = None
    stop_token_id: int | None = None
    choice: int = 0
    is_last: bool = True


GenerationEvent = Started | TextDelta | ToolCallDone | Finished
