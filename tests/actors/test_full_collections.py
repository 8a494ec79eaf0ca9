"""Full collections of garbage: none by themselves, and by hand when they are due."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ostro.actors.full_collections import FullCollections


class Cycle:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.myself = self


class Clock:
    """A clock that stands still until it is moved."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@contextmanager
def counted() -> Iterator[list[int]]:
    """Generations of the collections that took place meanwhile."""
    seen: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seen.append(info["generation"])

    gc.callbacks.append(note)
    try:
        yield seen
    finally:
        gc.callbacks.remove(note)


def fill_memory() -> list[list[int]]:
    """As many new objects as begin full collections, if anything does."""
    return [[] for _ in range(3 * len(gc.get_objects()) + 200_000)]


def test_none_begins_by_itself_until_the_end() -> None:
    with counted() as seen, FullCollections():
        fill_memory()
    assert 2 not in seen
    assert {0, 1} <= set(seen)
    with counted() as seen:
        fill_memory()
    assert 2 in seen


@pytest.mark.parametrize(("is_at_rest", "due_s"), [(True, 10.0), (False, 600.0)])
def test_one_is_taken_when_it_is_due(is_at_rest: bool, due_s: float) -> None:
    clock = Clock()
    with FullCollections(clock) as collections:
        cycle = weakref.ref(Cycle())
        clock.now_s += due_s - 1
        assert not collections.take_if_due(5, is_at_rest=is_at_rest)
        assert cycle() is not None
        clock.now_s += 1
        assert collections.take_if_due(5, is_at_rest=is_at_rest)
        assert cycle() is None
        clock.now_s += due_s - 1
        assert not collections.take_if_due(6, is_at_rest=is_at_rest)


def test_none_is_taken_of_a_rank_that_took_no_step() -> None:
    clock = Clock()
    with FullCollections(clock) as collections:
        clock.now_s += 1e6
        assert not collections.take_if_due(0, is_at_rest=True)
        assert collections.take_if_due(1, is_at_rest=True)
        clock.now_s += 1e6
        assert not collections.take_if_due(1, is_at_rest=True)
