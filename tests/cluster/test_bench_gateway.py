"""The gateway's benchmark: stalls, shares of work, the canned shard's parts, calls of the faces."""

import asyncio
import json
from types import SimpleNamespace

import checkpoints
import grpc
import pytest
from typer.testing import CliRunner

from ostro.actors.engine.request import FinishReason, TokenEvent
from ostro.actors.errors import OverloadedError
from ostro.actors.fabric.placement import initial_placement
from ostro.actors.rank import EpochSpec, RankSpec
from ostro.cluster import placed_shard
from ostro.cluster.bench import app
from ostro.cluster.bench_canned_shard import CannedSampler, CannedShard, PacedDecoder
from ostro.cluster.bench_face_calls import Face, call_engine, call_grpc
from ostro.cluster.bench_gateway import worst_stalls
from ostro.cluster.bench_gateway_client import Work
from ostro.cluster.bench_statistics import Outcome
from ostro.configs.load import load_deployment
from ostro.configs.model import load_model_config
from ostro.protos import generation_pb2 as pb


def stream(*arrivals_s):
    return Outcome(due_s=0.0, ended_s=arrivals_s[-1], arrivals_s=arrivals_s, num_output_tokens=4)


# ---- stalls


def test_stalls_are_each_streams_worst_beyond_the_pace():
    stalls = worst_stalls([stream(1, 2, 3, 4, 5), stream(1, 2, 4, 5), stream(1, 2, 5)], 1.0)
    assert (stalls.p50_s, stalls.p99_s, stalls.max_s) == (1.0, 2.0, 2.0)


def test_stalls_count_only_while_all_streams_run():
    early, late = stream(0, 9, 10, 11, 12), stream(9, 10, 11, 12, 40)
    assert worst_stalls([early, late], 1.0).max_s == 0.0


def test_streams_that_never_run_together_have_no_stalls():
    assert worst_stalls([stream(1, 2, 3), stream(4, 5, 6)], 1.0) is None


# ---- shares


def work(num_prompts=10, concurrency=5):
    return Work(
        face=Face.HTTP,
        prompts=tuple([n] for n in range(num_prompts)),
        concurrency=concurrency,
        new_tokens=1,
        pause_s=0.0,
        seed="s",
    )


@pytest.mark.parametrize("num_parts", [1, 2, 3, 5])
def test_clients_share_prompts_and_streams_out(num_parts):
    parts = [work().part(index, num_parts) for index in range(num_parts)]
    assert sorted(prompt for part in parts for prompt in part.prompts) == [[n] for n in range(10)]
    assert sum(part.concurrency for part in parts) == 5
    assert len({part.seed for part in parts}) == num_parts


# ---- the canned shard


def test_canned_sampler_says_its_tokens_in_order_over_and_over():
    sampler = CannedSampler([7, 8, 9])
    rows = [
        SimpleNamespace(progress=SimpleNamespace(output_token_ids=[0] * length))
        for length in (0, 1, 2, 3)
    ]
    assert [token.token_id for token in sampler.sample([], rows)] == [7, 8, 9, 7]


def test_paced_decoder_makes_no_logits():
    assert PacedDecoder(0.0).forward([], None) == []


def test_canned_shard_has_all_that_an_epoch_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(placed_shard, "_node_id", lambda: "n")
    checkpoints.make_tiny_checkpoint(tmp_path, num_layers=1, with_tokenizer=True)
    config = load_model_config(tmp_path)
    shard = CannedShard("canned", str(tmp_path), (7, 8), 0.0)
    spec = RankSpec(
        rank=0,
        model_dir=str(tmp_path),
        deployment=load_deployment("laptop_single", ["engine.num_pages=8"]),
        placement=initial_placement(config.num_experts, [0]),
        device="cpu",
        dtype="float32",
    )
    epoch = EpochSpec(epoch=0, store_host="", store_port=0, router_address="", secret=b"secret")
    shard._load(spec, config)
    try:
        engine, _ = shard._make_engine(spec, epoch, SimpleNamespace())
        assert engine.num_steps == 0
    finally:
        shard._epoch_ended()


# ---- calls


class ScriptedCell:
    """A cell client whose answer is known; an exception in it is raised."""

    def __init__(self, *answer):
        self.answer, self.request = answer, None

    async def submit(self, request):
        self.request = request
        for item in self.answer:
            if isinstance(item, Exception):
                raise item
            yield item


class ScriptedStub:
    """A gRPC stub whose stream is known; an exception in it is raised."""

    def __init__(self, *answer):
        self.cell = ScriptedCell(*answer)

    def StreamGenerate(self, request, *, timeout):  # noqa: N802  gRPC's name
        assert timeout > 0
        return self.cell.submit(request)


def through_engine(*answer):
    return asyncio.run(call_engine(ScriptedCell(*answer), [1], 3, "n", 0.0))


def through_grpc(*answer):
    return asyncio.run(call_grpc(ScriptedStub(*answer), [1], 3, 0.0))


def message(**event):
    return pb.StreamGenerateResponse(**event)


def test_engine_call_notes_an_arrival_for_each_event_with_tokens():
    outcome = through_engine(
        TokenEvent("n", 0, [5]), TokenEvent("n", 1, [6, 7], finish_reason=FinishReason.LENGTH)
    )
    assert outcome.failure is None
    assert (len(outcome.arrivals_s), outcome.num_output_tokens) == (2, 3)


def test_engine_call_tells_errors():
    ended = TokenEvent("n", 0, [], finish_reason=FinishReason.ERROR, error_code="lost")
    assert through_engine(ended).failure.kind == "lost"
    refused = through_engine(OverloadedError("too much waits"))
    assert refused.failure.detail == "too much waits"
    assert through_engine().failure.kind == "empty answer"


def test_grpc_call_counts_tokens_by_usage():
    outcome = through_grpc(
        message(started=pb.Started()),
        message(delta=pb.Delta(text="a")),
        message(delta=pb.Delta(text="bc")),
        message(finish=pb.Finish()),
        message(ended=pb.Ended(usage=pb.Usage(completion_tokens=3))),
    )
    assert outcome.failure is None
    assert (len(outcome.arrivals_s), outcome.num_output_tokens) == (2, 3)


def test_grpc_call_tells_errors():
    failed = through_grpc(message(failure=pb.Failure(reason="EXPERT_LOST", message="gone")))
    assert (failed.failure.kind, failed.failure.detail) == ("EXPERT_LOST", "gone")
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), details="down"
    )
    refused = through_grpc(error)
    assert (refused.failure.kind, refused.failure.detail) == ("gRPC UNAVAILABLE", "down")


# ---- all of it


@pytest.mark.slow
@pytest.mark.cluster
def test_gateway_is_measured_from_end_to_end(tmp_path):
    told = tmp_path / "told.json"
    arguments = "gateway --concurrency 2 --streams 4 --stream-tokens 8 --rounds 1 --pace 5".split()
    result = CliRunner().invoke(app, [*arguments, "--json", str(told)])
    assert result.exit_code == 0, result.output
    body = json.loads(told.read_text())
    found = {(row["subject"], row["quantity"]) for row in body["figures"]}
    for face in Face:
        assert (face.value, "first token c=2") in found
        assert (face.value, "stall max streams=4") in found
        assert (face.value, "streamed streams=4") in found
    assert ("gRPC", "added to first token c=2") in found
