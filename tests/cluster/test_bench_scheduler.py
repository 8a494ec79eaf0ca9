"""The scheduler's benchmark at a tiny size: it runs what it says, and leaves nothing behind."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ostro.cluster.bench import app
from ostro.cluster.bench_scheduler import Rig, Scenario, measure_memory, profile_steps

scenarios = pytest.mark.parametrize("scenario", Scenario, ids=lambda scenario: scenario.name)


@scenarios
@pytest.mark.parametrize("num_running", [1, 5])
def test_rig_keeps_so_many_requests_running(scenario, num_running):
    rig = Rig(scenario, num_running, 300)
    before = rig.scheduler.load()
    for _ in range(200):
        rig.step()
    after = rig.scheduler.load()
    rig.scheduler.check_integrity()
    running = num_running + (scenario is Scenario.MIXED)
    # Where requests come and go, those that just ended are waiting again.
    assert after.num_running + after.num_waiting == running
    # In MIXED some steps end a prompt, whose first token is an output too.
    assert after.num_output_tokens - before.num_output_tokens >= 150 * num_running
    has_arrivals = after.num_prompt_tokens > before.num_prompt_tokens
    assert has_arrivals is (scenario is not Scenario.DECODE)


def test_steps_leave_nothing_behind_where_requests_come_and_go():
    sample = measure_memory(Scenario.ARRIVALS, 8, 128)
    assert sample.growth_bytes < 64  # the output itself is forgotten with its request
    assert sample.peak_bytes > 0


def test_profile_names_the_scheduler():
    lines = profile_steps(Scenario.DECODE, 4, 20)
    assert any(line.function.startswith("scheduler:") for line in lines[:8])


def test_command_writes_figures(tmp_path):
    told = tmp_path / "told.json"
    arguments = ["scheduler", "--running", "1,2", "--steps", "20", "--rounds", "2"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(told)])
    assert result.exit_code == 0, result.output
    figures = json.loads(told.read_text())["figures"]
    step = [row for row in figures if row["quantity"] == "step p99 running=2"]
    assert sorted(row["subject"] for row in step) == sorted(scenario.value for scenario in Scenario)
    assert all(len(row["samples"]) == 2 for row in step)


def test_command_wants_a_number():
    assert CliRunner().invoke(app, ["scheduler", "--running", ""]).exit_code == 2


def test_commands_are_there_without_torch_and_ray():
    code = (
        "import sys, ostro.cluster.bench\n"
        "print([name for name in ('torch', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
