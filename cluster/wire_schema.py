"""What the bodies of all HTTP dialects have in common; no field of theirs is ignored unnamed."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from pydantic import BaseModel, ConfigDict

_UNKNOWN = "no such field is known"
_IDLE = "this has no effect here"
_UNHEEDED = "this has no effect in this deployment"
_ONLY_TIERS = (None, "auto", "default", "standard_only")  # names of the one service there is


class Wire(BaseModel):
    """A JSON object from a caller: strict types, unknown fields kept for `ignored_fields`."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    def without_effect(self) -> Iterator[str]:
        """Paths in it of known fields whose value changes nothing, such as `reasoning.summary`."""
        return iter(())


class RequestBody(Wire):
    """A whole body; `strict` has every ignored field refused."""

    strict: bool | None = None


class SamplingFields(RequestBody):
    """What chat completions, text completions and responses call by the same names."""

    request_id: str | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    cache_salt: str | None = None
    prompt_cache_key: str | None = None
    priority: int | None = None
    queue_timeout: float | None = None
    service_tier: str | None = None
    store: bool | None = None
    # Labels for the caller's own records: accepted and without effect on the answer.
    user: str | None = None
    safety_identifier: str | None = None

    def without_effect(self) -> Iterator[str]:
        """A service that is not offered, a second key of the cache."""
        if self.service_tier not in _ONLY_TIERS:
            yield "service_tier"
        if self.cache_salt and self.prompt_cache_key:
            yield "prompt_cache_key"


def ignored_fields(body: Wire, unheeded: Collection[str] = ()) -> dict[str, str]:
    """Why each field is ignored, by its path, such as `messages[0].mood`; null asks nothing.

    First those that no model declares, then those whose value changes nothing, last those of
    `unheeded`, which a deployment of another kind would heed.
    """
    unknown: dict[str, str] = {}
    idle: dict[str, str] = {}
    _note_ignored(body, "", unknown, idle)
    asked = [name for name in unheeded if getattr(body, name, None) is not None]
    return unknown | idle | dict.fromkeys(asked, _UNHEEDED)


def _note_ignored(part: Wire, path: str, unknown: dict[str, str], idle: dict[str, str]) -> None:
    for name, value in (part.model_extra or {}).items():
        if value is not None:
            unknown[path + name] = _UNKNOWN
    for name in part.without_effect():
        idle[path + name] = _IDLE
    for name, value in vars(part).items():  # the declared fields
        if isinstance(value, Wire):
            _note_ignored(value, f"{path}{name}.", unknown, idle)
        elif isinstance(value, list) and value and isinstance(value[0], Wire):
            for i, item in enumerate(value):
                _note_ignored(item, f"{path}{name}[{i}].", unknown, idle)
