"""Face benchmarks: what HTTP and gRPC add to a real engine's first token, and what they keep of it.

A whole deployment is up; the same prompts go straight into the cell, through HTTP and through gRPC,
in turns.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path

import ray

from ostro.actors.errors import OstroError
from ostro.cluster.bench_face_calls import Call, Cell, open_faces
from ostro.cluster.bench_figures import Figure
from ostro.cluster.bench_load import ClosedLoop, PromptShape, run_load
from ostro.cluster.bench_progress import Progress
from ostro.cluster.bench_serve import Runs, to_figures
from ostro.cluster.bench_statistics import LoadRun, Outcome, Slo
from ostro.cluster.bench_stream import Prompt
from ostro.cluster.launch import launch
from ostro.cluster.running_cluster import RunningCluster
from ostro.configs.deployment import DeploymentConfig
from ostro.configs.model import load_model_config

_CALL_TIMEOUT_S = 30.0
_REQUESTS_PER_PLACE = 4
_FEWEST_REQUESTS = 8


def find_cell(cluster: RunningCluster, model: Path) -> Cell:
    """Where a running deployment's router and faces are."""
    serving = cluster.deployment.serving
    return Cell(
        model=cluster.deployment.served_name or model.resolve().name,
        router_address=ray.get(cluster.router.address.remote(), timeout=_CALL_TIMEOUT_S),
        secret=cluster.secret,
        http_url=f"http://127.0.0.1:{serving.http_port}",
        grpc_address=f"127.0.0.1:{serving.grpc_port}",
    )


def measure_faces(
    deployment: DeploymentConfig,
    model: Path,
    *,
    concurrencies: Sequence[int],
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    progress: Progress,
) -> list[Figure]:
    """What callers of the bare engine, HTTP and gRPC see at each concurrency.

    Raises:
        OstroError: A request failed; nothing here may.
    """
    vocab_size = load_model_config(model).vocab_size
    shape = PromptShape(
        num_tokens=prompt_tokens,
        as_text=False,
        first_token_id=vocab_size // 2,  # no control tokens
        end_token_id=vocab_size,
    )
    progress.note("starting")
    cluster = launch(deployment, model)
    try:
        cell = find_cell(cluster, model)
        runs = asyncio.run(_measure(cell, concurrencies, shape, new_tokens, rounds, progress))
    finally:
        cluster.stop()
    return to_figures(runs, Slo())


async def _measure(
    cell: Cell,
    concurrencies: Sequence[int],
    shape: PromptShape,
    new_tokens: int,
    rounds: int,
    progress: Progress,
) -> Runs:
    taken: Runs = {}
    async with open_faces(cell, "bench") as faces:
        for turn in range(rounds + 1):
            for load in map(ClosedLoop, concurrencies):
                num_requests = max(_REQUESTS_PER_PLACE * load.concurrency, _FEWEST_REQUESTS)
                prompts = shape.prompts(num_requests, f"{turn}/{load.label()}")
                for face, call in faces.items():
                    progress.note(f"round {turn} of {rounds}, {face}, {load.label()}")
                    name = f"{turn}-{load.label()}-{face.name}"
                    run = await run_face(call, load, prompts, new_tokens, name)
                    if turn:  # the first round warms up
                        taken.setdefault((face.value, load), []).append(run)
    return taken


async def run_face(
    call: Call, load: ClosedLoop, prompts: Sequence[Prompt], new_tokens: int, name: str
) -> LoadRun:
    """One closed loop through one face; request ids begin with `name`.

    Raises:
        OstroError: A request failed.
    """
    numbers = itertools.count()

    async def send(prompt: Prompt, due_s: float) -> Outcome:
        if isinstance(prompt, str):
            raise TypeError("the faces are given token ids")
        return await call(prompt, new_tokens, f"{name}-{next(numbers)}", due_s)

    run = await run_load(load, send, prompts, name, lambda: None)
    for failure in run.failures():
        raise OstroError(f"request {name} failed with {failure.kind}: {failure.detail}")
    return run
