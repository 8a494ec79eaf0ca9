"""Every transport against the reference, on real processes; and what happens when one fails."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

SPLIT_1X1 = ("split", 1, 1)
SPLIT_1X2 = ("split", 1, 2)
SPLIT_2X1 = ("split", 2, 1)
SPLIT_2X3 = ("split", 2, 3)
SPLIT_3X2 = ("split", 3, 2)
COLOCATED_2 = ("colocated", 2, 2)
COLOCATED_3 = ("colocated", 3, 3)


def make_case(cell: tuple[str, int, int], **fields: Any) -> dict[str, Any]:
    layout, num_attention, num_expert = cell
    case = {
        "layout": layout,
        "num_attention": num_attention,
        "num_expert": num_expert,
        "num_experts": 7,
        "num_experts_per_token": 3,
        "hidden_size": 10,
        "num_layers": 3,
        "dtype": "float32",
        "sparse": False,
    }
    return case | fields


def world_size(case: dict[str, Any]) -> int:
    if case["layout"] == "colocated":
        return case["num_attention"]
    return case["num_attention"] + case["num_expert"]


def uneven_steps(num_attention: int, num_micro_batches: int) -> list[list[list[int]]]:
    """Steps of changing sizes in which ranks and micro-batches come out empty."""
    sizes = [[1, 5, 0], [3, 0, 2], [16, 1, 7], [0, 0, 1], [2, 2, 2], [0, 9, 0]]
    steps = []
    for index, of_rank in enumerate(sizes):
        tokens_A = [of_rank[rank % 3] for rank in range(num_attention)]
        if not any(tokens_A):
            tokens_A[0] = index + 1
        steps.append(
            [
                [
                    tokens // num_micro_batches + (b < tokens % num_micro_batches)
                    for b in range(num_micro_batches)
                ]
                for tokens in tokens_A
            ]
        )
    return steps


def name(value: object) -> str:
    return f"{value[0]}-{value[1]}x{value[2]}" if isinstance(value, tuple) else f"copies-{value}"


@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    ("cell", "num_redundant"),
    [
        (SPLIT_1X1, 0),
        (SPLIT_2X1, 0),
        *((cell, 0) for cell in (SPLIT_1X2, SPLIT_2X3, SPLIT_3X2, COLOCATED_2, COLOCATED_3)),
        *((cell, 2) for cell in (SPLIT_1X2, SPLIT_2X3, SPLIT_3X2, COLOCATED_2, COLOCATED_3)),
    ],
    ids=name,
)
def test_exchange_agrees_with_the_local_one(ranks, cell, sparse, num_micro_batches, num_redundant):
    case = make_case(
        cell,
        sparse=sparse,
        num_redundant=num_redundant,
        steps=uneven_steps(cell[1], num_micro_batches),
    )
    answers = ranks.run_in_epoch(world_size(case), "run_case", case=case)
    assert max(worst for worst, _ in answers) < 1e-5


@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("cell", [SPLIT_1X2, SPLIT_3X2, COLOCATED_2, COLOCATED_3], ids=name)
def test_exchange_in_ordered_batches_agrees_and_never_waits_in_a_circle(
    ranks, cell, sparse, num_micro_batches
):
    steps = uneven_steps(cell[1], num_micro_batches)
    case = make_case(cell, sparse=sparse, ordered=True, steps=steps)
    answers = ranks.run_in_epoch(world_size(case), "run_case", case=case)
    assert max(worst for worst, _ in answers) < 1e-5


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_exchange_carries_bfloat16(ranks, sparse):
    case = make_case(SPLIT_1X2, sparse=sparse, dtype="bfloat16", steps=[[[5]], [[1]]])
    answers = ranks.run_in_epoch(3, "run_case", case=case)
    assert max(worst for worst, _ in answers) < 0.25  # two roundings of values up to 30


def test_exchange_carries_odd_bfloat16_rows(ranks):
    case = make_case(SPLIT_1X2, dtype="bfloat16", hidden_size=7, steps=[[[3]], [[1]]])
    answers = ranks.run_in_epoch(3, "run_case", case=case)
    assert max(worst for worst, _ in answers) < 0.25


def test_sparse_mode_sends_a_token_once_to_each_rank_that_it_needs(ranks):
    # Every token needs 7 of 7 experts, so both expert ranks need every token, once.
    case = make_case(SPLIT_1X2, sparse=True, num_experts_per_token=7, steps=[[[5]]])
    answers = ranks.run_in_epoch(3, "run_case", case=case)
    assert [num_rows for _, num_rows in answers] == [2 * 5 * 3, 5 * 3, 5 * 3]


def test_sparse_mode_sends_no_rows_to_a_rank_that_none_needs(ranks):
    # One expert per token: each row goes to exactly one of the two expert ranks.
    case = make_case(SPLIT_1X2, sparse=True, num_experts_per_token=1, steps=[[[4]], [[1]]])
    (_, sent), *served = ranks.run_in_epoch(3, "run_case", case=case)
    assert sent == (4 + 1) * 3
    assert sum(num_rows for _, num_rows in served) == sent


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("cell", [SPLIT_2X3, SPLIT_3X2, COLOCATED_3], ids=str)
def test_exchange_agrees_with_the_local_one_at_model_size(ranks, cell, sparse):
    num_micro_batches = 2
    case = make_case(
        cell,
        sparse=sparse,
        num_experts=128,
        num_experts_per_token=4,
        hidden_size=4096,
        num_redundant=6,
        steps=[[[64] * num_micro_batches] * cell[1], [[150, 149]] * cell[1]],
    )
    answers = ranks.run_in_epoch(world_size(case), "run_case", case=case)
    assert max(worst for worst, _ in answers) < 1e-2


def enter(ranks, cell, **fields: Any) -> int:
    """All ranks enter one epoch; its number."""
    case = make_case(cell, **fields)
    epoch = ranks.next_epoch()
    ranks.run(world_size(case), "enter", case=case, epoch=epoch, store_port=ranks.store_port)
    return epoch


def test_server_names_an_attention_rank_that_sends_nothing(ranks):
    enter(ranks, SPLIT_2X1, timeout_s=0.5)
    ranks.tell(2, "step", index=3, tokens_AM=[[1], [0]])
    error = ranks.errors([2])[2]
    assert error.peer == 0
    assert "rank 0 (attention shard) did not answer within 0.5 s in step 3" in str(error)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_rows_of_another_epoch_are_refused(ranks, sparse):
    epoch = enter(ranks, SPLIT_1X1, sparse=sparse)
    ranks.tell(0, "step", index=0, tokens_AM=[[2]], claimed_epoch=epoch - 1)
    ranks.tell(1, "step", index=0, tokens_AM=[[2]])
    errors = ranks.errors([0, 1])
    assert errors[1].peer == 0
    assert f"rank 0 sent rows of epoch {epoch - 1}, step 0" in str(errors[1])
    assert "refused" in str(errors[1])


def test_rows_of_another_step_are_refused(ranks):
    enter(ranks, SPLIT_1X1)
    ranks.tell(0, "step", index=4, tokens_AM=[[2]])
    ranks.tell(1, "step", index=5, tokens_AM=[[2]])
    assert "step 4" in str(ranks.errors([0, 1])[1])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"epoch": 10**6}, "planned for epoch 1000000"),
        ({"placement_version": 3}, "planned for placement 3"),
        ({"tokens_AM": [[1], [1]]}, "planned for 2 attention ranks"),
    ],
    ids=["epoch", "placement", "ranks"],
)
def test_plan_that_is_not_for_this_cell_is_refused(ranks, fields, reason):
    enter(ranks, SPLIT_1X1)
    for rank in (0, 1):
        ranks.tell(rank, "refuse", plan_fields=fields)
    assert all(reason in str(error) for error in ranks.errors([0, 1]).values())


def test_abort_from_another_thread_ends_a_wait(ranks):
    enter(ranks, SPLIT_1X1, timeout_s=20.0)
    ranks.tell(0, "abort_from_a_thread", tokens_AM=[[2]], after_s=0.2)
    message, taken_s = ranks.answer(0)
    assert "has left epoch" in message
    assert taken_s < 10.0


# ---- these cost a process each, and stand last


@pytest.mark.parametrize(
    ("cell", "victim", "witnesses"),
    [(SPLIT_1X2, 1, [0]), (SPLIT_2X1, 0, [2]), (COLOCATED_2, 1, [0])],
    ids=["expert shard", "attention shard", "colocated shard"],
)
def test_killed_rank_is_named_by_those_who_waited_for_it(ranks, cell, victim, witnesses):
    enter(ranks, cell)
    size = 2 if cell is COLOCATED_2 else 3
    others = [rank for rank in range(size) if rank != victim]
    for rank in range(size):
        ranks.tell(rank, "steps_until_error", tokens_AM=[[2]] * cell[1])
    time.sleep(0.2)  # some steps go by
    killed_s = time.monotonic()
    ranks.stop(victim, signal.SIGKILL)
    errors = ranks.errors(others)
    assert time.monotonic() - killed_s < 10.0  # far below the deadline of 20 s
    for rank in witnesses:
        assert errors[rank].peer == victim
        assert f"rank {victim} (" in str(errors[rank])
        assert "closed its connection in step" in str(errors[rank])
    # The rest learn it from those who left.
    assert all(error.peer in {victim, *others} for error in errors.values())


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_stopped_rank_is_named_when_the_deadline_passes(ranks, sparse):
    enter(ranks, SPLIT_1X1, sparse=sparse, timeout_s=0.5)
    ranks.stop(1, signal.SIGSTOP)
    ranks.tell(0, "step", index=7, tokens_AM=[[2]])
    error = ranks.errors([0])[0]
    assert error.peer == 1
    assert str(error) == "rank 1 (expert shard) did not answer within 0.5 s in step 7, layer 0"
    ranks.stop(1, signal.SIGKILL)
