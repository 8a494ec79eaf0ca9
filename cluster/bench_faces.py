"""Face benchmarks: what HTTP and gRPC add to the bare engine's first token, in one run.

A whole deployment is up; the same prompts go through a client that stands in for an ingress (the
bare engine), through HTTP and through gRPC, in turns.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import grpc

from ostro.actors.engine.request import GenerationRequest, SamplingParams, StopParams
from ostro.cluster.bench_engine import connect_client
from ostro.cluster.bench_figures import Figure
from ostro.cluster.bench_workload import Workload, prompts
from ostro.cluster.cell_client import CellClient
from ostro.cluster.launch import RunningCluster, launch
from ostro.configs.deployment import DeploymentConfig
from ostro.configs.model import load_model_config
from ostro.protos import generation_pb2, generation_pb2_grpc

BARE = "bare engine"
_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class FaceSample:
    """One closed loop: medians over its requests, and the tokens of all of them per second."""

    first_token_s: float
    tokens_per_s: float


Generate = Callable[[str, list[int], int], Awaitable[list[float]]]


async def through_engine(
    client: CellClient, name: str, prompt: list[int], new_tokens: int
) -> list[float]:
    """Arrival times of a request's tokens, straight from the cell."""
    request = GenerationRequest(
        request_id=name,
        prompt_token_ids=prompt,
        sampling=SamplingParams(),
        stop=StopParams(max_tokens=new_tokens, ignore_eos=True),
    )
    times: list[float] = []
    async for event in client.submit(request):
        times.extend(time.perf_counter() for _ in event.token_ids)
    return times


async def through_http(
    session: aiohttp.ClientSession, url: str, model: str, prompt: list[int], new_tokens: int
) -> list[float]:
    """Arrival times of the SSE events of `/v1/completions` that carry text."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    times: list[float] = []
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:])["choices"]
                if choices and choices[0].get("token_ids"):
                    now_s = time.perf_counter()
                    times.extend(now_s for _ in choices[0]["token_ids"])
    return times


async def through_grpc(
    stub: generation_pb2_grpc.GenerationServiceStub, prompt: list[int], new_tokens: int
) -> list[float]:
    """Arrival times of the deltas of `StreamGenerate`."""
    options = generation_pb2.GenerationOptions(
        sampling=generation_pb2.SamplingOptions(temperature=0),
        stopping=generation_pb2.StoppingOptions(max_tokens=new_tokens, ignore_eos=True),
        return_token_ids=True,
    )
    request = generation_pb2.StreamGenerateRequest(
        tokens=generation_pb2.Tokens(ids=prompt), options=options
    )
    times: list[float] = []
    async for message in stub.StreamGenerate(request, timeout=_TIMEOUT_S):
        if message.HasField("delta"):
            now_s = time.perf_counter()
            times.extend(now_s for _ in message.delta.token_ids)
    return times


async def closed_loop(
    generate: Generate, name: str, concurrency: int, token_ids: Sequence[list[int]], new_tokens: int
) -> FaceSample:
    """Keep so many requests running until all prompts are through."""
    queue = list(enumerate(token_ids))
    first_token_s: list[float] = []
    num_tokens = 0

    async def worker() -> None:
        nonlocal num_tokens
        while queue:
            index, prompt = queue.pop()
            began_s = time.perf_counter()
            times = await generate(f"{name}-{index}", prompt, new_tokens)
            first_token_s.append(times[0] - began_s)
            num_tokens += len(times)

    began_s = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    elapsed_s = time.perf_counter() - began_s
    return FaceSample(statistics.median(first_token_s), num_tokens / elapsed_s)


def measure_faces(
    deployment: DeploymentConfig,
    model: Path,
    *,
    concurrencies: Sequence[int],
    workload: Workload,
    rounds: int,
    note: Callable[[str], None],
) -> list[Figure]:
    """First-token time and throughput of the bare engine, HTTP and gRPC at each concurrency."""
    cluster = launch(deployment, model)
    try:
        name = deployment.served_name or model.resolve().name
        vocab_size = load_model_config(model).vocab_size
        return asyncio.run(
            _measure(cluster, (name, vocab_size), concurrencies, workload, rounds, note)
        )
    finally:
        cluster.stop()


async def _measure(
    cluster: RunningCluster,
    served: tuple[str, int],
    concurrencies: Sequence[int],
    workload: Workload,
    rounds: int,
    note: Callable[[str], None],
) -> list[Figure]:
    serving, (name, vocab_size) = cluster.deployment.serving, served
    client = await connect_client(cluster, "bench")
    taken: dict[tuple[str, int], list[FaceSample]] = {}
    url = f"http://127.0.0.1:{serving.http_port}"
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        grpc.aio.insecure_channel(f"127.0.0.1:{serving.grpc_port}") as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        faces: dict[str, Generate] = {
            BARE: lambda i, p, n: through_engine(client, i, p, n),
            "HTTP": lambda _, p, n: through_http(session, url, name, p, n),
            "gRPC": lambda _, p, n: through_grpc(stub, p, n),
        }
        for turn in range(rounds + 1):
            for concurrency in concurrencies:
                size = Workload(
                    batch=max(workload.batch, 2 * concurrency),
                    prompt_tokens=workload.prompt_tokens,
                )
                for face, generate in faces.items():
                    note(f"round {turn} of {rounds}, {face}, concurrency {concurrency}")
                    token_ids = prompts(size, vocab_size, 1000 * turn + concurrency)
                    sample = await closed_loop(
                        generate,
                        f"{turn}-{concurrency}",
                        concurrency,
                        token_ids,
                        workload.new_tokens,
                    )
                    if turn:  # the first round warms up
                        taken.setdefault((face, concurrency), []).append(sample)
    await client.close()
    return [figure for key, samples in taken.items() for figure in _figures(*key, samples)]


def _figures(face: str, concurrency: int, samples: Sequence[FaceSample]) -> list[Figure]:
    first_ms = tuple(sample.first_token_s * 1e3 for sample in samples)
    rates = tuple(sample.tokens_per_s for sample in samples)
    return [
        Figure(face, f"first token c={concurrency}", "ms", first_ms),
        Figure(face, f"throughput c={concurrency}", "tok/s", rates),
    ]
