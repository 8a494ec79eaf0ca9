"""The conductor: when a plan is made, who takes part, and how it is cut."""

from hypothesis import given
from hypothesis import strategies as st

from ostro.actors.conductor import Conductor
from ostro.configs.deployment import DispatchMode, Layout, LayoutConfig


def make(num_attention=2, num_experts=3, layout=Layout.SPLIT, **options):
    config = LayoutConfig(
        layout=layout,
        num_attention_shards=num_attention,
        num_expert_shards=num_experts,
        **options,
    )
    return Conductor(config, epoch=7, placement_version=3)


def test_conductor_plans_what_one_rank_proposes_and_leaves_the_idle_one_out():
    conductor = make()
    conductor.propose(1, 5)
    plan = conductor.next_plan(now_s=0.0)
    assert (plan.epoch, plan.step, plan.placement_version) == (7, 0, 3)
    assert plan.tokens_AM == [[0], [5]]
    assert conductor.takes_part(plan) == [1, 2, 3, 4]


def test_conductor_waits_for_the_proposal_that_a_running_rank_owes():
    conductor = make()
    conductor.propose(0, 4)
    assert conductor.next_plan(now_s=0.0) is not None
    conductor.propose(1, 2)
    assert conductor.next_plan(now_s=0.0) is None
    conductor.propose(0, 4)
    assert conductor.next_plan(now_s=0.0).tokens_AM == [[4], [2]]


def test_conductor_stays_at_most_one_step_ahead():
    conductor = make(num_attention=1)
    plans = []
    for _ in range(3):
        conductor.propose(0, 1)
        plans.append(conductor.next_plan(now_s=0.0))
    assert [plan is not None for plan in plans] == [True, True, False]
    conductor.done(0, 0, now_s=0.0)
    assert conductor.next_plan(now_s=0.0).step == 2


def test_conductor_asks_every_rank_of_a_colocated_cell_to_serve_experts():
    conductor = make(3, 3, Layout.COLOCATED)
    conductor.propose(2, 8)
    assert conductor.takes_part(conductor.next_plan(now_s=0.0)) == [0, 1, 2]


def test_conductor_sends_large_micro_batches_sparsely_and_small_ones_densely():
    conductor = make(1, 2, dense_max_tokens=16)
    conductor.propose(0, 16)
    assert not conductor.next_plan(now_s=0.0).sparse
    conductor.propose(0, 17)
    assert conductor.next_plan(now_s=0.0).sparse


def test_conductor_obeys_a_forced_dispatch_mode():
    conductor = make(1, 2, dispatch=DispatchMode.SPARSE)
    conductor.propose(0, 1)
    assert conductor.next_plan(now_s=0.0).sparse


def test_conductor_slices_a_step_only_when_every_rank_has_enough_for_it():
    conductor = make(2, 2, num_micro_batches=2, min_tokens_per_micro_batch=4)
    conductor.propose(0, 9)
    conductor.propose(1, 8)
    assert conductor.next_plan(now_s=0.0).tokens_AM == [[5, 4], [4, 4]]
    conductor.propose(0, 9)
    conductor.propose(1, 7)
    assert conductor.next_plan(now_s=0.0).tokens_AM == [[9], [7]]


def test_conductor_names_the_ranks_that_sit_on_a_step():
    conductor = make()
    conductor.propose(0, 1)
    conductor.propose(1, 1)
    conductor.next_plan(now_s=10.0)
    conductor.done(1, 0, now_s=0.0)
    assert conductor.overdue(now_s=14.0, timeout_s=5.0) is None
    assert conductor.overdue(now_s=16.0, timeout_s=5.0) == (0, [0])


def test_conductor_gives_each_step_its_own_time():
    conductor = make(num_attention=1)
    for _ in range(2):
        conductor.propose(0, 1)
        conductor.next_plan(now_s=0.0)
    conductor.done(0, 0, now_s=40.0)
    assert conductor.overdue(now_s=44.0, timeout_s=5.0) is None
    assert conductor.overdue(now_s=46.0, timeout_s=5.0) == (1, [0])


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 50)), max_size=60))
def test_conductor_never_loses_or_repeats_a_proposed_token(moves):
    """Ranks propose only when they owe or are idle, as the engine does; all of it must run."""
    conductor = make(3, 2, num_micro_batches=2)
    proposed, planned, idle = 0, 0, {0, 1, 2}
    running = {0: [], 1: [], 2: []}
    for rank, tokens in moves:
        if rank in idle and tokens:
            idle.discard(rank)
            proposed += tokens
            conductor.propose(rank, tokens)
        elif running[rank]:
            conductor.done(rank, running[rank].pop(0), now_s=0.0)
        while (plan := conductor.next_plan(now_s=0.0)) is not None:
            for taker, tokens_M in enumerate(plan.tokens_AM):
                planned += sum(tokens_M)
                if sum(tokens_M):
                    running[taker].append(plan.step)
                    idle.add(taker)
                    conductor.propose(taker, 0)
    for rank, steps in running.items():
        for step in steps:
            conductor.done(rank, step, now_s=0.0)
    assert planned + run_out(conductor) == proposed


def run_out(conductor):
    """Run what is left to plan; how many tokens that was."""
    planned = 0
    while (plan := conductor.next_plan(now_s=0.0)) is not None:
        for taker, tokens_M in enumerate(plan.tokens_AM):
            planned += sum(tokens_M)
            conductor.propose(taker, 0)
            conductor.done(taker, plan.step, now_s=0.0)
    return planned
