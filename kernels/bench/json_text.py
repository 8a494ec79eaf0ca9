"""Figures as JSON text, which has no word for NaN or an infinity: what is no figure is null."""

from __future__ import annotations

import json
import math
from typing import Any


def json_text(tree: Any) -> str:
    """Text of a tree of dicts, lists and plain values.

    Example:
        [math.nan, 1.0] gives null and 1.0, each on a line of its own.
    """
    return json.dumps(_with_nulls(tree), indent=1, allow_nan=False) + "\n"


def _with_nulls(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _with_nulls(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_with_nulls(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
