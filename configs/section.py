"""One mapping of a checkpoint's config file, read value by value; errors name file and field."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ostro.configs.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Section:
    """One mapping of a config file, able to say where a wrong value stands.

    Attributes:
        file: Where it was read.
        prefix: Path of the mapping inside the file, with its dot.
        values: The mapping.
        spelling: What the file calls a key, where that is something else.
    """

    file: Path
    prefix: str
    values: dict[str, Any]
    spelling: Mapping[str, str] = field(default_factory=dict)

    def error(self, key: str, problem: str) -> ConfigError:
        """An error about one of the mapping's values."""
        key = self.spelling.get(key, key)
        return ConfigError(f"{self.file}: {self.prefix}{key}: {problem}")

    def section(self, key: str) -> Section:
        """The mapping that stands under a key."""
        value = self.values[key]
        if not isinstance(value, dict):
            raise self.error(key, f"must be a mapping, not {value!r}")
        return Section(self.file, f"{self.prefix}{key}.", value)

    def flag(self, key: str) -> bool:
        """A missing flag is False."""
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {value!r}")
        return value

    def count(self, key: str, default: int | None = None, *, most: int | None = None) -> int:
        """A whole number of at least 1; `most` bounds what work or memory is counted by."""
        value = self._given(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(key, f"must be a whole number of at least 1, not {value!r}")
        if most is not None and value > most:
            raise self.error(key, f"is {value}, but at most {most} are served")
        return value

    def require(self, key: str, needed: object) -> None:
        """Refuse a value that the forward pass does not compute with; an absent one is taken so."""
        value = self.values.get(key)
        if value is not None and value != needed:
            raise self.error(key, f"is {value!r}, but only {needed!r} is served")

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._given(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, f"must be a number, not {value!r}")
        if not abs(value) <= sys.float_info.max:  # as NaN is not, either
            raise self.error(key, f"must be a finite number, not {value!r}")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self.number(key, default)
        if value <= 0.0:
            raise self.error(key, f"must be positive, not {value!r}")
        return value

    def _given(self, key: str, default: float | None) -> Any:
        value = self.values.get(key)
        if value is None and default is None:
            raise self.error(key, "missing; the checkpoint must say it")
        return default if value is None else value


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: It cannot be read, or holds something else.
    """
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: must hold a JSON object")
    return values
