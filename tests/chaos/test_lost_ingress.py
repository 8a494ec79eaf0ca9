"""Ingress replicas that die while clients read from them: clients go on with what they have."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Served

from ostro.cluster.client import Client
from ostro.cluster.client_streams import Resumed
from ostro.cluster.retries import Retries
from ostro.protos import generation_pb2 as pb

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

PATIENT = Retries(most=40, first_delay_s=0.2, longest_delay_s=2.0)
QUESTION = "What is 847 * 26?"
# Long enough that it is still being made when the replica dies, however busy the machine.
ASKED = {
    "effort": "high",
    "temperature": 0,
    "options": pb.GenerationOptions(stopping=pb.StoppingOptions(ignore_eos=True, max_tokens=1500)),
}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with Served(tmp_path / "serve.log", "laptop_single") as served:
        yield served


def replicas(served: Served) -> list[int]:
    def title(pid: int) -> bytes:
        return Path(f"/proc/{pid}/cmdline").read_bytes()

    return [pid for pid in served.children() if b"ServeReplica" in title(pid)]


def test_a_stream_outlives_its_ingress_replica(served: Served) -> None:
    with Client(served.grpc_address, retries=PATIENT) as client:
        whole = client.chat(QUESTION, **ASKED).choices[0].message
        texts, breaks = {pb.CHANNEL_THINKING: "", pb.CHANNEL_ANSWER: ""}, []
        for event in client.stream_chat(QUESTION, **ASKED):
            if isinstance(event, pb.Delta):
                if not breaks and texts[pb.CHANNEL_THINKING] == "":
                    for pid in replicas(served):
                        os.kill(pid, signal.SIGKILL)
                texts[event.channel] += event.text
            elif isinstance(event, Resumed):
                breaks.append(event.after)
    assert len(breaks) == 1
    assert whole.parts[0].thinking.text == texts[pb.CHANNEL_THINKING]
    assert whole.parts[1].text == texts[pb.CHANNEL_ANSWER]
