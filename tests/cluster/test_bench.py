"""Benchmarks: their figures, layouts and seeded inputs; they are run by hand."""

import asyncio
import json

import pytest

from ostro.cluster.bench_engine import Workload, parse_layout, prompts
from ostro.cluster.bench_faces import closed_loop
from ostro.cluster.bench_figures import Figure, to_table, write_json
from ostro.configs.deployment import Layout
from ostro.configs.errors import ConfigError


def test_figure_tells_median_and_half_the_range_over_it():
    figure = Figure("ostro", "decode", "tok/s", (8.0, 10.0, 14.0))
    assert figure.median() == 10.0
    assert figure.spread() == pytest.approx(0.3)


def test_table_gives_ratios_to_the_anchor_of_the_same_quantity(tmp_path):
    figures = [
        Figure("a", "decode", "tok/s", (10.0,)),
        Figure("b", "decode", "tok/s", (25.0,)),
        Figure("b", "other", "ms", (1.0,)),
    ]
    table = to_table("T", figures, anchor="a")
    assert list(table.columns[-1].cells) == ["1.00", "2.50", ""]
    write_json(tmp_path / "f.json", figures, model="m")
    body = json.loads((tmp_path / "f.json").read_text())
    assert body["model"] == "m"
    assert body["figures"][1]["samples"] == [25.0]


@pytest.mark.parametrize(
    ("text", "layout", "ranks"),
    [
        ("single", Layout.SINGLE, 1),
        ("colocated:3", Layout.COLOCATED, 3),
        ("split:1:2", Layout.SPLIT, 3),
    ],
)
def test_layout_is_read_from_a_word(text, layout, ranks):
    config = parse_layout(text)
    assert (config.layout, config.world_size()) == (layout, ranks)


@pytest.mark.parametrize("text", ["", "split", "split:1", "single:2", "colocated:x", "split:0:1"])
def test_a_layout_that_is_none_is_refused(text):
    with pytest.raises(ConfigError):
        parse_layout(text)


def test_prompts_repeat_for_a_seed_and_differ_between_seeds():
    workload = Workload(batch=3, prompt_tokens=5)
    assert prompts(workload, 4096, 1) == prompts(workload, 4096, 1)
    assert prompts(workload, 4096, 1) != prompts(workload, 4096, 2)
    assert [len(prompt) for prompt in prompts(workload, 4096, 1)] == [5, 5, 5]


def test_closed_loop_keeps_so_many_requests_running_and_counts_all_tokens():
    running, most = 0, 0

    async def generate(_name, _prompt, new_tokens):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return [1.0] * new_tokens

    sample = asyncio.run(closed_loop(generate, "n", 3, [[1]] * 10, 4))
    assert most == 3
    assert sample.tokens_per_s > 0
