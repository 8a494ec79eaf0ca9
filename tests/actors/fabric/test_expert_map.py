"""The tables of a placement, and the reference exchange that stands on them."""

from __future__ import annotations

import pytest
import torch

from ostro.actors.errors import TransportError
from ostro.actors.fabric.expert_map import ExpertMap
from ostro.actors.fabric.local_exchange import LocalExchange
from ostro.actors.fabric.messages import StepPlan
from ostro.actors.fabric.placement import initial_placement

# Physical 0 1 2 on rank 0 hold experts 0 1 2; physical 3 4 5 on rank 1 hold 2 3 0.
PLACEMENT = initial_placement(4, [0, 1], num_redundant=2)


def make_map(rank: int) -> ExpertMap:
    return ExpertMap(PLACEMENT, torch.device("cpu"), rank=rank)


def test_copies_take_turns_by_token():
    expert_TK = torch.tensor([[0, 1], [0, 2], [0, 2], [3, 0]])
    assert make_map(0).to_physical(expert_TK).tolist() == [[0, 1], [5, 3], [0, 2], [4, 5]]


def test_ranks_start_their_turns_apart():
    expert_TK = torch.tensor([[0], [0]])
    assert make_map(0).to_physical(expert_TK).tolist() == [[0], [5]]
    assert make_map(1).to_physical(expert_TK).tolist() == [[5], [0]]


@pytest.mark.parametrize("num_redundant", [0, 2])
def test_no_expert_stays_no_expert(num_redundant):
    placement = initial_placement(4, [0, 1], num_redundant)
    expert_map = ExpertMap(placement, torch.device("cpu"), rank=0)
    nowhere_TK = torch.tensor([[-1, -1], [-1, 0]])
    physical_TK = expert_map.to_physical(nowhere_TK)
    assert physical_TK[0].tolist() == [-1, -1]
    assert physical_TK[1, 0] == -1
    assert expert_map.to_rank(physical_TK)[0].tolist() == [-1, -1]
    assert expert_map.to_local(physical_TK)[0].tolist() == [-1, -1]


def test_local_ids_are_those_of_the_own_rank():
    physical_RK = torch.arange(6, dtype=torch.int32)[None]
    assert make_map(0).to_local(physical_RK).tolist() == [[0, 1, 2, -1, -1, -1]]
    assert make_map(1).to_local(physical_RK).tolist() == [[-1, -1, -1, 0, 1, 2]]
    assert make_map(1).to_rank(physical_RK).tolist() == [[0, 0, 0, 1, 1, 1]]


def weigh(layer, rows_RD, expert_RK, weight_RK):
    """Experts whose sum anybody can do in their head."""
    return rows_RD * ((expert_RK + 1) * weight_RK).sum(1, keepdim=True) + layer


def test_local_exchange_worked_example():
    exchange = LocalExchange(weigh, initial_placement(4, [0]))
    exchange.begin_step(StepPlan(1, 0, False, [[1]], 0))
    x_TD = torch.tensor([[1.0, 2.0]])
    exchange.dispatch(5, 0, x_TD, torch.tensor([[0, 3]]), torch.tensor([[0.5, 0.5]]))
    # weight 0.5 * (0 + 1) + 0.5 * (3 + 1) = 2.5, layer 5
    assert exchange.combine(5, 0).tolist() == [[7.5, 10.0]]


def test_local_exchange_gives_float32_for_bfloat16_rows():
    exchange = LocalExchange(weigh, initial_placement(4, [0]))
    x_TD = torch.ones(1, 2, dtype=torch.bfloat16)
    exchange.dispatch(0, 0, x_TD, torch.tensor([[0]]), torch.tensor([[1.0]]))
    assert exchange.combine(0, 0).dtype == torch.float32


def test_local_exchange_refuses_several_ranks():
    with pytest.raises(ValueError, match="has one rank"):
        LocalExchange(weigh, PLACEMENT)


def test_local_exchange_refuses_another_placement():
    exchange = LocalExchange(weigh, initial_placement(4, [0]))
    with pytest.raises(TransportError, match="planned for placement 2"):
        exchange.begin_step(StepPlan(1, 0, False, [[1]], 2))
