"""Who drafts the tokens that the next step of an attention shard verifies, and how many."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from ostro.actors.engine.draft_length import DraftLength
from ostro.actors.engine.forced_drafts import draft_forced
from ostro.actors.engine.ngrams import NgramIndex
from ostro.actors.engine.request import RequestProgress, RequestState
from ostro.actors.engine.step import ScheduledStep
from ostro.actors.model.batch import Batch
from ostro.configs.speculation import DraftMethod, SpeculationConfig

# Finds a request pages for so many tokens; False, and none taken, where that cost others theirs.
GrowPages = Callable[[RequestProgress, int], bool]

# New text of a step that an index takes in: 3 ms of a core, less than a step with so long a prompt.
_MOST_INDEXED = 8192
_MOST_OF_PROMPT = 2**16  # tokens looked up in, of one prompt: 7 MB

# So many requests take 0.1 ms to look up; where drafts did not pay, so many steps do without.
_MANY = 32
_REST_STEPS = 15


class Drafter(Protocol):
    """Guesses the next tokens of requests. A wrong guess costs time and never an answer."""

    def draft(self, step: ScheduledStep, batches: Sequence[Batch], num_drafts: int) -> None:
        """Set `draft_token_ids` of the requests of a completed step that will decode next.

        Args:
            step: Its tokens are chosen, and known to its requests; some of these have ended by now,
                or wait to begin again, and get no drafts.
            batches: The step's micro-batches as the decoder took them.
            num_drafts: Drafts of a request, at most; 0 asks for none, and a drafter that keeps
                something of each token still takes note of the step.
        """
        ...


class NgramDrafter:
    """Drafts what followed the same tokens earlier in a request's prompt and output."""

    def __init__(self, config: SpeculationConfig) -> None:
        self._max_ngram, self._min_ngram = config.max_ngram, config.min_ngram

    def draft(self, step: ScheduledStep, batches: Sequence[Batch], num_drafts: int) -> None:
        """See `Drafter`; prompts are taken in while they are computed."""
        left = _MOST_INDEXED
        for entry in step.entries:
            progress = entry.progress
            if progress.state is not RequestState.RUNNING:
                continue
            if (index := progress.ngrams) is None:
                index = progress.ngrams = NgramIndex(
                    progress.request.prompt_token_ids,
                    progress.output_token_ids,
                    max_ngram=self._max_ngram,
                    min_ngram=self._min_ngram,
                    most_of_prompt=_MOST_OF_PROMPT,
                )
            left -= index.extend(left)
            if entry.samples and num_drafts:
                progress.draft_token_ids = index.draft(num_drafts)


class Drafting:
    """What an engine does about drafts when a step is through: how many, and by whom."""

    def __init__(self, drafter: Drafter, config: SpeculationConfig) -> None:
        self._drafter = drafter
        self._most = config.num_draft_tokens
        self._length = DraftLength(self._most) if config.adaptive else None
        # Looking something up costs next to nothing, and who has drafts then tells what they pay.
        self._drafts_first = config.method is DraftMethod.NGRAM
        self._num_resting = 0  # steps for which nobody looks anything up

    @property
    def is_resting(self) -> bool:
        """Whether the step that runs now gets no drafts, so that the next one can be planned."""
        return self._num_resting > 0

    def after(self, step: ScheduledStep, batches: Sequence[Batch]) -> None:
        """Have drafts made for the next step; `step` is completed."""
        if self._length is None:
            num_drafts = self._most
            self._drafter.draft(step, batches, num_drafts)
        else:
            num_drafts = self._draft_what_pays(self._length, step, batches)
        draft_predicted(step, self._most, num_drafts)
        draft_forced(step, self._most)

    def _draft_what_pays(
        self, length: DraftLength, step: ScheduledStep, batches: Sequence[Batch]
    ) -> int:
        length.record(step)
        decoding = [
            entry.progress
            for entry in step.entries
            if entry.samples and entry.progress.state is RequestState.RUNNING
        ]
        if self._num_resting:
            self._num_resting -= 1
            num_drafts = 0
        elif self._drafts_first:
            self._drafter.draft(step, batches, self._most)
            offered = _offered(decoding, self._most)
            num_drafts = length.choose(len(decoding), offered)
            for progress in decoding:
                del progress.draft_token_ids[num_drafts:]
            is_many = len(decoding) >= _MANY and not any(map(_may_be_told, decoding))
            if offered[0] and not num_drafts and is_many:
                self._num_resting = _REST_STEPS
        else:
            num_drafts = length.choose(len(decoding), [len(decoding)] * self._most)
            began_s = time.perf_counter()
            self._drafter.draft(step, batches, num_drafts)
            if decoding and step.has_no_prompts():
                seconds = time.perf_counter() - began_s
                length.record_drafting(len(decoding), num_drafts, seconds)
        return num_drafts


def _offered(requests: Sequence[RequestProgress], most: int) -> list[int]:
    """How many requests have a first draft, a second one, and so on."""
    counts = Counter(len(progress.draft_token_ids) for progress in requests)
    return [sum(n for length, n in counts.items() if length > depth) for depth in range(most)]


def _may_be_told(progress: RequestProgress) -> bool:
    """Whether a request's next tokens may be predicted, or be all that its grammar leaves."""
    return progress.prediction is not None or progress.grammar is not None


def draft_predicted(step: ScheduledStep, most: int, most_guessed: int) -> None:
    """Draft what the callers of requests predicted, in place of what was guessed of those.

    Call it after a drafter. Of a prediction that the answer follows at least as much is drafted as
    is likelier right than not, which pays in any batch; while that is not sure, a guess goes first.

    Args:
        step: As for a drafter.
        most: Drafts of a request.
        most_guessed: What pays for guesses at present.
    """
    for entry in step.entries:
        progress = entry.progress
        prediction = progress.prediction
        if prediction is None or not entry.samples or progress.state is not RequestState.RUNNING:
            continue
        if prediction.is_sure:
            num_drafts = min(max(most_guessed, prediction.num_likely), most)
            progress.draft_token_ids = prediction.draft(num_drafts)
            progress.drafts_are_told = True
        elif not progress.draft_token_ids:
            progress.draft_token_ids = prediction.draft(most_guessed)
            progress.drafts_are_told = True
