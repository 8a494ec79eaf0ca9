"""How a deployment drafts tokens ahead of its model, which then verifies several in one step."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ostro.configs.bounds import at_least
from ostro.configs.errors import ConfigError

MOST_DRAFT_TOKENS = 7
_NGRAM_SIZES = (2, 4)


class DraftMethod(StrEnum):
    """Who guesses what comes next: the text so far, or a trained head."""

    AUTO = "auto"
    NGRAM = "ngram"
    EAGLE = "eagle"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationConfig:
    """Drafted tokens, each verified by the model: answers are the same as without.

    In bfloat16 a near tie may be rounded otherwise, as it may by any other company in a batch.

    What the caller of a request predicts of its answer is drafted under either method, up to
    `num_draft_tokens`.

    Attributes:
        method: `auto` asks the head that the model's checkpoint brings in its folder `eagle`, and
            drafts nothing where it brings none; `ngram` looks for the last tokens earlier in the
            same prompt and output, and drafts what followed there; `eagle` asks the head that
            `draft_model` names, a small one that was trained beside the model.
        num_draft_tokens: Drafts of a request and step, at most.
        draft_model: Directory of the head's checkpoint, or "embedded", the embedded model's;
            `eagle` only.
        adaptive: Whether each step drafts as many tokens as pay at present, none where none do;
            otherwise it drafts `num_draft_tokens` wherever there is room.
        max_ngram: Longest run of tokens that is looked for; `ngram` only.
        min_ngram: Shortest run that is looked for; `ngram` only.
    """

    method: DraftMethod
    num_draft_tokens: int = 3
    draft_model: str | None = None
    adaptive: bool = True
    max_ngram: int = _NGRAM_SIZES[1]
    min_ngram: int = _NGRAM_SIZES[0]

    def __post_init__(self) -> None:
        at_least(self, "num_draft_tokens", 1)
        if self.num_draft_tokens > MOST_DRAFT_TOKENS:
            raise ConfigError(
                f"num_draft_tokens={self.num_draft_tokens}: must be at most {MOST_DRAFT_TOKENS}; "
                f"to draft nothing leave speculation out"
            )
        at_least(self, "min_ngram", 1)
        at_least(self, "max_ngram", 1)
        if self.min_ngram > self.max_ngram:
            raise ConfigError(
                f"min_ngram={self.min_ngram} exceeds max_ngram={self.max_ngram}: lower it"
            )
        if self.method is DraftMethod.EAGLE:
            self._check_head_named()
        elif self.draft_model is not None:
            chosen = "has no model" if self.method is DraftMethod.NGRAM else "takes the model's own"
            raise ConfigError(
                f"draft_model={self.draft_model!r}: method={self.method} {chosen}; leave it out, "
                f"or set method=eagle"
            )
        sizes = (self.min_ngram, self.max_ngram)
        if self.method is not DraftMethod.NGRAM and sizes != _NGRAM_SIZES:
            raise ConfigError(
                f"min_ngram={self.min_ngram}, max_ngram={self.max_ngram}: method={self.method} "
                f"looks for no n-grams; leave them out, or set method=ngram"
            )

    def _check_head_named(self) -> None:
        if not self.draft_model:
            raise ConfigError(
                "draft_model: method=eagle needs the directory of the head's checkpoint; name it, "
                "or set method=auto for the one that the model brings, method=ngram for none"
            )
