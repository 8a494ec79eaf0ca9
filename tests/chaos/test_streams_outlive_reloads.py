"""An ingress replica that dies reloads HAProxy; streams through the other replica go on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from served import Served

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

# More steps than any machine computes in the time that Serve takes to notice and to reload.
BODY = {"prompt": "847", "n": 16, "max_tokens": 3500, "ignore_eos": True, "stream": True}
RELOAD_S = 12.0
START_S, WATCH_S = 8.0, 12.0  # replicas have started; the one that serves has computed most


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    arguments = ("laptop_single", "--set", "serving.num_ingress_replicas=2")
    with Served(tmp_path / "serve.log", *arguments) as served:
        yield served


def _replicas(served: Served) -> set[int]:
    def title(pid: int) -> bytes:
        return Path(f"/proc/{pid}/cmdline").read_bytes()

    return {pid for pid in served.children() if b"ServeReplica" in title(pid)}


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def _is_due(since_s: float, wait_s: float) -> bool:
    return time.monotonic() - since_s > wait_s


def test_a_stream_outlives_the_reload_for_another_replica(served: Served) -> None:
    began_s = time.monotonic()
    before: dict[int, int] = {}
    killed_s: float | None = None
    with (
        httpx.Client(base_url=served.url, timeout=120) as client,
        client.stream("POST", "/v1/completions", json=BODY) as answer,
    ):
        for _ in answer.iter_lines():
            if not before and _is_due(began_s, START_S):
                before = {pid: _cpu_ticks(pid) for pid in _replicas(served)}
                assert len(before) == 2
            if killed_s is None and _is_due(began_s, WATCH_S):
                idle = min(before, key=lambda pid: _cpu_ticks(pid) - before[pid])
                os.kill(idle, signal.SIGKILL)
                killed_s = time.monotonic()
            if killed_s is not None and _is_due(killed_s, RELOAD_S):
                return
    pytest.fail("the stream ended" if killed_s else "the stream was over too soon to tell")
