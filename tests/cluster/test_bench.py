"""Benchmarks: their figures, layouts and seeded inputs; they are run by hand."""

import asyncio
import itertools
import json
from types import SimpleNamespace

import pytest
from checkpoints import make_tiny_checkpoint
from typer.testing import CliRunner

from ostro.actors.engine.request import TokenEvent
from ostro.actors.errors import OstroError
from ostro.actors.model.draft_head import find_draft_head
from ostro.cluster.bench import app
from ostro.cluster.bench_engine import (
    BenchmarkError,
    engine_deployment,
    parse_layout,
    run_workload,
    steady_step_s,
)
from ostro.cluster.bench_faces import run_face
from ostro.cluster.bench_figures import Figure, to_table, write_json
from ostro.cluster.bench_load import ClosedLoop
from ostro.cluster.bench_statistics import Failure, Outcome
from ostro.cluster.bench_workload import (
    DecodeSample,
    Workload,
    context_workloads,
    prefill_workloads,
    prompts,
)
from ostro.configs.deployment import Layout
from ostro.configs.errors import ConfigError
from ostro.configs.model import load_model_config


def test_a_checkpoint_goes_into_no_folder_that_cannot_be_made():
    result = CliRunner().invoke(app, ["checkpoint", "/dev/null/mid", "--size", "tiny"])
    assert result.exit_code == 2
    assert "error: /dev/null/mid: Not a directory" in result.stderr


def test_a_checkpoint_may_come_with_a_draft_head(tmp_path):
    result = CliRunner().invoke(
        app, ["checkpoint", str(tmp_path / "tiny"), "--size", "tiny", "--draft-head"]
    )
    assert result.exit_code == 0, result.output
    model = load_model_config(tmp_path / "tiny")
    assert find_draft_head(tmp_path / "tiny" / "eagle", model).config.num_layers == 2


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


def test_table_gives_each_subject_the_ratio_to_its_own_anchor():
    figures = [
        Figure(f"{engine} {name}", "decode", "tok/s", (speed,))
        for engine, name, speed in (("o", 1, 30.0), ("t", 1, 10.0), ("o", 2, 30.0), ("t", 2, 20.0))
    ]
    table = to_table("T", figures, anchor="t", anchor_of={"o 1": "t 1", "o 2": "t 2"})
    assert list(table.columns[-1].cells) == ["3.00", "", "1.50", ""]


def test_table_without_anchor_has_no_ratios_and_keeps_the_order_of_quantities():
    figures = [Figure("a", name, "ms", (1.0,)) for name in ("B=1", "B=16", "B=8")]
    table = to_table("T", [*figures, *(Figure("b", "B=1", "ms", (1.0,)),)], anchor=None)
    assert len(table.columns) == 4
    assert list(table.columns[0].cells) == ["B=1", "B=1", "B=16", "B=8"]


def test_workloads_tell_what_they_are_for():
    sample = DecodeSample(step_s=0.5, first_token_s=2.0, seconds={}, num_steps=3)
    (prefill,) = prefill_workloads([2048])
    (context,) = context_workloads([4096], 16)
    decode = Workload(batch=8)
    workloads = (prefill, context, decode)
    assert [workload.tokens_per_s(sample) for workload in workloads] == [1024.0, 2.0, 16.0]
    assert [workload.label() for workload in workloads] == [
        "prefill of 2048",
        "decode after 4096",
        "decode B=8",
    ]


def test_a_prefill_has_no_steps_to_time():
    sample = DecodeSample(step_s=None, first_token_s=2.0, seconds={}, num_steps=1)
    assert prefill_workloads([100])[0].tokens_per_s(sample) == 50.0
    with pytest.raises(ValueError, match="decode B=2"):
        Workload(batch=2).tokens_per_s(sample)


class ScriptedCell:
    """A cell client whose requests get one token an event, and which counts its steps."""

    def __init__(self):
        self.num_steps = 0

    async def state(self):
        return SimpleNamespace(seconds={"forward": float(self.num_steps)}, num_steps=self.num_steps)

    async def submit(self, request):
        for index in range(request.stop.max_tokens):
            await asyncio.sleep(0)
            self.num_steps += 1
            yield TokenEvent(request.request_id, index, [7])


def sampled(workload):
    return asyncio.run(run_workload(ScriptedCell(), workload, prompts(workload, 4096, 1), "n"))


def test_a_run_times_steps_and_stages(monkeypatch):
    ticks = itertools.count(0.0)
    clock = SimpleNamespace(perf_counter=lambda: next(ticks))
    monkeypatch.setattr("ostro.cluster.bench_engine.time", clock)
    sample = sampled(Workload(batch=2, prompt_tokens=3, new_tokens=5))
    assert sample.step_s == 2.0  # two requests, one look at the clock for each token
    assert (sample.num_steps, sample.seconds) == (10, {"forward": 10.0})


def test_steps_are_timed_while_all_requests_decode():
    early, late = [0.0, 5.0, 6.0, 9.0], [5.5, 6.0, 7.0, 9.0, 99.0]
    assert steady_step_s([early, late]) == 1.0


def test_requests_that_do_not_decode_together_tell_no_step():
    with pytest.raises(BenchmarkError, match="--new-tokens"):
        steady_step_s([[0.0, 1.0, 2.0], [1.5, 2.5, 3.5]])


def test_tokens_that_come_in_bursts_tell_no_step():
    burst = [10.0 * (index // 4) + 1e-4 * index for index in range(12)]
    with pytest.raises(BenchmarkError, match="too busy"):
        steady_step_s([burst])


def test_a_run_of_a_prefill_has_a_first_token_alone():
    (prefill,) = prefill_workloads([30])
    sample = sampled(prefill)
    assert sample.step_s is None
    assert sample.first_token_s > 0


def test_deployment_has_room_for_every_workload(tmp_path):
    model = make_tiny_checkpoint(tmp_path / "m")
    workloads = [Workload(batch=300), *context_workloads([1000], 24)]
    engine = engine_deployment(parse_layout("single"), model, "float32", workloads).engine
    assert engine.num_pages == 300 * (192 // 16 + 1)
    assert engine.max_running_requests == 300
    assert not engine.prefix_cache


def test_deployment_refuses_what_the_context_cannot_hold(tmp_path):
    model = make_tiny_checkpoint(tmp_path / "m", max_positions=1024)
    with pytest.raises(ConfigError, match="--context"):
        engine_deployment(parse_layout("single"), model, "float32", context_workloads([1010], 64))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch", ""], "asks for anything"),
        (["--prefill", "0"], "at least 1"),
        (["--context", "a"], "by commas"),
        (["--beside", "vllm"], "only transformers"),
    ],
)
def test_engine_refuses_options_that_make_no_sense(arguments, said):
    result = CliRunner().invoke(app, ["engine", "--model", "m", *arguments])
    assert result.exit_code == 2
    assert said in " ".join(result.output.replace("│", " ").split())


def test_prompts_repeat_for_a_seed_and_differ_between_seeds():
    workload = Workload(batch=3, prompt_tokens=5)
    assert prompts(workload, 4096, 1) == prompts(workload, 4096, 1)
    assert prompts(workload, 4096, 1) != prompts(workload, 4096, 2)
    assert [len(prompt) for prompt in prompts(workload, 4096, 1)] == [5, 5, 5]


def face_outcome(due_s: float, failure: Failure | None = None) -> Outcome:
    return Outcome(
        due_s=due_s,
        ended_s=due_s + 2.0,
        arrivals_s=(due_s + 1.0,),
        num_output_tokens=4,
        failure=failure,
    )


def test_a_face_is_called_so_many_times_at_once_under_names_of_its_own():
    running, most, names = 0, 0, []

    async def call(_prompt, _new_tokens, name, due_s):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        names.append(name)
        return face_outcome(due_s)

    run = asyncio.run(run_face(call, ClosedLoop(3), [[1]] * 10, 4, "n"))
    assert most == 3
    assert len(set(names)) == len(run.outcomes) == 10


def test_a_failed_request_ends_the_benchmark_of_the_faces():
    async def call(_prompt, _new_tokens, _name, due_s):
        return face_outcome(due_s, Failure("overloaded", "no room"))

    with pytest.raises(OstroError, match="overloaded: no room"):
        asyncio.run(run_face(call, ClosedLoop(1), [[1]], 4, "n"))
