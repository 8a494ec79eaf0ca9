"""A device and a model for tests of the scheduler, and short ways to make requests.

The device keeps, in every slot of every page, the position and the token whose latent would be
there; a token of an image counts as another one for every digest. The model's next token is a hash
of all tokens that it reads through a request's pages: a wrong page, a stale slot or a gap between
chunks changes the output.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from llguidance import LLMatcher

from ostro.actors.engine.answer_grammar import AnswerGrammar
from ostro.actors.engine.grammar import make_tokenizer
from ostro.actors.engine.request import (
    FinishReason,
    GenerationRequest,
    GrammarParams,
    ImageInput,
    RequestProgress,
    SamplingParams,
    StopParams,
    ThinkingParams,
    TokenLogprob,
)
from ostro.actors.engine.rounds import Choice, choose_in_rounds
from ostro.actors.engine.scheduler import Scheduler
from ostro.actors.engine.step import SampledToken, ScheduledRequest, ScheduledStep
from ostro.actors.engine.token_rules import SamplingState, begin, observe, sampling_state
from ostro.actors.engine.vocabulary import Vocabulary

EOS = 2
VOCABULARY = 12
_NAMES = [b"<unk>", b"<s>", b"</s>", b"<THINK>", b"</THINK>"]
_TOKENIZER = make_tokenizer(
    Vocabulary(
        pieces=[*_NAMES, *(bytes([letter]) for letter in b"abcdefg")],
        num_special=len(_NAMES),
        eos_token_id=EOS,
        pattern=".",
    ),
    VOCABULARY,
)


def make_request(
    request_id: str = "r",
    prompt: Sequence[int] = (7, 8, 9),
    *,
    max_tokens: int = 4,
    min_tokens: int = 0,
    stop_token_ids: tuple[int, ...] = (),
    ignore_eos: bool = False,
    thinking: ThinkingParams | None = None,
    cache_salt: str = "",
    scheduling_class: int = 0,
    tenant: str = "",
    images: tuple[ImageInput, ...] = (),
    grammar: GrammarParams | None = None,
) -> GenerationRequest:
    """A greedy request. To a grammar, tokens from 5 on are the letters from a on."""
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        sampling=SamplingParams(),
        stop=StopParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            eos_token_id=EOS,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
        ),
        thinking=thinking,
        cache_salt=cache_salt,
        scheduling_class=scheduling_class,
        tenant=tenant,
        images=images,
        grammar=grammar,
    )


def make_progress(
    request: GenerationRequest, *output: int, arrived_s: float = 0.0
) -> RequestProgress:
    """A request as a shard hands it to the scheduler."""
    progress = RequestProgress(request, arrived_s=arrived_s, output_token_ids=output or None)
    if request.grammar is not None:
        matcher = LLMatcher(_TOKENIZER, request.grammar.text, log_level=0)
        progress.grammar = AnswerGrammar(matcher, request.grammar)
    return progress


def make_fake_image(start: int, num_tokens: int, mark: int) -> ImageInput:
    """An image without pixels; as ever, its digest tells what is on it (the mark) and its size."""
    return ImageInput(
        start=start,
        num_tokens=num_tokens,
        height=1,
        width=1,
        pixels=b"",
        digest=bytes([mark, num_tokens]) * 8,
    )


def seen_tokens(request: GenerationRequest, tokens: Sequence[int], start: int = 0) -> list[int]:
    """Tokens at positions from `start` on as the model sees them, with what images show."""
    seen = list(tokens)
    for image in request.images:
        for position in range(image.start, image.start + image.num_tokens):
            if start <= position < start + len(seen):
                seen[position - start] += 16 * image.digest[0]
    return seen


def fake_next_token(tokens: Sequence[int], state: SamplingState) -> int:
    """The model: any token of the vocabulary, by hash; obeys the scheduler's wishes."""
    if state.forced_token_id is not None:
        return state.forced_token_id
    draw = zlib.crc32(bytes(tokens))
    if state.bias is not None and draw % 16 < 2 * state.bias[1]:
        return state.bias[0]
    choices = [token for token in range(VOCABULARY) if token not in state.banned_token_ids]
    if state.allowed is not None:
        choices = [token for token in choices if state.allowed[token // 8] >> token % 8 & 1]
    return choices[draw % len(choices)]


def expected_generation(
    request: GenerationRequest, *, max_context: int
) -> tuple[list[int], FinishReason]:
    """What the model says to a request that is alone in the world, and why it ends."""
    alone = make_progress(request)
    begin(alone)
    grammar, output = alone.grammar, alone.output_token_ids
    stop_ids = set(request.stop.stop_token_ids)
    if not request.stop.ignore_eos:
        stop_ids.add(EOS)
    while True:
        tokens = request.prompt_token_ids + output
        token = fake_next_token(seen_tokens(request, tokens), sampling_state(alone))
        if grammar is not None and grammar.error is not None:
            return output, FinishReason.ERROR
        output.append(token)
        observe(alone, token)
        if grammar is not None and grammar.is_complete:
            return output, FinishReason.STOP
        if token in stop_ids and len(output) > request.stop.min_tokens:
            return output, FinishReason.STOP
        if len(output) == request.stop.max_tokens:
            return output, FinishReason.LENGTH
        if len(tokens) + 1 == max_context:
            return output, FinishReason.MODEL_LENGTH


class FakeDevice:
    """Runs steps in order, whenever it is told to; checks that what it reads is what was meant."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._slots: dict[tuple[int, int], tuple[int, int]] = {}
        self._sampled: dict[int, int] = {}
        self.num_rounds = 0

    def run(self, step: ScheduledStep, scheduler: Scheduler | None = None) -> None:
        """Execute a step: all latents are written before any is read, as in one forward.

        A step may be cut into micro-batches too, so nobody may read what a later entry writes.
        What is sampled goes to the scheduler; without one nothing is.
        """
        writers: dict[tuple[int, int], int] = {}
        for index, entry in enumerate(step.entries):
            self._write(entry, index, writers)
        read = {
            id(entry): self._read(entry, index, writers) for index, entry in enumerate(step.entries)
        }
        if scheduler is None:
            return

        def choose(choices: Sequence[Choice]) -> list[SampledToken]:
            self.num_rounds += 1
            return [
                SampledToken(
                    token_id := fake_next_token(read[id(entry)][:position], state),
                    TokenLogprob(token_id, -float(position), []),
                )
                for entry, position, _, state in choices
            ]

        def accept(entry: ScheduledRequest, token: SampledToken) -> bool:
            self._sampled[id(entry.progress)] = token.token_id
            return scheduler.accept(entry, token)

        choose_in_rounds(step, choose, accept, lambda _: None)

    def _slot(self, entry: ScheduledRequest, position: int) -> tuple[int, int]:
        return entry.pages[position // self._page_size], position % self._page_size

    def _write(
        self, entry: ScheduledRequest, index: int, writers: dict[tuple[int, int], int]
    ) -> None:
        assert len(entry.token_ids) == entry.num_tokens
        assert None not in entry.token_ids[:-1]
        known = [
            self._sampled[id(entry.progress)] if token is None else token
            for token in entry.token_ids
        ]
        seen = seen_tokens(entry.progress.request, known, entry.start)
        for offset, token in enumerate(seen):
            position = entry.start + offset
            slot = self._slot(entry, position)
            assert slot not in writers, f"two writers of {slot}"
            writers[slot] = index
            self._slots[slot] = (position, token)

    def _read(
        self, entry: ScheduledRequest, index: int, writers: dict[tuple[int, int], int]
    ) -> list[int]:
        end = entry.start + entry.num_tokens
        slots = [self._slot(entry, position) for position in range(end)]
        assert all(writers.get(slot, index) <= index for slot in slots), "read before written"
        read = [self._slots[slot] for slot in slots]
        assert [position for position, _ in read] == list(range(end))
        tokens = [token for _, token in read]
        known = seen_tokens(entry.progress.request, entry.progress.known_tokens(0, end))
        assert tokens[: len(known)] == known
        return tokens
