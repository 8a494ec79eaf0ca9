"""Engine benchmarks: a real cell without ingress, driven in place of one, beside transformers."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import ray
import torch

from ostro.actors.engine.request import GenerationRequest, SamplingParams, StopParams, TokenEvent
from ostro.actors.errors import OstroError
from ostro.cluster.bench_figures import STAGE_UNIT, Figure
from ostro.cluster.bench_transformers import TransformersEngine
from ostro.cluster.bench_workload import DecodeSample, Question, Workload, prompts
from ostro.cluster.cell_client import CellClient
from ostro.cluster.launch import launch
from ostro.cluster.running_cluster import RunningCluster
from ostro.configs.deployment import DeploymentConfig, EngineConfig, Layout, LayoutConfig
from ostro.configs.errors import ConfigError
from ostro.configs.model import load_model_config

ANCHOR = "transformers"
_BURST = 0.1  # of the mean gap; below it, half of the gaps or more are no steps
_READY_TIMEOUT_S = 60.0


class BenchmarkError(OstroError):
    """A run does not tell what it was to tell."""

    code = "benchmark_failed"


def parse_layout(text: str) -> LayoutConfig:
    """A layout from "single", "colocated:N" or "split:A:E".

    Raises:
        ConfigError: It is none of these.
    """
    kind, *counts = text.split(":")
    try:
        numbers = [int(count) for count in counts]
        if kind == "single" and not numbers:
            attention = experts = 1
        elif kind == "colocated" and len(numbers) == 1:
            attention = experts = numbers[0]
        elif kind == "split" and len(numbers) == 2:
            attention, experts = numbers
        else:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"layout {text!r}: must be 'single', 'colocated:N' or 'split:A:E'"
        ) from None
    return LayoutConfig(
        layout=Layout(kind),
        num_attention_shards=attention,
        num_expert_shards=experts,
    )


def engine_deployment(
    layout: LayoutConfig, model: Path, dtype: str, workloads: Sequence[Workload]
) -> DeploymentConfig:
    """A deployment with room for each of the workloads, without prefix reuse.

    Raises:
        ConfigError: A workload is longer than the checkpoint's context.
    """
    engine = EngineConfig()
    longest = max(workload.prompt_tokens + workload.new_tokens for workload in workloads)
    max_context = load_model_config(model).max_context
    if longest > max_context:
        raise ConfigError(
            f"{longest} tokens of prompt and output are asked for, and the context of {model.name} "
            f"ends at {max_context}; ask for less by --context, --prefill or --prompt-tokens"
        )
    running = max(engine.max_running_requests, *(workload.batch for workload in workloads))
    engine = replace(
        engine,
        num_pages=max(workload.num_pages(engine.page_size) for workload in workloads),
        max_running_requests=running,
        max_tokens_per_step=max(engine.max_tokens_per_step, running),
        prefix_cache=False,
        dtype=dtype,
    )
    return DeploymentConfig(model=str(model), layout=layout, engine=engine)


@contextmanager
def running_cell(deployment: DeploymentConfig, model: Path) -> Iterator[RunningCluster]:
    """A cell without ingress, ended on exit."""
    cluster = launch(deployment, model, with_ingress=False)
    try:
        yield cluster
    finally:
        cluster.stop()


async def connect_client(cluster: RunningCluster, name: str) -> CellClient:
    """A client that stands in for an ingress replica."""

    async def find_router() -> str:
        address: str = await cluster.router.address.remote()
        return address

    client = CellClient(find_router, cluster.secret, ingress_id=name, submit_timeout_s=30.0)
    client.start()
    async with asyncio.timeout(_READY_TIMEOUT_S):
        while not client.ready:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return client


async def run_workload(
    client: CellClient, workload: Workload, token_ids: Sequence[list[int]], name: str
) -> DecodeSample:
    """Submit all requests at once and time their tokens."""
    before = await client.state()
    began_s = time.perf_counter()
    arrivals = await asyncio.gather(
        *(
            _time_tokens(client.submit(greedy_request(f"{name}-{i}", prompt, workload.new_tokens)))
            for i, prompt in enumerate(token_ids)
        )
    )
    after = await client.state()
    return DecodeSample(
        step_s=steady_step_s(arrivals) if workload.new_tokens > 1 else None,
        first_token_s=statistics.median(times[0] - began_s for times in arrivals),
        seconds={
            stage: total - before.seconds.get(stage, 0.0) for stage, total in after.seconds.items()
        },
        num_steps=after.num_steps - before.num_steps,
    )


def steady_step_s(arrivals: Sequence[Sequence[float]]) -> float:
    """Median seconds between tokens from the last request's first token to the first one's end.

    Raises:
        BenchmarkError: There are no two tokens in between, or most of them came in bursts: then
            this process was starved and its clock says nothing of steps.
    """
    last = max(arrivals, key=lambda times: times[0])
    first_end_s = min(times[-1] for times in arrivals)
    steady = [time_s for time_s in last if time_s <= first_end_s]
    if len(steady) < 2:
        raise BenchmarkError(
            "a request had ended before all of them decoded; ask for more --new-tokens"
        )
    gaps_s = [later - earlier for earlier, later in pairwise(steady)]
    if statistics.median(gaps_s) < _BURST * statistics.mean(gaps_s):
        raise BenchmarkError("tokens came in bursts; this machine is too busy to measure on")
    return statistics.median(gaps_s)


def greedy_request(name: str, prompt: list[int], new_tokens: int) -> GenerationRequest:
    """A request of so many tokens, whatever they are."""
    return GenerationRequest(
        request_id=name,
        prompt_token_ids=prompt,
        sampling=SamplingParams(),
        stop=StopParams(max_tokens=new_tokens, ignore_eos=True),
    )


async def _time_tokens(events: object) -> list[float]:
    times: list[float] = []
    event: TokenEvent
    async for event in events:  # type: ignore[attr-defined]
        if event.finish_reason is not None and event.finish_reason.value == "error":
            raise RuntimeError(f"{event.error_code}: {event.error_message}")
        times.extend(time.perf_counter() for _ in event.token_ids)
    return times


def ostro_subject(layout: str) -> str:
    """What tables call a layout."""
    return f"ostro {layout}"


def anchor_subject(layout: str) -> str:
    """What tables call transformers in the rounds of a layout."""
    return f"{ANCHOR} beside {layout}"


def measure_engine(
    model: Path,
    layouts: Sequence[LayoutConfig],
    names: Sequence[str],
    workloads: Sequence[Workload],
    *,
    rounds: int,
    dtype: str,
    beside_transformers: bool,
    note: Callable[[str], None],
) -> list[Figure]:
    """Decode and first-token figures of each layout, interleaved with transformers.

    Cells come up one after another (their memory would not fit together); transformers runs
    beside each of them, so every layout has its own ratio.
    """
    figures: list[Figure] = []
    vocab_size = load_model_config(model).vocab_size
    threads = torch.get_num_threads()
    anchor = TransformersEngine(model, dtype, threads) if beside_transformers else None
    for layout, name in zip(layouts, names, strict=True):
        deployment = engine_deployment(layout, model, dtype, workloads)
        with running_cell(deployment, model) as cluster:
            samples = asyncio.run(
                _measure_cell(cluster, workloads, vocab_size, rounds, anchor, note)
            )
        for (subject, workload), taken in samples.items():
            full = ostro_subject(name) if subject == "ostro" else anchor_subject(name)
            figures.extend(_figures(full, workload, taken))
    ray.shutdown()
    return figures


async def _measure_cell(
    cluster: RunningCluster,
    workloads: Sequence[Workload],
    vocab_size: int,
    rounds: int,
    anchor: TransformersEngine | None,
    note: Callable[[str], None],
) -> dict[tuple[str, Workload], list[DecodeSample]]:
    client = await connect_client(cluster, "bench")
    taken: dict[tuple[str, Workload], list[DecodeSample]] = {}
    warm = prompts(workloads[0], vocab_size, -1)
    await run_workload(client, workloads[0], warm, "warm")
    if anchor is not None:
        await asyncio.to_thread(anchor.run, workloads[0], warm)
    for turn in range(rounds):
        for workload in workloads:
            note(f"round {turn + 1} of {rounds}, {workload.label()}")
            token_ids = prompts(workload, vocab_size, turn)
            name = f"r{turn}-{workload.label()}"
            sample = await run_workload(client, workload, token_ids, name)
            taken.setdefault(("ostro", workload), []).append(sample)
            if anchor is not None:
                beside = await asyncio.to_thread(anchor.run, workload, token_ids)
                taken.setdefault((ANCHOR, workload), []).append(beside)
    await client.close()
    return taken


def _figures(subject: str, workload: Workload, taken: Sequence[DecodeSample]) -> Iterator[Figure]:
    label, speeds = workload.label(), tuple(workload.tokens_per_s(sample) for sample in taken)
    first_ms = tuple(sample.first_token_s * 1e3 for sample in taken)
    yield Figure(subject, label, "tok/s", speeds)
    if workload.question is Question.DECODE:
        yield Figure(subject, f"first token B={workload.batch}", "ms", first_ms)
    stages = sorted({stage for sample in taken for stage in sample.seconds})
    for stage in stages:
        per_step = tuple(
            sample.seconds.get(stage, 0.0) / max(sample.num_steps, 1) * 1e3 for sample in taken
        )
        yield Figure(subject, f"stage {stage}, {label}", STAGE_UNIT, per_step)
