"""What a caller asked for -> what a shard is told: options checked, defaults and efforts filled in.

Every refusal is an InvalidRequestError whose `param` is the name the caller knows the field by.
Nothing here waits or talks to the cell.
"""

from __future__ import annotations

import math
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import msgspec

from ostro.actors.engine.request import (
    GenerationRequest,
    SamplingParams,
    StopParams,
    ThinkingParams,
)
from ostro.actors.errors import InvalidRequestError
from ostro.cluster.generation import (
    ChatGeneration,
    ChatMessage,
    GenerationOptions,
    ModelCard,
    TextGeneration,
    Tool,
)
from ostro.cluster.images import no_vision
from ostro.cluster.model_card import check_model_name
from ostro.cluster.output_parser import OutputFormat
from ostro.cluster.prompt import Prompt, PromptBuilder
from ostro.cluster.prompt_messages import ends_in_thinking
from ostro.configs.deployment import EFFORTS, DeploymentConfig, EffortConfig
from ostro.configs.errors import ConfigError

_T = TypeVar("_T")

MAX_LOGPROBS = 20
MAX_STOP_LENGTH = 1024  # characters of one stop string
MAX_LIST_LENGTH = 1024  # entries of logit_bias and stop_token_ids
MAX_ID_LENGTH = 256  # characters of request_id and prompt_cache_key
_SEED_RANGE = 1 << 63  # seeds are folded into a non-negative int64
_SOFT_ZONE_SHARE = 8  # under an overridden budget the soft zone is at most this part of it


class _Range(NamedTuple):
    """Bounds of one option; `is_open` leaves the lower one out."""

    name: str
    lowest: float
    highest: float
    is_open: bool = False


_NUMBERS = (
    _Range("temperature", 0.0, 2.0),
    _Range("top_p", 0.0, 1.0, is_open=True),
    _Range("min_p", 0.0, 1.0),
    _Range("presence_penalty", -2.0, 2.0),
    _Range("frequency_penalty", -2.0, 2.0),
    _Range("repetition_penalty", 0.01, 2.0),
    _Range("queue_timeout_s", 0.0, 1e9, is_open=True),
)
_WHOLE_NUMBERS = (
    _Range("top_k", 0, math.inf),
    _Range("seed", -math.inf, math.inf),
    _Range("max_tokens", 1, math.inf),
    _Range("min_tokens", 0, math.inf),
    _Range("num_logprobs", 0, MAX_LOGPROBS),
    _Range("thinking_token_budget", -1, math.inf),
    _Range("priority", -(2**31), 2**31 - 1),
)
_PUBLIC_NAMES = {
    "cache_key": "prompt_cache_key",
    "num_logprobs": "top_logprobs",
    "queue_timeout_s": "queue_timeout",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A checked request, ready for the cell.

    Attributes:
        prompt_field: The public field that the prompt came from: "messages" or "prompt".
        length_is_context: The token limit is what the context has left, not what the caller asked.
        num_image_tokens: Prompt tokens that stand for images.
    """

    request: GenerationRequest
    options: GenerationOptions
    output_format: OutputFormat
    prompt_field: str
    effort: str
    budget_tokens: int | None
    length_is_context: bool
    num_image_tokens: int = 0

    @property
    def starts_in_thinking(self) -> bool:
        """Whether the prompt ends inside an open thinking block."""
        return self.request.thinking is not None and self.request.thinking.starts_open

    def without_pixels(self) -> Prepared:
        """What is needed once the cell has the request; images are megabytes."""
        return replace(self, request=msgspec.structs.replace(self.request, images=()))


class RequestBuilder:
    """Makes `GenerationRequest`s for one served model. Thread-safe."""

    def __init__(self, prompts: PromptBuilder, card: ModelCard, config: DeploymentConfig) -> None:
        """Take the parts.

        Raises:
            ConfigError: The tokenizer has more tokens than the model.
        """
        if len(prompts.table) > card.vocab_size:
            raise ConfigError(
                f"the tokenizer has {len(prompts.table)} tokens, the model's vocab_size is "
                f"{card.vocab_size}: they do not belong together"
            )
        self._prompts = prompts
        self._card = card
        self._config = config

    def chat(self, chat: ChatGeneration) -> Prepared:
        """Check and translate one assistant turn.

        Raises:
            InvalidRequestError: An option, the conversation or its length.
            NotFoundError: Another model was asked for.
        """
        check_model_name(self._card, chat.model)
        self._check_options(chat.options)
        _refuse_unserved(chat)
        effort = self.effort(chat.options.effort)
        budget = self._budget(chat.options, self._config.reasoning.efforts[effort])
        # A model that is told to think and may not would think in its answer.
        prompt = self._prompt(chat.messages, chat.tools, effort if budget != 0 else "none")
        thinking = self._thinking(chat, effort, budget)
        banned: list[int] = []
        if thinking is not None and budget == 0:
            banned.append(thinking.begin_token_id)
        if chat.tools and chat.tool_choice.mode == "none":
            banned.append(self._prompts.special.tool_calls)
        takes_tools = bool(chat.tools) and chat.tool_choice.mode == "auto"
        return self._prepare(
            chat.options,
            prompt,
            effort=effort,
            thinking=thinking,
            banned=tuple(banned),
            output_format=OutputFormat.TOOLS if takes_tools else OutputFormat.CHAT,
        )

    def text(self, text: TextGeneration) -> Prepared:
        """Check and translate a raw continuation. The effort only gives defaults for sampling.

        Raises:
            InvalidRequestError: An option, the prompt or its length.
            NotFoundError: Another model was asked for.
        """
        check_model_name(self._card, text.model)
        self._check_options(text.options)
        if text.options.thinking_token_budget is not None:
            raise _refused("thinking_token_budget", "does not go with a raw prompt")
        effort = self.effort(text.options.effort)
        if isinstance(text.prompt, str):
            token_ids = self._prompts.text(text.prompt)
        else:
            token_ids = list(text.prompt)
            self._check_token_ids("prompt", token_ids)
        if not token_ids:
            raise _refused("prompt", "needs at least one token")
        return self._prepare(
            text.options,
            Prompt(token_ids),
            effort=effort,
            thinking=None,
            banned=(),
            output_format=OutputFormat.RAW,
        )

    def effort(self, asked: str | None) -> str:
        """The effort in force.

        Raises:
            InvalidRequestError: There is no such effort; the text names those there are.
        """
        effort = self._config.reasoning.default_effort if asked is None else asked
        if effort not in EFFORTS:
            raise _refused(
                "reasoning_effort", f"must be one of {', '.join(EFFORTS)}", code="unsupported_value"
            )
        return effort

    def tokenize_chat(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool], effort: str | None
    ) -> list[int]:
        """Token ids of the exact prompt that a chat would get."""
        return self._prompt(messages, tools, self.effort(effort)).token_ids

    def _prompt(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool], effort: str
    ) -> Prompt:
        if not self._card.has_vision:
            for message in messages:
                if message.images:
                    raise no_vision(message)
        return self._prompts.chat(messages, tools, effort)

    def _prepare(
        self,
        options: GenerationOptions,
        prompt: Prompt,
        *,
        effort: str,
        thinking: ThinkingParams | None,
        banned: tuple[int, ...],
        output_format: OutputFormat,
    ) -> Prepared:
        field = "prompt" if output_format is OutputFormat.RAW else "messages"
        context_left = self._context_left(len(prompt.token_ids), field)
        row = self._config.reasoning.efforts[effort]
        asked_tokens = math.inf if options.max_tokens is None else options.max_tokens
        return Prepared(
            request=GenerationRequest(
                request_id=options.request_id or uuid.uuid4().hex,
                prompt_token_ids=prompt.token_ids,
                sampling=self._sampling(options, row, banned),
                stop=self._stop(options, context_left),
                thinking=thinking,
                cache_salt=options.cache_key,
                scheduling_class=row.scheduling_class + options.priority,
                tenant=options.tenant,
                images=prompt.images,
            ),
            options=options,
            output_format=output_format,
            prompt_field=field,
            effort=effort,
            budget_tokens=thinking.budget_tokens if thinking is not None else 0,
            length_is_context=asked_tokens > context_left,
            num_image_tokens=sum(image.num_tokens for image in prompt.images),
        )

    def _sampling(
        self, options: GenerationOptions, row: EffortConfig, banned: tuple[int, ...]
    ) -> SamplingParams:
        seed = secrets.randbelow(_SEED_RANGE) if options.seed is None else options.seed
        return SamplingParams(
            temperature=float(_either(options.temperature, row.temperature)),
            top_p=float(_either(options.top_p, row.top_p)),
            top_k=min(options.top_k or 0, self._card.vocab_size),
            min_p=float(_either(options.min_p, 0.0)),
            presence_penalty=float(_either(options.presence_penalty, 0.0)),
            frequency_penalty=float(_either(options.frequency_penalty, 0.0)),
            repetition_penalty=float(_either(options.repetition_penalty, 1.0)),
            logit_bias={token: float(bias) for token, bias in options.logit_bias.items()},
            seed=seed % _SEED_RANGE,
            num_logprobs=options.num_logprobs,
            banned_token_ids=banned,
        )

    def _stop(self, options: GenerationOptions, context_left: int) -> StopParams:
        max_tokens = min(_either(options.max_tokens, context_left), context_left)
        eos = self._prompts.special.eos
        ends = () if options.ignore_eos else self._card.end_token_ids
        return StopParams(
            max_tokens=max_tokens,
            min_tokens=min(options.min_tokens, max_tokens),
            eos_token_id=eos,
            stop_token_ids=(*options.stop_token_ids, *(id_ for id_ in ends if id_ != eos)),
            ignore_eos=options.ignore_eos,
        )

    def _budget(self, options: GenerationOptions, row: EffortConfig) -> int | None:
        asked = options.thinking_token_budget
        if asked is None:
            return row.budget_tokens
        return None if asked == -1 else min(asked, self._card.max_context)

    def _thinking(
        self, chat: ChatGeneration, effort: str, budget: int | None
    ) -> ThinkingParams | None:
        special = self._prompts.special
        if special.begin_think is None or special.end_think is None:
            return None
        soft_zone = self._config.reasoning.efforts[effort].soft_zone_tokens
        if chat.options.thinking_token_budget is not None:
            soft_zone = min(soft_zone, (budget or 0) // _SOFT_ZONE_SHARE)
        return ThinkingParams(
            begin_token_id=special.begin_think,
            end_token_id=special.end_think,
            budget_tokens=budget,
            soft_zone_tokens=soft_zone,
            closing_token_ids=self._prompts.closing_token_ids,
            starts_open=ends_in_thinking(chat.messages),
        )

    def _context_left(self, num_prompt_tokens: int, field: str) -> int:
        left = self._card.max_context - num_prompt_tokens
        if left < 1:
            raise InvalidRequestError(
                f"{field}: the prompt has {num_prompt_tokens} tokens; with at least one for the "
                f"answer the context holds {self._card.max_context}",
                code="context_length_exceeded",
                param=field,
            )
        return left

    def _check_options(self, options: GenerationOptions) -> None:
        for bounds in _NUMBERS:
            _check_number(bounds, getattr(options, bounds.name), (int, float))
        for bounds in _WHOLE_NUMBERS:
            _check_number(bounds, getattr(options, bounds.name), (int,))
        if options.max_tokens is not None and options.min_tokens > options.max_tokens:
            raise _refused("min_tokens", f"must not exceed max_tokens={options.max_tokens}")
        self._check_token_ids("stop_token_ids", options.stop_token_ids, MAX_LIST_LENGTH)
        self._check_token_ids("logit_bias", list(options.logit_bias), MAX_LIST_LENGTH)
        for bias in options.logit_bias.values():
            _check_number(_Range("logit_bias", -100.0, 100.0), bias, (int, float))
        for name in ("request_id", "cache_key"):
            _check_text(name, getattr(options, name) or "", MAX_ID_LENGTH)
        self._check_stop(options.stop)

    def _check_stop(self, stops: Sequence[str]) -> None:
        most = self._config.serving.max_stop_sequences
        if len(stops) > most:
            raise _refused("stop", f"takes at most {most} strings")
        for stop in stops:
            if not stop:
                raise _refused("stop", "must not hold an empty string")
            _check_text("stop", stop, MAX_STOP_LENGTH)

    def _check_token_ids(
        self, name: str, token_ids: Sequence[int], most: int | None = None
    ) -> None:
        if most is not None and len(token_ids) > most:
            raise _refused(name, f"takes at most {most} entries")
        size = self._card.vocab_size
        if not all(type(token_id) is int and 0 <= token_id < size for token_id in token_ids):
            raise _refused(name, f"takes token ids from 0 to {size - 1}")


def _refuse_unserved(chat: ChatGeneration) -> None:
    code = "unsupported_value"
    if chat.options.answer_format is not None:
        where = chat.options.answer_format.where
        raise _refused(where, "is not served yet: answers are not constrained", code=code)
    if chat.tool_choice.mode not in ("auto", "none"):
        raise _refused("tool_choice", "must be 'auto' or 'none'", code=code)
    if chat.tools and not chat.tool_choice.parallel:
        raise _refused("tool_choice", "cannot limit the number of calls yet", code=code)


def _either(asked: _T | None, default: _T) -> _T:
    return default if asked is None else asked


def _refused(name: str, text: str, *, code: str | None = None) -> InvalidRequestError:
    public = _PUBLIC_NAMES.get(name, name)
    return InvalidRequestError(f"{public} {text}", code=code, param=public)


def _check_number(bounds: _Range, value: object, kinds: tuple[type, ...]) -> None:
    if value is None:
        return
    if isinstance(value, (int, float)) and isinstance(value, kinds) and not isinstance(value, bool):
        is_above = value > bounds.lowest if bounds.is_open else value >= bounds.lowest
        if is_above and value <= bounds.highest:  # NaN is neither
            return
    kind = "a number" if float in kinds else "a whole number"
    lower = f" above {bounds.lowest:g}" if bounds.is_open else f" of at least {bounds.lowest:g}"
    upper = f" and at most {bounds.highest:g}"
    limits = (lower, "")[bounds.lowest == -math.inf] + (upper, "")[bounds.highest == math.inf]
    raise _refused(bounds.name, f"must be {kind}{limits}")


def _check_text(name: str, text: str, max_length: int) -> None:
    if len(text) > max_length:
        raise _refused(name, f"takes at most {max_length} characters")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _refused(name, "is not valid Unicode text") from error
