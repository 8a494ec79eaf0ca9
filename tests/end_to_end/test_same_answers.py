"""The same answers from every layout: real processes and token streams, against transformers."""

import asyncio
import random

import checkpoints
import msgspec
import pytest
from local_cell import local_cell
from model_rig import ModelRig, load_oracle, make_progress, oracle_greedy

from ostro.actors.engine.choice_seed import choice_seed
from ostro.actors.engine.request import GenerationRequest, SamplingParams, StopParams
from ostro.configs.deployment import (
    DeploymentConfig,
    DispatchMode,
    EngineConfig,
    Layout,
    LayoutConfig,
)
from ostro.kernels.latent_cache import FP8_ROWS

NUM_NEW = 12
PROMPT_LENGTHS = (3, 40, 17, 1, 70)

LAYOUTS = [
    (Layout.SINGLE, 1, 1),
    (Layout.COLOCATED, 2, 2),
    (Layout.COLOCATED, 3, 3),
    (Layout.SPLIT, 1, 1),
    (Layout.SPLIT, 1, 2),
    (Layout.SPLIT, 2, 1),
    (Layout.SPLIT, 2, 3),
    (Layout.SPLIT, 3, 2),
]
# (dispatch, micro-batches, redundant experts); the full product runs with the slow tests.
MODES = [
    (DispatchMode.DENSE, 1, 0),
    (DispatchMode.SPARSE, 2, 2),
    (DispatchMode.AUTO, 2, 0),
    (DispatchMode.SPARSE, 1, 0),
    (DispatchMode.DENSE, 2, 3),
]


def cases():
    for index, shape in enumerate(LAYOUTS):
        for turn, mode in enumerate(MODES):
            quick = turn == index % len(MODES)
            marks = [] if quick else [pytest.mark.slow]
            name = f"{shape[0].value}-{shape[1]}x{shape[2]}-{mode[0].value}-m{mode[1]}-r{mode[2]}"
            yield pytest.param(shape, mode, marks=marks, id=name)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    checkpoints.make_tiny_checkpoint(directory, num_layers=2)
    return directory


@pytest.fixture(scope="module")
def expected(model_dir):
    """(prompt, greedy tokens, log probabilities) of several requests."""
    oracle, draw = load_oracle(model_dir), random.Random(5)
    prompts = [[draw.randrange(100, 1000) for _ in range(length)] for length in PROMPT_LENGTHS]
    return [(prompt, *oracle_greedy(oracle, prompt, NUM_NEW)) for prompt in prompts]


@pytest.fixture(scope="module")
def expected_of_fp8(model_dir, expected):
    """Greedy tokens of the same requests, each alone, over a cache of FP8 rows."""
    rig = ModelRig(model_dir, cache_dtype=FP8_ROWS)

    def greedy(prompt):
        progress = make_progress("r", prompt)
        while len(progress.output_token_ids) < NUM_NEW:
            new = progress.num_tokens - progress.num_computed_tokens
            logits_BV = rig.step([rig.entry(progress, new)])
            progress.output_token_ids.append(int(logits_BV[0].argmax()))
        return progress.output_token_ids

    return [greedy(prompt) for prompt, _, _ in expected]


def deployment(shape, mode=(DispatchMode.AUTO, 1, 0), **engine):
    layout, num_attention, num_experts = shape
    dispatch, num_micro_batches, num_redundant = mode
    return DeploymentConfig(
        model="tiny",
        layout=LayoutConfig(
            layout=layout,
            num_attention_shards=num_attention,
            num_expert_shards=num_experts,
            num_redundant_experts=num_redundant if num_experts > 1 else 0,
            dispatch=dispatch,
            dense_max_tokens=8,
            num_micro_batches=1 if layout is Layout.SINGLE else num_micro_batches,
            min_tokens_per_micro_batch=2,
            step_timeout_s=60.0,
        ),
        engine=EngineConfig(
            **{
                "page_size": 8,
                "num_pages": 64,
                "max_tokens_per_step": 32,
                "max_running_requests": 16,
                "num_threads": 1,
                **engine,
            }
        ),
    )


def request(name, prompt, *, num_new=NUM_NEW, **sampling):
    return GenerationRequest(
        request_id=name,
        prompt_token_ids=prompt,
        sampling=SamplingParams(**sampling),
        stop=StopParams(max_tokens=num_new, ignore_eos=True),
    )


def tokens_of(events):
    return [token for event in events for token in event.token_ids]


@pytest.mark.parametrize(("shape", "mode"), list(cases()))
def test_layout_gives_the_oracles_tokens_and_log_probabilities(
    pool, model_dir, expected, shape, mode
):
    async def run():
        async with local_cell(pool, deployment(shape, mode), model_dir) as cell:
            return await asyncio.gather(
                *(
                    cell.generate(request(f"r{i}", prompt, num_logprobs=5))
                    for i, (prompt, _, _) in enumerate(expected)
                )
            )

    for (_, tokens, logprobs), events in zip(expected, asyncio.run(run()), strict=True):
        assert tokens_of(events) == tokens
        got = [logprob for event in events for logprob in event.logprobs]
        for step, logprob in enumerate(got):
            for token_id, value in [(logprob.token_id, logprob.logprob), *logprob.top]:
                assert value == pytest.approx(float(logprobs[step, token_id]), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("shape", [(Layout.SINGLE, 1, 1), (Layout.SPLIT, 2, 2)], ids=str)
def test_sampled_tokens_do_not_depend_on_what_else_is_in_the_batch(
    pool, model_dir, expected, shape
):
    wanted = request("alone", expected[1][0], temperature=1.0, top_p=0.95, seed=11)

    async def run():
        async with local_cell(pool, deployment(shape), model_dir) as cell:
            alone = await cell.generate(wanted)
            others = [
                cell.generate(request(f"o{i}", prompt, temperature=1.3, seed=i))
                for i, (prompt, _, _) in enumerate(expected)
            ]
            together = await asyncio.gather(cell.generate(wanted), *others)
            return tokens_of(alone), tokens_of(together[0])

    alone, together = asyncio.run(run())
    assert len(alone) == NUM_NEW
    assert alone == together


def test_requests_outlive_preemption_with_the_same_tokens(pool, model_dir, expected):
    """Twelve pages of eight do not hold five requests; some are preempted and recomputed."""
    small = deployment((Layout.SPLIT, 1, 2), num_pages=12, prefix_cache=False)

    async def run():
        async with local_cell(pool, small, model_dir) as cell:
            results = await asyncio.gather(
                *(
                    cell.generate(request(f"r{i}", prompt))
                    for i, (prompt, _, _) in enumerate(expected)
                )
            )
            return results, await cell.client.state()

    results, state = asyncio.run(run())
    for (_, tokens, _), events in zip(expected, results, strict=True):
        assert tokens_of(events) == tokens
    assert state.loads[0].num_free_pages == 12


@pytest.mark.parametrize(
    ("shape", "num_pages"),
    [((Layout.SINGLE, 1, 1), 64), ((Layout.SPLIT, 1, 2), 12)],
    ids=["single", "split, preempted"],
)
def test_an_fp8_cache_gives_the_same_tokens_in_every_layout_from_prefixes_and_after_preemption(
    pool, model_dir, expected, expected_of_fp8, shape, num_pages
):
    prompts = [prompt for prompt, _, _ in expected]

    async def run():
        chosen = deployment(shape, num_pages=num_pages, latent_cache_dtype="fp8")
        async with local_cell(pool, chosen, model_dir) as cell:
            together = await asyncio.gather(
                *(cell.generate(request(f"r{i}", prompt)) for i, prompt in enumerate(prompts))
            )
            return together, await cell.generate(request("again", prompts[1]))

    together, again = asyncio.run(run())
    assert [tokens_of(events) for events in together] == expected_of_fp8
    assert tokens_of(again) == expected_of_fp8[1]
    assert again[0].num_cached_tokens > 0 or num_pages == 12
    assert expected_of_fp8 != [tokens for _, tokens, _ in expected]


def test_closing_the_stream_frees_the_requests_pages(pool, model_dir, expected):
    async def run():
        async with local_cell(pool, deployment((Layout.SPLIT, 1, 2)), model_dir) as cell:
            stream = cell.client.submit(request("long", expected[1][0], num_new=400))
            async for _ in stream:
                break
            await stream.aclose()
            async with asyncio.timeout(30):
                while (load := (await cell.client.state()).loads[0]).num_free_pages < 64:
                    await asyncio.sleep(0.02)
            return load

    load = asyncio.run(run())
    assert (load.num_running, load.num_waiting) == (0, 0)
    assert load.num_output_tokens < 400


def test_a_repeated_prompt_is_served_from_the_prefix_cache_with_the_same_tokens(
    pool, model_dir, expected
):
    prompt, tokens, _ = expected[1]

    async def run():
        async with local_cell(pool, deployment((Layout.SPLIT, 2, 2)), model_dir) as cell:
            first = await cell.generate(request("first", prompt))
            second = await cell.generate(request("second", prompt))
            return first, second

    first, second = asyncio.run(run())
    assert first[0].num_cached_tokens == 0
    assert second[0].num_cached_tokens == len(prompt) // 8 * 8 - (8 if len(prompt) % 8 == 0 else 0)
    assert tokens_of(first) == tokens_of(second) == tokens


@pytest.mark.parametrize(
    ("shape", "mode"),
    [
        ((Layout.SINGLE, 1, 1), (DispatchMode.AUTO, 1, 0)),
        ((Layout.SPLIT, 2, 2), (DispatchMode.SPARSE, 2, 0)),
    ],
    ids=["single", "split"],
)
def test_choices_share_their_prompt_and_are_what_their_seeds_give_alone(
    pool, model_dir, expected, shape, mode
):
    """The prompt of 70 tokens takes three steps and is computed once; the choices differ."""
    prompt, greedy, _ = expected[4]
    sampled = {"temperature": 1.0, "seed": 3}

    async def run():
        async with local_cell(pool, deployment(shape, mode), model_dir) as cell:

            async def choices(name, **sampling):
                asked = request(name, prompt, **sampling)
                asked = msgspec.structs.replace(asked, num_choices=3)
                answers = [[], [], []]
                async for event in cell.client.submit(asked):
                    answers[event.choice].append(event)
                return answers

            together = await choices("together", **sampled)
            loads = (await cell.client.state()).loads.values()
            alike = await choices("alike")
            alone = [
                tokens_of(await cell.generate(request("alone", prompt, **sampled | {"seed": seed})))
                for seed in (choice_seed(3, index) for index in range(3))
            ]
            return together, list(loads), alike, alone

    together, loads, alike, alone = asyncio.run(run())
    assert [tokens_of(events) for events in together] == alone
    assert len({tuple(tokens) for tokens in alone}) == 3
    assert [tokens_of(events) for events in alike] == [greedy] * 3
    assert [events[0].num_cached_tokens for events in together] == [0, 64, 64]
    computed = [load.prefix_queries_tokens - load.prefix_hits_tokens for load in loads]
    assert sum(computed) == 70 + 2 * 6


def test_the_router_counts_rows_per_expert(pool, model_dir, expected):
    async def run():
        async with local_cell(pool, deployment((Layout.SPLIT, 1, 3)), model_dir) as cell:
            await cell.generate(request("r", expected[1][0], num_new=30))
            async with asyncio.timeout(30):
                while not sum(map(sum, (state := await cell.client.state()).rows_LE)):
                    await cell.generate(request("again", expected[0][0], num_new=2))
                    await asyncio.sleep(0.3)
            return state

    state = asyncio.run(run())
    assert len(state.rows_LE) == 2
    assert all(len(rows_E) == 16 for rows_E in state.rows_LE)
    assert sorted(set(state.rank_of_physical)) == [1, 2, 3]


def test_a_request_id_can_be_used_again_right_after_its_stream_was_left(pool, model_dir, expected):
    prompt, tokens, _ = expected[2]

    async def run():
        answers = []
        async with local_cell(pool, deployment((Layout.SPLIT, 1, 2)), model_dir) as cell:
            for _ in range(12):
                left = cell.client.submit(request("same", prompt, num_new=200))
                async for _ in left:
                    break
                await left.aclose()
                answers.append(tokens_of(await cell.generate(request("same", prompt))))
        return answers

    assert asyncio.run(run()) == [tokens] * 12
