"""The effort table: what the server makes of each reasoning effort."""

from __future__ import annotations

from dataclasses import dataclass, field

from ostro.configs.bounds import at_least
from ostro.configs.errors import ConfigError

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class EffortConfig:
    """What the server makes of one reasoning effort.

    Attributes:
        prompt_value: What the prompt says, unless the tokenizer declares the effort itself.
        budget_tokens: Thinking tokens before the close is forced; None for no limit, 0 for none.
        soft_zone_tokens: Over the last so many tokens of the budget the close grows more likely.
        scheduling_class: Lower runs earlier when requests wait.
        temperature: Default temperature.
        top_p: Default nucleus mass.
    """

    prompt_value: str
    budget_tokens: int | None
    soft_zone_tokens: int = 0
    scheduling_class: int = 0
    temperature: float = 0.7
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.prompt_value not in ("none", "high"):
            raise ConfigError(f"prompt_value={self.prompt_value!r}: must be 'none' or 'high'")
        if self.budget_tokens is not None:
            at_least(self, "budget_tokens", 0)
        at_least(self, "soft_zone_tokens", 0)
        if not 0.0 <= self.temperature <= 2.0:
            raise ConfigError(f"temperature={self.temperature}: must be in [0, 2]")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p={self.top_p}: must be in (0, 1]")


def default_efforts() -> dict[str, EffortConfig]:
    """The effort table of a deployment that does not bring its own."""
    return {
        "none": EffortConfig(prompt_value="none", budget_tokens=0, temperature=0.3),
        "minimal": EffortConfig(prompt_value="high", budget_tokens=512, soft_zone_tokens=64),
        "low": EffortConfig(prompt_value="high", budget_tokens=2048, soft_zone_tokens=256),
        "medium": EffortConfig(
            prompt_value="high", budget_tokens=8192, soft_zone_tokens=1024, scheduling_class=1
        ),
        "high": EffortConfig(prompt_value="high", budget_tokens=None, scheduling_class=2),
        "xhigh": EffortConfig(prompt_value="high", budget_tokens=None, scheduling_class=2),
        "max": EffortConfig(prompt_value="high", budget_tokens=None, scheduling_class=2),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningConfig:
    """The effort table.

    Attributes:
        default_effort: Effort of a request that names none.
        closing_phrase: Text forced before `[/THINK]` when a budget ends.
        efforts: Effort name -> what the server makes of it; all of `EFFORTS`.
    """

    default_effort: str = "none"
    closing_phrase: str = "\n\nI have thought enough; time to answer."
    efforts: dict[str, EffortConfig] = field(default_factory=default_efforts)

    def __post_init__(self) -> None:
        missing = [name for name in EFFORTS if name not in self.efforts]
        unknown = [name for name in self.efforts if name not in EFFORTS]
        if missing or unknown:
            raise ConfigError(
                f"efforts: missing {missing}, unknown {unknown}; known: {list(EFFORTS)}"
            )
        if self.default_effort not in EFFORTS:
            raise ConfigError(
                f"default_effort={self.default_effort!r}: must be one of {list(EFFORTS)}"
            )
