"""Decode with and without drafts: the same requests in the same rounds, from cells of one model."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import ray

from ostro.actors.engine.request import FinishReason, GenerationRequest
from ostro.actors.fabric.messages import State
from ostro.cluster.bench_engine import (
    BenchmarkError,
    connect_client,
    engine_deployment,
    greedy_request,
    running_cell,
)
from ostro.cluster.bench_figures import Figure
from ostro.cluster.bench_workload import Workload, prompts
from ostro.cluster.cell_client import CellClient
from ostro.cluster.generation import ChatMessage
from ostro.cluster.model_paths import settle_drafts
from ostro.cluster.prompt import PromptBuilder
from ostro.cluster.running_cluster import RunningCluster
from ostro.configs.deployment import DeploymentConfig, LayoutConfig
from ostro.configs.errors import ConfigError
from ostro.configs.load import load_deployment
from ostro.configs.model import load_model_config
from ostro.configs.reasoning import ReasoningConfig
from ostro.configs.speculation import DraftMethod, SpeculationConfig

NONE = "none"


def parse_speculation(text: str, model: Path) -> SpeculationConfig | None:
    """From "none", "ngram", "auto", "eagle:DIR", or a deployment's `engine.speculation`.

    Args:
        text: It.
        model: Checkpoint directory; `auto` takes the head that it brings.

    Raises:
        ConfigError: It is none of these, or there is no such head.
    """
    if text == NONE:
        return None
    method, _, directory = text.partition(":")
    if method == DraftMethod.EAGLE and directory:
        value = f"{{method: eagle, draft_model: {json.dumps(directory)}}}"
    else:
        value = f"{{method: {text}}}" if text.isalnum() else text
    engine = load_deployment("laptop_single", [f"engine.speculation={value}"]).engine
    settled = settle_drafts(engine, model).speculation
    if settled is None and engine.speculation is not None:
        raise ConfigError(f"{text}: {model} brings no draft head; name one with eagle:DIR")
    return settled


def question_prompts(model: Path, questions: Sequence[str], effort: str) -> list[list[int]]:
    """Token ids of chats of one question each.

    Raises:
        BenchmarkError: There are no questions.
        InvalidRequestError: The model's tokenizer cannot take one.
    """
    if not questions:
        raise BenchmarkError("there are no questions to ask; give some, one a line")
    builder = PromptBuilder(model, ReasoningConfig())
    chats = ([ChatMessage(role="user", text=question)] for question in questions)
    return [builder.chat(messages, (), effort).token_ids for messages in chats]


@dataclass(frozen=True, slots=True)
class DraftSample:
    """One run of a batch.

    Attributes:
        tokens_per_s: While all of its requests decoded.
        tokens_per_step: Output tokens of a request and step.
        share_right: Of the drafts; 0 without any.
        answers: Token ids of each request.
    """

    tokens_per_s: float
    tokens_per_step: float
    share_right: float
    answers: list[list[int]]


@dataclass(frozen=True, slots=True)
class Arrival:
    """Tokens of a request that came at once."""

    time_s: float
    token_ids: list[int]


def steady_tokens_per_s(arrivals: Sequence[Sequence[Arrival]]) -> float:
    """Tokens per second of all requests, from the last one's first to the first one's last.

    Raises:
        BenchmarkError: There is no such time.
    """
    began_s = max(of_request[0].time_s for of_request in arrivals)
    ended_s = min(of_request[-1].time_s for of_request in arrivals)
    num_tokens = sum(
        len(arrival.token_ids)
        for of_request in arrivals
        for arrival in of_request
        if began_s < arrival.time_s <= ended_s
    )
    if num_tokens < 2 * len(arrivals):
        raise BenchmarkError(
            "a request had ended before all of them decoded; ask for more --new-tokens"
        )
    return num_tokens / (ended_s - began_s)


async def run_batch(client: CellClient, requests: Sequence[GenerationRequest]) -> DraftSample:
    """Submit all requests at once and time what comes."""
    before = _draft_counts(await client.state())
    arrivals = await asyncio.gather(*(_arrivals(client, request) for request in requests))
    after = _draft_counts(await client.state())
    num_outputs, num_drafted, num_accepted = (
        later - earlier for earlier, later in zip(before, after, strict=True)
    )
    return DraftSample(
        tokens_per_s=steady_tokens_per_s(arrivals),
        tokens_per_step=num_outputs / max(num_outputs - num_accepted, 1),
        share_right=num_accepted / num_drafted if num_drafted else 0.0,
        answers=[
            [token_id for arrival in of_request for token_id in arrival.token_ids]
            for of_request in arrivals
        ],
    )


def _draft_counts(state: State) -> tuple[int, int, int]:
    loads = state.loads.values()
    return (
        sum(load.num_output_tokens for load in loads),
        sum(sum(load.num_drafted) for load in loads),
        sum(sum(load.num_accepted) for load in loads),
    )


async def _arrivals(client: CellClient, request: GenerationRequest) -> list[Arrival]:
    arrivals = []
    async for event in client.submit(request):
        if event.finish_reason is FinishReason.ERROR:
            raise BenchmarkError(f"{event.error_code}: {event.error_message}")
        if event.token_ids:
            arrivals.append(Arrival(time.perf_counter(), event.token_ids))
    return arrivals


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationBench:
    """What every subject is asked.

    Attributes:
        model: Checkpoint directory.
        layout: Of every cell.
        batches: Requests at once.
        chats: Prompts to take turns with; None makes random ones of `prompt_tokens`.
        prompt_tokens: Of those.
        new_tokens: Of each request.
        rounds: How often.
        dtype: Of the model.
    """

    model: Path
    layout: LayoutConfig
    batches: Sequence[int]
    chats: Sequence[list[int]] | None
    prompt_tokens: int
    new_tokens: int
    rounds: int
    dtype: str

    def workloads(self) -> list[Workload]:
        """By `batches`."""
        longest = self.prompt_tokens if self.chats is None else max(map(len, self.chats))
        return [
            Workload(batch=batch, prompt_tokens=longest, new_tokens=self.new_tokens)
            for batch in self.batches
        ]


def measure_speculation(
    bench: SpeculationBench, subjects: Sequence[str], note: Callable[[str], None]
) -> list[Figure]:
    """Figures of each subject for each batch size.

    Every round starts each cell anew: together they may not fit into memory, and a machine that is
    busy for a while is so for all of them.

    Args:
        bench: What they are asked.
        subjects: As `parse_speculation` takes them; the first is what the others are compared with.
        note: Is told what goes on.
    """
    workloads = bench.workloads()
    deployment = engine_deployment(bench.layout, bench.model, bench.dtype, workloads)
    vocab_size = load_model_config(bench.model).vocab_size
    speculations = [parse_speculation(subject, bench.model) for subject in subjects]
    taken: dict[tuple[str, int], list[DraftSample]] = {}
    for turn in range(bench.rounds):
        requests = [
            list(_requests(workload, turn, bench.chats, vocab_size)) for workload in workloads
        ]
        for subject, speculation in zip(subjects, speculations, strict=True):
            note(f"round {turn + 1} of {bench.rounds}, {subject}")
            engine = replace(deployment.engine, speculation=speculation)
            samples = _run_cell(replace(deployment, engine=engine), bench.model, requests)
            for batch, sample in zip(bench.batches, samples, strict=True):
                taken.setdefault((subject, batch), []).append(sample)
    ray.shutdown()
    return [
        figure
        for (subject, batch), samples in taken.items()
        for figure in _figures(subject, batch, samples, taken[subjects[0], batch])
    ]


def _requests(
    workload: Workload, turn: int, chats: Sequence[list[int]] | None, vocab_size: int
) -> Iterator[GenerationRequest]:
    if chats is None:
        token_ids = prompts(workload, vocab_size, turn)
    else:
        first = turn * workload.batch
        token_ids = [chats[(first + index) % len(chats)] for index in range(workload.batch)]
    for index, prompt in enumerate(token_ids):
        name = f"r{turn}-B{workload.batch}-{index}"
        yield greedy_request(name, prompt, workload.new_tokens)


def _run_cell(
    deployment: DeploymentConfig, model: Path, batches: Sequence[Sequence[GenerationRequest]]
) -> list[DraftSample]:
    async def run(cluster: RunningCluster) -> list[DraftSample]:
        client = await connect_client(cluster, "bench")
        try:
            for requests in batches:  # shapes are compiled, and what pays is learnt
                await run_batch(client, [_renamed(request) for request in requests])
            return [await run_batch(client, requests) for requests in batches]
        finally:
            await client.close()

    with running_cell(deployment, model) as cluster:
        return asyncio.run(run(cluster))


def _renamed(request: GenerationRequest) -> GenerationRequest:
    return msgspec.structs.replace(request, request_id=f"warm-{request.request_id}")


def _figures(
    subject: str, batch: int, samples: Sequence[DraftSample], base: Sequence[DraftSample]
) -> Iterator[Figure]:
    same = [
        100 * statistics.mean(map(list.__eq__, sample.answers, other.answers))
        for sample, other in zip(samples, base, strict=True)
    ]
    values = {
        ("decode", "tok/s"): [sample.tokens_per_s for sample in samples],
        ("tokens a step", ""): [sample.tokens_per_step for sample in samples],
        ("drafts right", "%"): [100 * sample.share_right for sample in samples],
        ("answers as the first", "%"): same,
    }
    for (quantity, unit), of_rounds in values.items():
        yield Figure(subject, f"{quantity} B={batch}", unit, tuple(of_rounds))
