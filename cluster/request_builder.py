"""What a caller asked for -> what a shard is told: options checked, defaults and efforts filled in.

Every refusal is an InvalidRequestError whose `param` is the name the caller knows the field by.
Nothing here talks to the cell; only a grammar that is not known yet is waited for.
"""

from __future__ import annotations

import math
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import msgspec

from ostro.actors.engine.choice_seed import SEED_RANGE
from ostro.actors.engine.followed_text import packed
from ostro.actors.engine.request import (
    GenerationRequest,
    GrammarParams,
    SamplingParams,
    StopParams,
    ThinkingParams,
)
from ostro.actors.errors import InvalidRequestError
from ostro.cluster.answer_grammar import AnswerGrammars
from ostro.cluster.generation import (
    ChatGeneration,
    ChatMessage,
    GenerationOptions,
    TextGeneration,
    Tool,
)
from ostro.cluster.images import no_vision
from ostro.cluster.model_card import ModelCard, check_model_name
from ostro.cluster.option_checks import check_options, check_token_ids, refused
from ostro.cluster.output_parser import OutputFormat
from ostro.cluster.prompt import Prompt, PromptBuilder
from ostro.cluster.prompt_messages import ends_in_thinking
from ostro.cluster.tenant_caches import with_own_caches
from ostro.configs.deployment import DeploymentConfig
from ostro.configs.errors import ConfigError
from ostro.configs.reasoning import EFFORTS, EffortConfig

_T = TypeVar("_T")

_SOFT_ZONE_SHARE = 8  # under an overridden budget the soft zone is at most this part of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A checked request, or one prompt of it, ready for the cell.

    Attributes:
        prompt_field: The public field that the prompt came from, such as "messages".
        length_is_context: The token limit is what the context has left, not what the caller asked.
        num_image_tokens: Prompt tokens that stand for images.
        echo: What every choice begins with.
    """

    request: GenerationRequest
    options: GenerationOptions
    output_format: OutputFormat
    prompt_field: str
    effort: str
    budget_tokens: int | None
    length_is_context: bool
    num_image_tokens: int = 0
    echo: str = ""

    @property
    def starts_in_thinking(self) -> bool:
        """Whether the prompt ends inside an open thinking block."""
        return self.request.thinking is not None and self.request.thinking.starts_open

    def without_pixels(self) -> Prepared:
        """What is needed once the cell has the request; images are megabytes."""
        return replace(self, request=msgspec.structs.replace(self.request, images=()))


class _TokenRules(NamedTuple):
    """What a request's tokens must keep to."""

    thinking: ThinkingParams | None = None
    banned_token_ids: tuple[int, ...] = ()
    grammar: GrammarParams | None = None


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
        self._grammars = AnswerGrammars(prompts, card)

    def check_chat(self, chat: ChatGeneration) -> None:
        """Refuse what costs little to find, before images are fetched. Raises as `chat`."""
        check_model_name(self._card, chat.model)
        check_options(chat.options, self._card, self._config.serving)
        self.check_messages(chat.messages, chat.tools, chat.options.effort)

    def check_messages(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool], effort: str | None
    ) -> None:
        """Refuse a conversation likewise. Raises as `tokenize_chat`."""
        self.effort(effort)
        self._check_vision(messages)
        self._prompts.check(messages, tools)

    def chat(self, chat: ChatGeneration) -> list[Prepared]:
        """Check and translate one assistant turn, which has one prompt.

        Raises:
            InvalidRequestError: An option, the conversation or its length.
            NotFoundError: Another model was asked for.
        """
        check_model_name(self._card, chat.model)
        check_options(chat.options, self._card, self._config.serving)
        effort = self.effort(chat.options.effort)
        budget = self._budget(chat.options, self._config.reasoning.efforts[effort])
        prompt = self._prompt(chat.messages, chat.tools, effort, budget)
        thinking = self._thinking(chat, effort, budget)
        banned: list[int] = []
        if thinking is not None and budget == 0:
            banned.append(thinking.begin_token_id)
        if chat.tools and chat.tool_choice.mode == "none":
            banned.append(self._prompts.special.tool_calls)
        takes_tools = bool(chat.tools) and chat.tool_choice.mode != "none"
        prepared = self._prepare(
            chat.options,
            prompt,
            "messages",
            _TokenRules(thinking, tuple(banned), self._grammars.chat(chat)),
            effort=effort,
            output_format=OutputFormat.TOOLS if takes_tools else OutputFormat.CHAT,
        )
        return [prepared]

    def text(self, text: TextGeneration) -> list[Prepared]:
        """Check and translate raw continuations. The effort only gives defaults for sampling.

        Raises:
            InvalidRequestError: An option, a prompt or its length.
            NotFoundError: Another model was asked for.
        """
        check_model_name(self._card, text.model)
        check_options(text.options, self._card, self._config.serving)
        if text.options.thinking_token_budget is not None:
            raise refused("thinking_token_budget", "does not go with a raw prompt")
        if text.echo and text.options.num_logprobs is not None:
            raise refused("echo", "does not go with logprobs: prompt tokens have none here")
        most = self._config.serving.max_prompts
        if not 1 <= len(text.prompts) <= most:
            raise refused("prompt", f"takes from 1 to {most} prompts, not {len(text.prompts)}")
        request_id = text.options.request_id or uuid.uuid4().hex
        options = replace(text.options, request_id=request_id)
        effort = self.effort(options.effort)
        rules = _TokenRules(grammar=self._grammars.text(options.answer_format))
        prepared = []
        for index, prompt in enumerate(text.prompts):
            field = "prompt" if len(text.prompts) == 1 else f"prompt[{index}]"
            of_prompt = self._prepare(
                options,
                Prompt(self._raw_token_ids(prompt, field)),
                field,
                rules,
                effort=effort,
                output_format=OutputFormat.RAW,
                first_choice=index * options.num_choices,
            )
            echo = self._echo(prompt) if text.echo else ""
            prepared.append(replace(of_prompt, echo=echo))
        return prepared

    def _raw_token_ids(self, prompt: str | tuple[int, ...], field: str) -> list[int]:
        if isinstance(prompt, str):
            token_ids = self._prompts.text(prompt)
        else:
            token_ids = list(prompt)
            check_token_ids(field, token_ids, self._card.vocab_size)
        if not token_ids:
            raise refused(field, "needs at least one token")
        return token_ids

    def _echo(self, prompt: str | tuple[int, ...]) -> str:
        return prompt if isinstance(prompt, str) else self._prompts.table.decode(prompt)

    def effort(self, asked: str | None) -> str:
        """The effort in force.

        Raises:
            InvalidRequestError: There is no such effort; the text names those there are.
        """
        effort = self._config.reasoning.default_effort if asked is None else asked
        if effort not in EFFORTS:
            raise refused(
                "reasoning_effort", f"must be one of {', '.join(EFFORTS)}", code="unsupported_value"
            )
        return effort

    def tokenize_chat(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool], effort: str | None
    ) -> list[int]:
        """Token ids of the exact prompt that a chat would get.

        Raises:
            InvalidRequestError: The effort or the conversation.
        """
        effort = self.effort(effort)
        budget = self._config.reasoning.efforts[effort].budget_tokens
        return self._prompt(messages, tools, effort, budget).token_ids

    def _prompt(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool],
        effort: str,
        budget: int | None,
    ) -> Prompt:
        self._check_vision(messages)
        # A model that is told to think and may not would think in its answer.
        return self._prompts.chat(messages, tools, "none" if budget == 0 else effort)

    def _check_vision(self, messages: Sequence[ChatMessage]) -> None:
        if not self._card.has_vision:
            for message in messages:
                if message.images:
                    raise no_vision(message)

    def _prepare(
        self,
        options: GenerationOptions,
        prompt: Prompt,
        field: str,
        rules: _TokenRules,
        *,
        effort: str,
        output_format: OutputFormat,
        first_choice: int = 0,
    ) -> Prepared:
        context_left = self._context_left(len(prompt.token_ids), field)
        row = self._config.reasoning.efforts[effort]
        asked_tokens = math.inf if options.max_tokens is None else options.max_tokens
        request = GenerationRequest(
            request_id=options.request_id or uuid.uuid4().hex,
            prompt_token_ids=prompt.token_ids,
            sampling=self._sampling(options, row, rules.banned_token_ids),
            stop=self._stop(options, context_left),
            thinking=rules.thinking,
            cache_salt=options.cache_key,
            scheduling_class=row.scheduling_class + options.priority,
            tenant=options.tenant,
            images=prompt.images,
            grammar=rules.grammar,
            choice=first_choice,
            num_choices=options.num_choices,
            prediction=self._predicted(options),
        )
        if not self._config.security.share_prefix_cache:
            request = with_own_caches(request)
        return Prepared(
            request=request,
            options=options,
            output_format=output_format,
            prompt_field=field,
            effort=effort,
            budget_tokens=rules.thinking.budget_tokens if rules.thinking is not None else 0,
            length_is_context=asked_tokens > context_left,
            num_image_tokens=sum(image.num_tokens for image in prompt.images),
        )

    def _predicted(self, options: GenerationOptions) -> bytes:
        """Token ids of the prediction, packed; none where nobody would draft from them."""
        if not options.prediction or not self._card.heeds_predictions:
            return b""
        field, most = "prediction", self._card.max_context
        token_ids = self._prompts.text(options.prediction, add_bos=False, field=field)
        if len(token_ids) > most:
            raise InvalidRequestError(
                f"{field}: it has {len(token_ids)} tokens; no answer has more than the context, "
                f"which holds {most}",
                code="context_length_exceeded",
                param=field,
            )
        return packed(token_ids)

    def _sampling(
        self, options: GenerationOptions, row: EffortConfig, banned: tuple[int, ...]
    ) -> SamplingParams:
        seed = secrets.randbelow(SEED_RANGE) if options.seed is None else options.seed
        return SamplingParams(
            temperature=float(_either(options.temperature, row.temperature)),
            top_p=float(_either(options.top_p, row.top_p)),
            top_k=min(options.top_k or 0, self._card.vocab_size),
            min_p=float(_either(options.min_p, 0.0)),
            presence_penalty=float(_either(options.presence_penalty, 0.0)),
            frequency_penalty=float(_either(options.frequency_penalty, 0.0)),
            repetition_penalty=float(_either(options.repetition_penalty, 1.0)),
            logit_bias={token: float(bias) for token, bias in options.logit_bias.items()},
            seed=seed % SEED_RANGE,
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


def _either(asked: _T | None, default: _T) -> _T:
    return default if asked is None else asked
