"""A generation request: what travels to the shard that serves it, and its life there.

The wire types are msgspec structs, so the step plane and the token path carry them as they are.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from enum import Enum, StrEnum, auto
from typing import TYPE_CHECKING

import msgspec

from ostro.actors.engine.followed_text import FollowedText, followed_text
from ostro.actors.engine.stopwatch import ShardSeconds, Stopwatch
from ostro.actors.errors import InvalidTransitionError

if TYPE_CHECKING:
    from ostro.actors.engine.answer_grammar import AnswerGrammar
    from ostro.actors.engine.effort import ThinkingTracker
    from ostro.actors.engine.ngrams import NgramIndex


GRAMMAR_FAILED = "grammar_failed"  # error code of an answer that its grammar brought to a stop


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen. Validated where a request is made (`cluster`).

    Attributes:
        temperature: 0 means greedy.
        top_p: Nucleus mass in (0, 1].
        top_k: Keep the k most likely; 0 keeps all.
        min_p: Drop tokens below min_p times the most likely one's probability.
        presence_penalty: Subtracted once from the logit of every token already produced.
        frequency_penalty: Subtracted once per occurrence in the output.
        repetition_penalty: Divides positive and multiplies negative logits of tokens in prompt or
            output.
        logit_bias: Added to logits, by token id.
        seed: Key of the counter-based generator; with the token's position it fixes the draw.
        num_logprobs: None for none; n for the chosen token's logprob and the n best alternatives.
        banned_token_ids: Never chosen.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    num_logprobs: int | None = None
    banned_token_ids: tuple[int, ...] = ()

    @property
    def needs_counts(self) -> bool:
        """Whether the tokens so far change the logits."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )


class StopParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """When a generation ends. `max_tokens` counts thinking and answer together."""

    max_tokens: int
    min_tokens: int = 0
    eos_token_id: int = 2
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


class ThinkingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The thinking budget of one request.

    Attributes:
        begin_token_id: `[THINK]`.
        end_token_id: `[/THINK]`.
        budget_tokens: Thinking tokens allowed before the close is forced; None is unlimited, 0
            forbids thinking (`begin_token_id` is then banned).
        soft_zone_tokens: Over the last so many tokens of the budget the close grows more likely.
        closing_token_ids: What is forced when the budget ends; its last token is `end_token_id`.
        starts_open: The prompt ends inside an open thinking block.
        ended_by_caller: The caller ended it in an attempt that was lost: the output so far shows
            what came of that.
    """

    begin_token_id: int
    end_token_id: int
    budget_tokens: int | None = None
    soft_zone_tokens: int = 0
    closing_token_ids: tuple[int, ...] = ()
    starts_open: bool = False
    ended_by_caller: bool = False


class GrammarParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The form that an answer must have. Thinking is no part of the answer and stays free.

    Attributes:
        text: The grammar as llguidance takes it: Lark, or its JSON.
        prefix_token_ids: The part of the answer that the prompt ends with.
        held_token_ids: Not chosen while thinking is open: they would end it without an answer.
    """

    text: str
    prefix_token_ids: tuple[int, ...] = ()
    held_token_ids: tuple[int, ...] = ()


class ImageInput(msgspec.Struct, frozen=True, kw_only=True):
    """One image of a prompt, made ready for the vision tower.

    Attributes:
        start: Place of its first `[IMG]` in `prompt_token_ids`.
        num_tokens: Tokens of its whole span: rows of `[IMG]`, `[IMG_BREAK]` after each, and
            `[IMG_END]` after the last.
        height: Pixels; a multiple of patch size times merge size, as the width.
        width: Pixels.
        pixels: Normalised values as little-endian float16, channels first [3, height, width].
        digest: 16 bytes that name the pixels and their shape; equal images have equal digests.
    """

    start: int
    num_tokens: int
    height: int
    width: int
    pixels: bytes
    digest: bytes


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Everything a shard needs to serve one request, and to serve it again after a failure.

    Attributes:
        request_id: The caller's; from the ingress on a `choices.unique_id` of it.
        prompt_token_ids: At least one token.
        cache_salt: Requests share prefix cache only under the same salt.
        scheduling_class: Lower runs earlier when requests wait.
        tenant: Whose request it is; tenants share a shard fairly. "" for nobody.
        images: In the order of their places in the prompt.
        grammar: What the answer is held to, if to anything.
        choice: Which of its caller's answers this is; of several choices, the first.
        num_choices: Answers to sample from the prompt; `choices.each_choice` takes them apart.
        prompt_shared_by: How many choices, each now a request, were made of the one prompt.
        prediction: What the answer will mostly be, as its caller believes, as
            `followed_text.packed`; no part of the prompt. It is drafted from and changes no answer.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    stop: StopParams
    thinking: ThinkingParams | None = None
    cache_salt: str = ""
    scheduling_class: int = 0
    tenant: str = ""
    images: tuple[ImageInput, ...] = ()
    grammar: GrammarParams | None = None
    choice: int = 0
    num_choices: int = 1
    prompt_shared_by: int = 1
    prediction: bytes = b""

    @property
    def counted_prompt_tokens(self) -> int:
        """Its part of the prompt, which only one of the choices that share it computes."""
        return -(-len(self.prompt_token_ids) // self.prompt_shared_by)


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    LENGTH = "length"
    MODEL_LENGTH = "model_length"
    CANCELLED = "cancelled"
    ERROR = "error"


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probability of a token and of its best alternatives (id, logprob), best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class TokenEvent(msgspec.Struct, frozen=True, array_like=True):
    """What one step brought to one request.

    Attributes:
        request_id: Whose tokens these are.
        first_index: Place of `token_ids[0]` in the output, so that a reader can drop repeats.
        token_ids: New output tokens, including the stop token.
        logprobs: One per token if asked for.
        num_cached_tokens: Prompt tokens that came from the prefix cache.
        num_thinking_tokens: Thinking tokens so far, the two marks not counted.
        thinking_ended_by: "model", "budget" or "caller", once thinking has ended.
        finish_reason: Set on the last event.
        stop_token_id: The token that ended the output, if one did.
        error_code: `OstroError.code` when `finish_reason` is ERROR.
        error_message: Text for the caller when `finish_reason` is ERROR.
        seconds: The request's time at the shard; on the first event and on the last.
        choice: `GenerationRequest.choice`.
        num_predicted_tokens: Of the request's prediction, those that the answer had so far.
    """

    request_id: str
    first_index: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    num_cached_tokens: int = 0
    num_thinking_tokens: int = 0
    thinking_ended_by: str | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error_code: str | None = None
    error_message: str | None = None
    seconds: ShardSeconds | None = None
    choice: int = 0
    num_predicted_tokens: int = 0

    def joined(self, later: TokenEvent) -> TokenEvent | None:
        """One event that tells both; None if `later` is an error or does not follow on this one.

        For a reader that is behind: it handles several tokens at the cost of one.
        """
        follows = later.first_index == self.first_index + len(self.token_ids)
        if not follows or self.finish_reason or later.finish_reason is FinishReason.ERROR:
            return None
        logprobs = [*(self.logprobs or ()), *(later.logprobs or ())]
        return msgspec.structs.replace(
            later,
            first_index=self.first_index,
            token_ids=[*self.token_ids, *later.token_ids],
            logprobs=logprobs or None,
            seconds=later.seconds or self.seconds,
        )


class RequestState(Enum):
    """Life of a request in its shard."""

    WAITING = auto()
    RUNNING = auto()
    PREEMPTED = auto()
    FINISHED = auto()


_NEXT = {
    RequestState.WAITING: {RequestState.RUNNING, RequestState.FINISHED},
    RequestState.RUNNING: {RequestState.PREEMPTED, RequestState.FINISHED},
    RequestState.PREEMPTED: {RequestState.RUNNING, RequestState.FINISHED},
    RequestState.FINISHED: set(),
}


class RequestProgress:
    """The mutable life of one request: state, tokens, pages.

    Only the scheduler writes it. `pages` may be held by reference: it only grows while the request
    holds it, and a request that loses its pages gets a new array. An array, because a step copies
    the pages of all its requests: 64,000 numbers of lists took 11 ms.

    Attributes:
        output_token_ids: Known output; given at construction where one goes on after a failure.
        draft_token_ids: Guesses of what follows the known tokens, for the next step to verify.
        drafts_are_told: Whether they are what a caller predicted, or what rules force: they say
            nothing of who guesses.
        ngrams: Index of its text, for who drafts from that.
        is_resumed: Whether it goes on, with output or without any yet: it was let in once.
        num_computed_tokens: Latents that are in the cache or that a planned step will put there.
        num_cached_tokens: Prompt tokens found in the prefix cache when the request first ran.
        num_pending_outputs: Outputs that planned steps will sample.
        num_in_flight: Planned steps whose results are not in yet.
        arrival: Place in the order of arrivals at the scheduler.
        max_num_tokens: Prompt plus output is never longer.
        stop_token_ids: Any of them ends the output.
        thinking: The budget's state, if the request has one.
        grammar: The state of what holds the answer, if the request has one; set before the
            scheduler takes the request.
        stopwatch: Runs from the request's first step on.
        page_hashes: Hash chain of the leading full pages, as far as it was needed yet.
        num_published_pages: Leading pages that were offered to the prefix cache or came from there.
    """

    __slots__ = (
        "_prediction",
        "arrival",
        "arrived_s",
        "draft_token_ids",
        "drafts_are_told",
        "grammar",
        "is_resumed",
        "max_num_tokens",
        "ngrams",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_in_flight",
        "num_pending_outputs",
        "num_prompt_tokens",
        "num_published_pages",
        "output_token_ids",
        "page_hashes",
        "pages",
        "request",
        "request_id",
        "state",
        "stop_token_ids",
        "stopwatch",
        "thinking",
    )

    def __init__(
        self,
        request: GenerationRequest,
        *,
        arrived_s: float,
        output_token_ids: Sequence[int] | None = None,
    ) -> None:
        self.request = request
        self.request_id = request.request_id
        self.arrived_s = arrived_s
        self.state = RequestState.WAITING
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.output_token_ids = list(output_token_ids or ())
        self.draft_token_ids: list[int] = []
        self.drafts_are_told = False
        self.ngrams: NgramIndex | None = None
        self._prediction: FollowedText | None = None
        self.is_resumed = output_token_ids is not None
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_pending_outputs = 0
        self.num_in_flight = 0
        self.arrival = 0
        self.max_num_tokens = self.num_prompt_tokens + request.stop.max_tokens
        self.stop_token_ids = _stop_token_ids(request.stop)
        self.thinking: ThinkingTracker | None = None
        self.grammar: AnswerGrammar | None = None
        self.stopwatch: Stopwatch | None = None
        self.pages = array("i")
        self.page_hashes: list[int] = []
        self.num_published_pages = 0

    @property
    def prediction(self) -> FollowedText | None:
        """Where the output stands in what was predicted, if anything was; made when first asked."""
        if self._prediction is None and self.request.prediction:
            self._prediction = followed_text(self.request, self.output_token_ids)
        return self._prediction

    @property
    def num_known_tokens(self) -> int:
        """Prompt and known output."""
        return self.num_prompt_tokens + len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt, known output and outputs that a planned step will sample."""
        return self.num_prompt_tokens + len(self.output_token_ids) + self.num_pending_outputs

    def token_at(self, position: int) -> int | None:
        """Token id at a position, or None where a planned step has yet to sample it."""
        if position < self.num_prompt_tokens:
            return self.request.prompt_token_ids[position]
        index = position - self.num_prompt_tokens
        return self.output_token_ids[index] if index < len(self.output_token_ids) else None

    def known_tokens(self, start: int, end: int) -> list[int]:
        """Token ids at positions [start, end), as far as they are known."""
        num_prompt = self.num_prompt_tokens
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : end - num_prompt]
        prompt = self.request.prompt_token_ids
        if end <= num_prompt:
            return prompt[start:end]
        return prompt[start:] + self.output_token_ids[: end - num_prompt]

    def move_to(self, state: RequestState) -> None:
        """Change state, or raise InvalidTransitionError if the move is not in `_NEXT`."""
        if state not in _NEXT[self.state]:
            raise InvalidTransitionError(f"{self.request_id}: {self.state.name} -> {state.name}")
        self.state = state


def _stop_token_ids(stop: StopParams) -> frozenset[int]:
    if stop.ignore_eos:
        return frozenset(stop.stop_token_ids)
    return frozenset((stop.eos_token_id, *stop.stop_token_ids))
