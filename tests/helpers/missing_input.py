"""A pytest plugin for the openai client's own tests: requests of /responses get an input.

Those tests send an empty body, which a server that keeps nothing cannot answer; what they check of
the answer stays theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from openai._base_client import AsyncAPIClient, SyncAPIClient

_PATHS = ("/responses", "/responses/input_tokens")


def pytest_configure() -> None:
    """Have both kinds of clients fill in what is missing."""
    for kind in (SyncAPIClient, AsyncAPIClient):
        kind.post = _with_input(kind.post)


def _with_input(post: Callable[..., Any]) -> Callable[..., Any]:
    def post_with_input(self: Any, path: str, *, body: Any = None, **options: Any) -> Any:
        if path in _PATHS:
            body = {"input": "Say hello.", **body}
        return post(self, path, body=body, **options)

    return post_with_input
