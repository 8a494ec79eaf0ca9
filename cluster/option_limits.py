"""What values the options of a generation may have; checked here once for both faces."""

from __future__ import annotations

from ostro.actors.errors import InvalidRequestError, NotFoundError
from ostro.cluster.generation import GenerationOptions, ModelCard
from ostro.configs.deployment import EFFORTS

MAX_LOGPROBS = 20
_MAX_STOP_CHARS = 256
_MAX_ID_CHARS = 128

_MAX_COUNT = 2**31 - 1

# (field, lowest, highest, whether the lowest itself is allowed); a NaN fails every comparison.
_RANGES: tuple[tuple[str, float, float, bool], ...] = (
    ("temperature", 0.0, 2.0, True),
    ("top_p", 0.0, 1.0, False),
    ("top_k", 0, _MAX_COUNT, True),
    ("min_p", 0.0, 1.0, True),
    ("presence_penalty", -2.0, 2.0, True),
    ("frequency_penalty", -2.0, 2.0, True),
    ("repetition_penalty", 0.0, 2.0, False),
    ("max_tokens", 1, _MAX_COUNT, True),
    ("min_tokens", 0, _MAX_COUNT, True),
    ("thinking_token_budget", -1, _MAX_COUNT, True),
    ("num_logprobs", 0, MAX_LOGPROBS, True),
    ("queue_timeout_s", 0.0, 86400.0, False),
    ("seed", -(2**63), 2**64 - 1, True),
    ("priority", -_MAX_COUNT, _MAX_COUNT, True),
)
_WIRE_NAMES = {"num_logprobs": "top_logprobs", "queue_timeout_s": "queue_timeout"}


def check_model(name: str, card: ModelCard) -> None:
    """Raise NotFoundError unless `name` is the served model or empty."""
    if name not in ("", card.name):
        raise NotFoundError(
            f"model {name[:100]!r} is not served here; the served model is {card.name!r}",
            code="model_not_found",
            param="model",
        )


def check_options(
    options: GenerationOptions, *, card: ModelCard, max_stop_sequences: int
) -> None:
    """Raise InvalidRequestError for the first option out of its range; `param` names it."""
    for name, lowest, highest, inclusive in _RANGES:
        _check_range(name, getattr(options, name), lowest, highest, inclusive=inclusive)
    _check_effort(options.effort)
    _check_stop(options.stop, max_stop_sequences)
    _check_token_ids(options, card.vocab_size)
    _check_id(options.request_id)
    if options.max_tokens is not None and options.min_tokens > options.max_tokens:
        raise InvalidRequestError(
            f"min_tokens={options.min_tokens} exceeds max_tokens={options.max_tokens}",
            param="min_tokens",
        )


def _check_range(
    name: str, value: float | None, lowest: float, highest: float, *, inclusive: bool
) -> None:
    if value is None or (lowest < value <= highest) or (inclusive and value == lowest):
        return
    wire_name = _WIRE_NAMES.get(name, name)
    bound = f"{'at least' if inclusive else 'more than'} {lowest} and at most {highest}"
    raise InvalidRequestError(f"{wire_name}={value!r} must be {bound}", param=wire_name)


def _check_effort(effort: str | None) -> None:
    if effort is not None and effort not in EFFORTS:
        raise InvalidRequestError(
            f"reasoning_effort={effort[:100]!r} must be one of {', '.join(EFFORTS)}",
            code="unsupported_value",
            param="reasoning_effort",
        )


def _check_stop(stop: tuple[str, ...], max_stop_sequences: int) -> None:
    if len(stop) > max_stop_sequences:
        raise InvalidRequestError(
            f"stop has {len(stop)} strings; at most {max_stop_sequences} are taken", param="stop"
        )
    if any(not 0 < len(text) <= _MAX_STOP_CHARS for text in stop):
        raise InvalidRequestError(
            f"each stop string must have 1 to {_MAX_STOP_CHARS} characters", param="stop"
        )


def _check_token_ids(options: GenerationOptions, vocab_size: int) -> None:
    for name, ids in (
        ("logit_bias", options.logit_bias.keys()),
        ("stop_token_ids", options.stop_token_ids),
    ):
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequestError(
                    f"{name}: token id {token_id} is not in 0..{vocab_size - 1}", param=name
                )
    for bias in options.logit_bias.values():
        if not -100.0 <= bias <= 100.0:
            raise InvalidRequestError(
                f"logit_bias={bias!r} must be in -100..100", param="logit_bias"
            )


def _check_id(request_id: str | None) -> None:
    if request_id is None:
        return
    plain = request_id.isascii() and request_id.isprintable() and " " not in request_id
    if not plain or not 0 < len(request_id) <= _MAX_ID_CHARS:
        raise InvalidRequestError(
            f"request_id must have 1 to {_MAX_ID_CHARS} printable ASCII characters and no space",
            param="request_id",
        )
