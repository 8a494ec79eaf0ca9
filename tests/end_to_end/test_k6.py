"""k6, a load tool that nobody here wrote, streams over both faces of a deployment at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from buf_protos import lay_out
from served import Served

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("k6_streams.js")
MODEL = "ostro-teaching-7m"
NUM_STREAMS = 2 * 4 * 5  # faces, users of each, turns of each user
NUM_CHECKS = 4


def run_k6(served: Served, folder: Path) -> tuple[dict[str, Any], str]:
    """The summary that the script writes, and what k6 said on the way."""
    lay_out(folder / "protos")
    variables = {
        "HTTP_URL": served.url,
        "GRPC_ADDRESS": served.grpc_address,
        "MODEL": MODEL,
        "PROTOS": str(folder / "protos"),
        "SUMMARY": str(folder / "summary.json"),
    }
    quiet = ["--quiet", "--no-color", "--no-usage-report", "--address", ""]  # no port of its own
    done = subprocess.run(
        [Path(sys.executable).with_name("k6"), "run", *quiet, SCRIPT],
        env={**os.environ, "HOME": str(folder), **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary, done.stderr


def test_k6_reads_every_stream_of_both_faces_to_a_good_end(served, tmp_path):
    summary, said = run_k6(served, tmp_path)
    assert (summary["ended"], summary["failed"]) == (NUM_STREAMS, 0), f"{summary}\n{said}"
    assert summary["iterations"] == NUM_STREAMS
    for face in ("http", "grpc"):
        passed = [
            counts for name, counts in summary["checks"].items() if name.startswith(f"{face}: ")
        ]
        assert passed == [[NUM_STREAMS // 2, 0]] * NUM_CHECKS
    assert "level=error" not in said
