"""The journal: what it takes to go on with a request elsewhere after its shard was lost.

Prompt, parameters and output so far are enough, because the sampler draws by seed and position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ostro.actors.engine.choices import each_choice
from ostro.actors.engine.request import GenerationRequest
from ostro.actors.errors import InvalidRequestError, NotFoundError, OverloadedError


@dataclass(slots=True)
class _Entry:
    request: GenerationRequest
    rank: int
    output_token_ids: list[int] = field(default_factory=list)


class Journal:
    """Live requests of a cell, by id; bounded."""

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._entries: dict[str, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def add(self, request: GenerationRequest, rank: int) -> None:
        """Begin to keep a request that was placed on `rank`, each of its choices by itself.

        Raises:
            OverloadedError: The journal has no room for all of them.
            InvalidRequestError: The id is in use.
        """
        entries = {choice.request_id: _Entry(choice, rank) for choice in each_choice(request)}
        if not entries.keys().isdisjoint(self._entries):
            raise InvalidRequestError(
                f"request_id {request.request_id!r} is in use",
                code="duplicate_request_id",
                param="request_id",
            )
        if len(self._entries) + len(entries) > self._max_entries:
            raise OverloadedError(
                f"{len(self._entries)} requests are being served already", retry_after_s=1.0
            )
        self._entries |= entries

    def record(self, request_id: str, token_ids: Sequence[int]) -> None:
        """Append output tokens; those of a request that was forgotten are late and are dropped."""
        entry = self._entries.get(request_id)
        if entry is not None:
            entry.output_token_ids.extend(token_ids)

    def move(self, request_id: str, rank: int) -> None:
        """Note that a request goes on at another rank."""
        self._entry(request_id).rank = rank

    def forget(self, request_id: str) -> int:
        """Drop a request that ended; how many output tokens it had, 0 if the id is unknown."""
        entry = self._entries.pop(request_id, None)
        return 0 if entry is None else len(entry.output_token_ids)

    def rank_of(self, request_id: str) -> int:
        """The rank that serves a request."""
        return self._entry(request_id).rank

    def entries_of(self, rank: int) -> list[str]:
        """Ids of the requests at a rank, in the order in which they were added."""
        return [request_id for request_id, entry in self._entries.items() if entry.rank == rank]

    def replay(self, request_id: str) -> tuple[GenerationRequest, list[int]]:
        """The request and its output so far, to be given to `RequestProgress`."""
        entry = self._entry(request_id)
        return entry.request, list(entry.output_token_ids)

    def _entry(self, request_id: str) -> _Entry:
        entry = self._entries.get(request_id)
        if entry is None:
            raise NotFoundError(f"no request {request_id!r} is being served")
        return entry
