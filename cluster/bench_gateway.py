"""What ingress and router cost: a whole deployment whose shard says canned tokens at a set pace.

Three questions, each put to the bare engine, HTTP and gRPC in turns:

    first token  what a face adds to it while so many streams run at the pace
    throughput   tokens per second through one ingress from an engine that does not wait
    stalls       how much longer than the pace a stream's tokens are apart, at worst

The bare engine is called through the ingress's own client of the cell, so the difference is
ingress and proxy alone.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import ray

from ostro.actors.errors import OstroError
from ostro.cluster.bench_canned_shard import CannedShard
from ostro.cluster.bench_face_calls import Face
from ostro.cluster.bench_faces import find_cell
from ostro.cluster.bench_figures import Figure
from ostro.cluster.bench_gateway_client import ClientProcesses, Work, client_processes
from ostro.cluster.bench_progress import Progress
from ostro.cluster.bench_statistics import LoadRun, Outcome, percentile
from ostro.cluster.launch import NAMESPACE, ActorKind, launch
from ostro.cluster.prompt import PromptBuilder
from ostro.configs.deployment import DeploymentConfig
from ostro.configs.model import load_model_config

_TEXT = (
    "The ferry left the harbour a little after six, while the light was still low over the water. "
    "Nobody on deck spoke much; they watched the gulls, and the town growing small behind them. "
)
_FIRST_TEXT_ID = 64  # smaller ones are control tokens in every tokenizer that we write
_REQUESTS_PER_PLACE = 4
_FEWEST_REQUESTS = 16
_CALL_TIMEOUT_S = 30.0
_SHARD = "ostro-attention-0"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayPlan:
    """What the benchmark does.

    Attributes:
        concurrencies: Streams at a time while the first token is measured.
        streams: Streams at a time for throughput and stalls.
        pace_s: That a step's forward pass takes, which computes nothing.
        prompt_tokens: Of each request.
        new_tokens: Of each request while the first token is measured.
        stream_tokens: Of each request for throughput and stalls.
        rounds: How often; figures are medians over rounds.
        num_clients: Processes that call.
    """

    concurrencies: tuple[int, ...]
    streams: int
    pace_s: float
    prompt_tokens: int
    new_tokens: int
    stream_tokens: int
    rounds: int
    num_clients: int

    def total_runs(self) -> int:
        """Runs of all rounds and of the one that warms up."""
        return (self.rounds + 1) * len(Face) * (len(self.concurrencies) + 2)


@dataclass(frozen=True, slots=True)
class Stalls:
    """Worst gap of each stream beyond the pace, while all streams run."""

    p50_s: float
    p99_s: float
    max_s: float


def measure_gateway(
    deployment: DeploymentConfig, model: Path, plan: GatewayPlan, progress: Progress
) -> list[Figure]:
    """All figures of one deployment, which is brought up and ended here.

    Raises:
        OstroError: A request failed; nothing here may.
    """
    progress.note("starting")
    prompts = PromptBuilder(model, deployment.reasoning, deployment.serving)
    canned = ActorKind(CannedShard, (tuple(prompts.text(_TEXT, add_bos=False)), plan.pace_s))
    cluster = launch(deployment, model, attention=canned)
    try:
        cell = find_cell(cluster, model)
        with client_processes(cell, plan.num_clients) as clients:
            bench = _Bench(clients, plan, load_model_config(model).vocab_size, progress)
            for turn in range(plan.rounds + 1):
                bench.take_round(turn)
    finally:
        cluster.stop()
    return bench.figures()


def worst_stalls(outcomes: Sequence[Outcome], pace_s: float) -> Stalls | None:
    """Over streams, each one's worst; None if they never all ran at the same time.

    Gaps count from the moment at which every stream has its first token until the first one ends.
    """
    began_s = max(outcome.arrivals_s[0] for outcome in outcomes)
    ended_s = min(outcome.arrivals_s[-1] for outcome in outcomes)
    worst_s = []
    for outcome in outcomes:
        steady = [time_s for time_s in outcome.arrivals_s if began_s <= time_s <= ended_s]
        gaps_s = [later - earlier for earlier, later in pairwise(steady)]
        if not gaps_s:
            return None
        worst_s.append(max(max(gaps_s) - pace_s, 0.0))
    return Stalls(statistics.median(worst_s), percentile(worst_s, 99), max(worst_s))


class _Bench:
    """The runs so far; figures are made of all rounds but the first, which warms up."""

    def __init__(
        self, clients: ClientProcesses, plan: GatewayPlan, vocab_size: int, progress: Progress
    ) -> None:
        self._clients = clients
        self._plan = plan
        self._vocab_size = vocab_size
        self._progress = progress
        self._samples: dict[tuple[str, str, str], list[float]] = {}

    def take_round(self, turn: int) -> None:
        """Every question to every face."""
        plan = self._plan
        _set_pace(plan.pace_s)
        for concurrency in plan.concurrencies:
            self._first_token(turn, concurrency)
        for face in Face:
            runs = self._run(face, turn, plan.streams, plan.streams, plan.stream_tokens)
            stalls = worst_stalls(_outcomes(runs), plan.pace_s)
            if stalls is not None:
                label = f"streams={plan.streams}"
                self._note(turn, face, f"stall p50 {label}", "ms", stalls.p50_s * 1e3)
                self._note(turn, face, f"stall p99 {label}", "ms", stalls.p99_s * 1e3)
                self._note(turn, face, f"stall max {label}", "ms", stalls.max_s * 1e3)
            self._note_cpu(turn, face, f"at pace streams={plan.streams}", runs)
        _set_pace(0.0)
        for face in Face:
            runs = self._run(face, turn, plan.streams, plan.streams, plan.stream_tokens)
            self._note(turn, face, f"streamed streams={plan.streams}", "tok/s", _tokens_per_s(runs))
            self._note_cpu(turn, face, f"streamed streams={plan.streams}", runs)

    def figures(self) -> list[Figure]:
        """One for each face and quantity."""
        return [
            Figure(face, quantity, unit, tuple(values))
            for (face, quantity, unit), values in self._samples.items()
        ]

    def _first_token(self, turn: int, concurrency: int) -> None:
        plan, label = self._plan, f"c={concurrency}"
        num_requests = max(_REQUESTS_PER_PLACE * concurrency, _FEWEST_REQUESTS)
        medians_ms = {}
        for face in Face:
            runs = self._run(
                face, turn, concurrency, num_requests, plan.new_tokens, pause_s=2 * plan.pace_s
            )
            ttft_s = [outcome.ttft_s() for outcome in _outcomes(runs)]
            medians_ms[face] = statistics.median(ttft_s) * 1e3
            self._note(turn, face, f"first token {label}", "ms", medians_ms[face])
        for face in (Face.HTTP, Face.GRPC):
            added_ms = medians_ms[face] - medians_ms[Face.ENGINE]
            self._note(turn, face, f"added to first token {label}", "ms", added_ms)

    def _run(
        self,
        face: Face,
        turn: int,
        concurrency: int,
        num_requests: int,
        new_tokens: int,
        pause_s: float = 0.0,
    ) -> list[LoadRun]:
        self._progress.note(f"round {turn} of {self._plan.rounds}, {face}, {concurrency} streams")
        draw = random.Random(f"{turn}/{concurrency}/{new_tokens}")
        ids, size = range(_FIRST_TEXT_ID, self._vocab_size), self._plan.prompt_tokens
        work = Work(
            face=face,
            prompts=tuple(draw.choices(ids, k=size) for _ in range(num_requests)),
            concurrency=concurrency,
            new_tokens=new_tokens,
            pause_s=pause_s,
            seed=f"{face.name}-{turn}-{concurrency}-{new_tokens}",
        )
        runs = self._clients.run(work)
        self._progress.advance()
        for failure in (failure for run in runs for failure in run.failures()):
            raise OstroError(f"a request over {face} failed with {failure.kind}: {failure.detail}")
        return runs

    def _note_cpu(self, turn: int, face: Face, label: str, runs: Sequence[LoadRun]) -> None:
        busiest = max(run.cpu_share() for run in runs)
        self._note(turn, face, f"busiest client {label}", "% of a core", busiest * 100)

    def _note(self, turn: int, face: Face, quantity: str, unit: str, value: float) -> None:
        if turn:
            self._samples.setdefault((face.value, quantity, unit), []).append(value)


def _outcomes(runs: Sequence[LoadRun]) -> list[Outcome]:
    return [outcome for run in runs for outcome in run.outcomes]


def _tokens_per_s(runs: Sequence[LoadRun]) -> float:
    """Tokens of all clients over the time from the first request to the last token."""
    outcomes = _outcomes(runs)
    began_s = min(outcome.due_s for outcome in outcomes)
    ended_s = max(outcome.arrivals_s[-1] for outcome in outcomes)
    return sum(outcome.num_output_tokens for outcome in outcomes) / (ended_s - began_s)


def _set_pace(pace_s: float) -> None:
    shard = ray.get_actor(_SHARD, namespace=NAMESPACE)
    ray.get(shard.set_pace.remote(pace_s), timeout=_CALL_TIMEOUT_S)
