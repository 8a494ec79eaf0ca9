"""Placement: which rank holds which copy of which expert. Pure values; knows no tensors.

A logical expert is the model's; a physical expert is one resident copy of it. Physical ids count
up in rank order, so the copies of one rank are one range of ids:

    rank                  0        1
    physical id       0 1 2    3 4 5
    logical expert    0 1 2    2 3 0      (4 experts, 2 redundant copies)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Placement:
    """One version of the table that dispatch follows.

    Attributes:
        version: Grows with every change; step plans name it.
        physical_to_logical: Logical expert of each physical one.
        rank_of_physical: Rank that holds each physical expert; never falls from one to the next.
    """

    version: int
    physical_to_logical: tuple[int, ...]
    rank_of_physical: tuple[int, ...]

    @property
    def num_physical(self) -> int:
        """Resident copies over all ranks."""
        return len(self.physical_to_logical)

    @property
    def num_logical(self) -> int:
        """Experts that have at least one copy."""
        return len(set(self.physical_to_logical))

    def ranks(self) -> tuple[int, ...]:
        """Ranks that hold an expert, in the order of their slots."""
        return tuple(dict.fromkeys(self.rank_of_physical))

    def local_slots(self, rank: int) -> range:
        """Physical ids that a rank holds; empty for a rank without experts."""
        count = self.rank_of_physical.count(rank)
        first = self.rank_of_physical.index(rank) if count else 0
        return range(first, first + count)

    def local_to_logical(self, rank: int) -> tuple[int, ...]:
        """Logical expert of each of a rank's slots."""
        slots = self.local_slots(rank)
        return self.physical_to_logical[slots.start : slots.stop]

    def replicas_of(self, logical: int) -> tuple[int, ...]:
        """Physical ids of one logical expert, ascending."""
        return tuple(
            physical for physical, held in enumerate(self.physical_to_logical) if held == logical
        )

    def count_logical(self, rows_by_physical: Sequence[int]) -> list[int]:
        """Rows per logical expert from rows per physical one."""
        if len(rows_by_physical) != self.num_physical:
            raise ValueError(
                f"{len(rows_by_physical)} counts for {self.num_physical} physical experts"
            )
        rows = [0] * (max(self.physical_to_logical) + 1)
        for logical, count in zip(self.physical_to_logical, rows_by_physical, strict=True):
            rows[logical] += count
        return rows

    def validate(self, num_experts: int) -> None:
        """Check the table against a model.

        Raises:
            ValueError: An expert is missing, unknown or twice on one rank, or a rank's slots are
                not one range.
        """
        if len(self.rank_of_physical) != self.num_physical:
            raise ValueError(
                f"physical_to_logical has {self.num_physical} entries, rank_of_physical has "
                f"{len(self.rank_of_physical)}"
            )
        missing = sorted(set(range(num_experts)) - set(self.physical_to_logical))
        unknown = sorted(set(self.physical_to_logical) - set(range(num_experts)))
        if missing or unknown:
            raise ValueError(f"experts without a copy: {missing}; unknown experts: {unknown}")
        for rank in self.ranks():
            self._validate_rank(rank)

    def _validate_rank(self, rank: int) -> None:
        slots = self.local_slots(rank)
        if any(held != rank for held in self.rank_of_physical[slots.start : slots.stop]):
            raise ValueError(f"the slots of rank {rank} are not one range")
        if len(set(self.local_to_logical(rank))) != len(slots):
            raise ValueError(f"rank {rank} holds an expert twice: {self.local_to_logical(rank)}")


def initial_placement(
    num_experts: int, expert_ranks: Sequence[int], num_redundant: int = 0
) -> Placement:
    """The placement of a cell that has seen no load yet.

    Experts are cut into contiguous runs; sizes differ by at most one, with and without the
    redundant copies. A copy goes to a rank that lacks the expert; the least copied comes first.

    Raises:
        ValueError: A rank would stay empty, or would hold an expert twice.
    """
    num_ranks = len(expert_ranks)
    num_physical = num_experts + num_redundant
    if not 0 < num_ranks <= num_physical:
        raise ValueError(
            f"{num_physical} physical experts over {num_ranks} ranks leave a rank without experts"
        )
    if -(-num_physical // num_ranks) > num_experts:
        raise ValueError(
            f"num_redundant={num_redundant}: a rank would hold an expert twice; at most "
            f"{num_experts * (num_ranks - 1)} copies fit on {num_ranks} ranks"
        )
    owned = _contiguous_runs(num_experts, num_ranks)
    sizes = [len(run) for run in _contiguous_runs(num_physical, num_ranks)]
    copies = [1] * num_experts
    for held, size in zip(owned, sizes, strict=True):
        while len(held) < size:
            lacking = [logical for logical in range(num_experts) if logical not in held]
            chosen = min(lacking, key=lambda logical: copies[logical])
            copies[chosen] += 1
            held.append(chosen)
    return Placement(
        version=0,
        physical_to_logical=tuple(logical for held in owned for logical in held),
        rank_of_physical=tuple(
            rank for rank, held in zip(expert_ranks, owned, strict=True) for _ in held
        ),
    )


def _contiguous_runs(count: int, num_parts: int) -> list[list[int]]:
    small, num_large = divmod(count, num_parts)
    starts = [part * small + min(part, num_large) for part in range(num_parts + 1)]
    return [list(range(start, stop)) for start, stop in itertools.pairwise(starts)]
