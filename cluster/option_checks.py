"""Whether the options of a generation are of their kinds and in their ranges.

Every refusal is an InvalidRequestError whose `param` is the name the caller knows the field by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ostro.actors.errors import InvalidRequestError
from ostro.cluster.generation import GenerationOptions
from ostro.cluster.model_card import ModelCard
from ostro.configs.deployment import ServingConfig

MAX_LOGPROBS = 20
MAX_STOP_LENGTH = 1024  # characters of one stop string
MAX_LIST_LENGTH = 1024  # entries of logit_bias and stop_token_ids
MAX_ID_LENGTH = 256  # characters of request_id and prompt_cache_key


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
    "num_choices": "n",
    "num_logprobs": "top_logprobs",
    "queue_timeout_s": "queue_timeout",
}


def check_options(options: GenerationOptions, card: ModelCard, serving: ServingConfig) -> None:
    """See that every option is of its kind and in its range.

    Raises:
        InvalidRequestError: One is not; `param` is the name that callers know it by.
    """
    for bounds in _NUMBERS:
        _check_number(bounds, getattr(options, bounds.name), (int, float))
    for bounds in (*_WHOLE_NUMBERS, _Range("num_choices", 1, serving.max_choices)):
        _check_number(bounds, getattr(options, bounds.name), (int,))
    if options.max_tokens is not None and options.min_tokens > options.max_tokens:
        raise refused("min_tokens", f"must not exceed max_tokens={options.max_tokens}")
    check_token_ids("stop_token_ids", options.stop_token_ids, card.vocab_size, MAX_LIST_LENGTH)
    check_token_ids("logit_bias", list(options.logit_bias), card.vocab_size, MAX_LIST_LENGTH)
    for bias in options.logit_bias.values():
        _check_number(_Range("logit_bias", -100.0, 100.0), bias, (int, float))
    for name in ("request_id", "cache_key"):
        _check_text(name, getattr(options, name) or "", MAX_ID_LENGTH)
    _check_stop(options.stop, serving.max_stop_sequences)


def check_token_ids(
    name: str, token_ids: Sequence[int], vocab_size: int, most: int | None = None
) -> None:
    """See that token ids are in the vocabulary, and not more than `most`. Raises as above."""
    if most is not None and len(token_ids) > most:
        raise refused(name, f"takes at most {most} entries")
    if not all(type(token_id) is int and 0 <= token_id < vocab_size for token_id in token_ids):
        raise refused(name, f"takes token ids from 0 to {vocab_size - 1}")


def refused(name: str, text: str, *, code: str | None = None) -> InvalidRequestError:
    """The refusal of an option, under its public name."""
    public = _PUBLIC_NAMES.get(name, name)
    return InvalidRequestError(f"{public} {text}", code=code, param=public)


def _check_stop(stops: Sequence[str], most: int) -> None:
    if len(stops) > most:
        raise refused("stop", f"takes at most {most} strings")
    for stop in stops:
        if not stop:
            raise refused("stop", "must not hold an empty string")
        _check_text("stop", stop, MAX_STOP_LENGTH)


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
    raise refused(bounds.name, f"must be {kind}{limits}")


def _check_text(name: str, text: str, max_length: int) -> None:
    if len(text) > max_length:
        raise refused(name, f"takes at most {max_length} characters")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise refused(name, "is not valid Unicode text") from error
