"""Bounds of a config's numbers; the errors name the field."""

from __future__ import annotations

import math

from ostro.configs.errors import ConfigError


def at_least(config: object, name: str, lowest: int) -> None:
    """Refuse all but a whole number from `lowest` on.

    Raises:
        ConfigError: The field holds something else.
    """
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ConfigError(f"{name}={value!r}: must be a whole number of at least {lowest}")


def positive(config: object, name: str) -> None:
    """Refuse all but a finite number above zero.

    Raises:
        ConfigError: The field holds something else.
    """
    value = getattr(config, name)
    if not 0 < value < math.inf:
        raise ConfigError(f"{name}={value}: must be positive and finite")
