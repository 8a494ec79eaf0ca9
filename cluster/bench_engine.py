"""Engine benchmarks: a real cell without ingress, driven in place of one, beside transformers."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import ray
import torch

from ostro.actors.engine.request import GenerationRequest, SamplingParams, StopParams, TokenEvent
from ostro.actors.model.device import torch_dtype
from ostro.cluster.bench_figures import STAGE_UNIT, Figure
from ostro.cluster.cell_client import CellClient
from ostro.cluster.launch import RunningCluster, launch
from ostro.configs.deployment import DeploymentConfig, EngineConfig, Layout, LayoutConfig
from ostro.configs.errors import ConfigError
from ostro.configs.model import load_model_config

_FIRST_TOKEN_ID = 1000
_READY_TIMEOUT_S = 60.0
_ANCHOR = "transformers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests of one size, all at once.

    Attributes:
        batch: Requests that run together.
        prompt_tokens: Of each.
        new_tokens: Of each; greedy, the end token ignored.
    """

    batch: int
    prompt_tokens: int = 128
    new_tokens: int = 64


@dataclass(frozen=True, slots=True)
class DecodeSample:
    """One run of a workload.

    Attributes:
        step_s: Median seconds between a request's tokens once all requests decode.
        first_token_s: Median seconds to a request's first token.
        seconds: Seconds by stage within the run, over all ranks.
        num_steps: Steps of the run.
    """

    step_s: float
    first_token_s: float
    seconds: dict[str, float]
    num_steps: int


def parse_layout(text: str, *, num_micro_batches: int = 1) -> LayoutConfig:
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
        num_micro_batches=num_micro_batches,
    )


def engine_deployment(layout: LayoutConfig, model: Path, dtype: str) -> DeploymentConfig:
    """A deployment for benchmarks: room for 64 requests of 4,096 tokens, no prefix reuse."""
    engine = EngineConfig(num_pages=16_384, prefix_cache=False, dtype=dtype)
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


def prompts(workload: Workload, vocab_size: int, seed: int) -> list[list[int]]:
    """Seeded random prompts, the same for every subject of a round."""
    draw = random.Random(seed)
    return [
        [draw.randrange(_FIRST_TOKEN_ID, vocab_size) for _ in range(workload.prompt_tokens)]
        for _ in range(workload.batch)
    ]


async def run_workload(
    client: CellClient, workload: Workload, token_ids: Sequence[list[int]], name: str
) -> DecodeSample:
    """Submit all requests at once and time their tokens."""
    before = await client.state()
    began_s = time.perf_counter()
    arrivals = await asyncio.gather(
        *(
            _time_tokens(client.submit(_request(f"{name}-{i}", prompt, workload.new_tokens)))
            for i, prompt in enumerate(token_ids)
        )
    )
    after = await client.state()
    all_decode_s = max(times[0] for times in arrivals)
    steady = [time_s for time_s in arrivals[0] if time_s >= all_decode_s]
    gaps = [later - earlier for earlier, later in pairwise(steady)]
    return DecodeSample(
        step_s=statistics.median(gaps),
        first_token_s=statistics.median(times[0] - began_s for times in arrivals),
        seconds={
            stage: total - before.seconds.get(stage, 0.0) for stage, total in after.seconds.items()
        },
        num_steps=after.num_steps - before.num_steps,
    )


def _request(name: str, prompt: list[int], new_tokens: int) -> GenerationRequest:
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


class TransformersEngine:
    """transformers on the same checkpoint, decoding a batch with its own cache."""

    def __init__(self, model: Path, dtype: str, num_threads: int) -> None:
        from transformers import Mistral4ForCausalLM

        torch.set_num_threads(num_threads)
        self._model = Mistral4ForCausalLM.from_pretrained(
            model, dtype=torch_dtype(dtype), local_files_only=True
        ).eval()
        for layer in self._model.model.layers:
            # The real model does not apply YaRN's mscale; transformers 5.15 and later do.
            layer.self_attn.scaling = layer.self_attn.qk_head_dim**-0.5

    def run(self, workload: Workload, token_ids: Sequence[list[int]]) -> DecodeSample:
        """As `run_workload`, one batch from prefill to the last token."""
        times: list[float] = []
        with torch.inference_mode():
            began_s = time.perf_counter()
            ids, cache = torch.tensor(token_ids), None
            for _ in range(workload.new_tokens):
                out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
                times.append(time.perf_counter())
        gaps = [later - earlier for earlier, later in pairwise(times)]
        return DecodeSample(statistics.median(gaps), times[0] - began_s, {}, workload.new_tokens)


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
        with running_cell(engine_deployment(layout, model, dtype), model) as cluster:
            samples = asyncio.run(
                _measure_cell(cluster, workloads, vocab_size, rounds, anchor, note)
            )
        for (subject, workload), taken in samples.items():
            full = f"ostro {name}" if subject == "ostro" else f"{_ANCHOR} beside {name}"
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
    await run_workload(client, workloads[0], prompts(workloads[0], vocab_size, 1), "warm")
    for turn in range(rounds):
        for workload in workloads:
            note(f"round {turn + 1} of {rounds}, batch {workload.batch}")
            token_ids = prompts(workload, vocab_size, turn)
            name = f"r{turn}-b{workload.batch}"
            sample = await run_workload(client, workload, token_ids, name)
            taken.setdefault(("ostro", workload), []).append(sample)
            if anchor is not None:
                beside = await asyncio.to_thread(anchor.run, workload, token_ids)
                taken.setdefault((_ANCHOR, workload), []).append(beside)
    await client.close()
    return taken


def _figures(subject: str, workload: Workload, taken: Sequence[DecodeSample]) -> Iterator[Figure]:
    batch = workload.batch
    yield Figure(
        subject, f"decode B={batch}", "tok/s", tuple(batch / sample.step_s for sample in taken)
    )
    yield Figure(
        subject,
        f"first token B={batch}",
        "ms",
        tuple(sample.first_token_s * 1e3 for sample in taken),
    )
    stages = sorted({stage for sample in taken for stage in sample.seconds})
    for stage in stages:
        per_step = tuple(
            sample.seconds.get(stage, 0.0) / max(sample.num_steps, 1) * 1e3 for sample in taken
        )
        yield Figure(subject, f"stage {stage} B={batch}", STAGE_UNIT, per_step)
