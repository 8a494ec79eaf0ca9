"""Placement: the worked example, and what holds for every size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostro.actors.fabric.placement import Placement, initial_placement


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, int]:
    """Experts, ranks and redundant copies that fit."""
    num_experts = draw(st.integers(1, 40))
    num_ranks = draw(st.integers(1, num_experts))
    num_redundant = draw(st.integers(0, min(num_experts * (num_ranks - 1), 60)))
    return num_experts, num_ranks, num_redundant


def test_initial_placement_worked_example():
    placement = initial_placement(4, [2, 3], num_redundant=2)
    assert placement.physical_to_logical == (0, 1, 2, 2, 3, 0)
    assert placement.rank_of_physical == (2, 2, 2, 3, 3, 3)
    assert placement.local_slots(3) == range(3, 6)
    assert placement.local_to_logical(3) == (2, 3, 0)
    assert placement.replicas_of(0) == (0, 5)
    assert placement.ranks() == (2, 3)


@given(sizes())
def test_initial_placement_is_valid_and_even(size):
    num_experts, num_ranks, num_redundant = size
    expert_ranks = range(3, 3 + num_ranks)
    placement = initial_placement(num_experts, expert_ranks, num_redundant)
    placement.validate(num_experts)
    assert placement.num_physical == num_experts + num_redundant
    assert placement.ranks() == tuple(expert_ranks)
    held = [len(placement.local_slots(rank)) for rank in expert_ranks]
    assert max(held) - min(held) <= 1
    assert sum(held) == placement.num_physical


@given(sizes())
def test_replicas_lie_on_different_ranks_and_are_spread_evenly(size):
    num_experts, num_ranks, num_redundant = size
    placement = initial_placement(num_experts, range(num_ranks), num_redundant)
    copies = [placement.replicas_of(logical) for logical in range(num_experts)]
    for physicals in copies:
        ranks = [placement.rank_of_physical[physical] for physical in physicals]
        assert len(set(ranks)) == len(ranks)
    if num_redundant <= num_experts // 2 and num_ranks > 1:
        assert max(len(physicals) for physicals in copies) <= 2


@given(sizes(), st.data())
def test_count_logical_keeps_every_row(size, data):
    placement = initial_placement(size[0], range(size[1]), size[2])
    num_physical = placement.num_physical
    rows = data.draw(st.lists(st.integers(0, 9), min_size=num_physical, max_size=num_physical))
    by_logical = placement.count_logical(rows)
    assert len(by_logical) == size[0]
    assert sum(by_logical) == sum(rows)
    for logical, count in enumerate(by_logical):
        assert count == sum(rows[physical] for physical in placement.replicas_of(logical))


def test_rank_without_experts_has_no_slots():
    placement = initial_placement(3, [1, 2])
    assert placement.local_slots(0) == range(0)
    assert placement.local_to_logical(0) == ()


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "num_redundant", "reason"),
    [
        (2, 3, 0, "leave a rank without experts"),
        (2, 0, 0, "leave a rank without experts"),
        (4, 1, 1, "at most 0 copies fit on 1 ranks"),
        (2, 2, 3, "at most 2 copies fit on 2 ranks"),
    ],
)
def test_initial_placement_refuses_what_does_not_fit(num_experts, num_ranks, num_redundant, reason):
    with pytest.raises(ValueError, match=reason):
        initial_placement(num_experts, range(num_ranks), num_redundant)


@pytest.mark.parametrize(
    ("placement", "reason"),
    [
        (Placement(0, (0, 1), (0,)), "has 2 entries"),
        (Placement(0, (0, 2), (0, 0)), r"without a copy: \[1\]; unknown experts: \[2\]"),
        (Placement(0, (0, 1, 0), (0, 1, 0)), "not one range"),
        (Placement(0, (0, 1, 0), (0, 0, 0)), "holds an expert twice"),
    ],
    ids=["lengths", "experts", "range", "twice"],
)
def test_validate_names_what_is_wrong(placement, reason):
    with pytest.raises(ValueError, match=reason):
        placement.validate(2)


def test_count_logical_refuses_counts_of_another_placement():
    with pytest.raises(ValueError, match="3 counts for 2 physical experts"):
        initial_placement(2, [0]).count_logical([1, 2, 3])
