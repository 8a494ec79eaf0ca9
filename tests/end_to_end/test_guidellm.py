"""guidellm, a load tool that nobody here wrote, measures a deployment as its users would.

It lives in an environment of its own under build/, made once, which borrows the packages of ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
from served import Served

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(500)]

REQUIREMENTS = Path(__file__).with_name("guidellm.txt")
ENVIRONMENT = Path(__file__).parents[2] / "build" / "guidellm"
NUM_REQUESTS = 12


@pytest.fixture(scope="module")
def guidellm() -> Path:
    """The command."""
    installed = ENVIRONMENT / REQUIREMENTS.name  # written last, so that half an install is none
    if not installed.exists() or installed.read_text() != REQUIREMENTS.read_text():
        _install()
        installed.write_text(REQUIREMENTS.read_text())
    return ENVIRONMENT / "bin" / "guidellm"


def _install() -> None:
    venv.create(ENVIRONMENT, clear=True, with_pip=True)
    python = str(ENVIRONMENT / "bin" / "python")
    paths = {"base": str(ENVIRONMENT), "platbase": str(ENVIRONMENT)}
    packages = Path(sysconfig.get_path("purelib", vars=paths))
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ["--quiet", "--no-deps", "--retries", "1", "-r", str(REQUIREMENTS)]
    install = [python, "-m", "pip", "install", *options]
    done = subprocess.run(install, capture_output=True, text=True, check=False, timeout=240)
    if done.returncode:
        pytest.skip(f"guidellm cannot be installed: {done.stderr.strip()[-300:]}")


def measured(guidellm: Path, served: Served, folder: Path) -> dict[str, Any]:
    """The metrics of a short run of thinking answers, four at a time."""
    questions, report = folder / "questions.jsonl", folder / "report.json"
    lines = (json.dumps({"prompt": f"What is {n} + {n + 7}?"}) for n in range(NUM_REQUESTS))
    questions.write_text("\n".join(lines))
    backend = {
        "kind": "openai_http",
        "target": served.url,
        "model": "ostro-teaching-7m",
        "extras": {"body": {"reasoning_effort": "high"}},
    }
    options = {
        "--backend": json.dumps(backend),
        "--profile": "kind=concurrent,streams=4",
        "--constraint": f"kind=max_requests,count={NUM_REQUESTS}",
        "--data": f"kind=json_file,path={questions}",
        "--output": f"kind=json,path={report}",
    }
    done = subprocess.run(
        [guidellm, "run", *(word for option in options.items() for word in option)],
        cwd=folder,
        env={**os.environ, "HOME": str(folder), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    metrics: dict[str, Any] = benchmark["metrics"]
    return metrics


def test_guidellm_measures_thinking_answers_without_an_error(guidellm, served, tmp_path):
    metrics = measured(guidellm, served, tmp_path)
    totals = metrics["request_totals"]
    assert (totals["successful"], totals["errored"], totals["incomplete"]) == (NUM_REQUESTS, 0, 0)
    for counted in ("prompt_token_count", "output_token_count"):
        assert metrics[counted]["successful"]["count"] == NUM_REQUESTS
        assert metrics[counted]["successful"]["min"] > 0
    # It tells the thinking, which comes first, from the answer.
    first, first_answer = (
        metrics[name]["successful"]
        for name in ("time_to_first_token_ms", "time_to_first_output_token_ms")
    )
    assert first["count"] == first_answer["count"] == NUM_REQUESTS
    assert first["mean"] < first_answer["mean"]
