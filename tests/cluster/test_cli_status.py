"""`ostro status` against a grpc.aio server of the test."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from certificates import Authority
from grpc_thread import serve_in_thread
from typer.testing import CliRunner

from ostro.cluster.cli import app
from ostro.cluster.cli_status import heat_strip, load_lines, sum_by_shard
from ostro.protos import cluster_pb2, cluster_pb2_grpc

ACTORS = [
    cluster_pb2.Actor(
        id="ostro-expert-1",
        role=cluster_pb2.ACTOR_ROLE_EXPERT,
        state=cluster_pb2.ACTOR_STATE_LOADING,
        load_progress=0.5,
        rank=1,
        node_id="0123456789abcdef",
        memory_used_bytes=2**30,
        memory_total_bytes=2**32,
    ),
    cluster_pb2.Actor(
        id="ostro-attention-0",
        role=cluster_pb2.ACTOR_ROLE_ATTENTION,
        state=cluster_pb2.ACTOR_STATE_READY,
        rank=0,
        node_id="0123456789abcdef",
        device="cuda:0",
    ),
]
LOAD = cluster_pb2.Load(
    running=3, waiting=1, kv_usage=0.25, prefix_hit_rate=0.5, tokens_per_second=12.5
)


def placement(layer: int, expert: int, tokens: int, *actors: str) -> cluster_pb2.ExpertPlacement:
    return cluster_pb2.ExpertPlacement(
        layer=layer, expert=expert, tokens=tokens, actor_ids=list(actors)
    )


class FakeCluster(cluster_pb2_grpc.ClusterServiceServicer):
    """One fixed picture of a cluster."""

    url: str

    def __init__(self) -> None:
        self.tells_experts = True

    async def GetModel(self, request, context):  # noqa: N802
        return cluster_pb2.GetModelResponse(
            id="small", layers=36, experts=128, experts_per_token=4, max_context=4096
        )

    async def GetCluster(self, request, context):  # noqa: N802
        cluster = cluster_pb2.Cluster(actors=ACTORS, load=LOAD, ready=True, epoch=7)
        return cluster_pb2.GetClusterResponse(cluster=cluster)

    async def GetExperts(self, request, context):  # noqa: N802
        if not self.tells_experts:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not here")
        placements = [placement(0, 0, 30, "a"), placement(1, 0, 10, "a"), placement(0, 1, 0, "b")]
        return cluster_pb2.GetExpertsResponse(placements=placements)


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    fake = FakeCluster()
    with serve_in_thread(
        lambda server: cluster_pb2_grpc.add_ClusterServiceServicer_to_server(fake, server)
    ) as fake.url:
        yield fake


def status(cluster: FakeCluster, *options: str):
    return CliRunner().invoke(app, ["status", "--url", cluster.url, *options])


def line_of(text: str, word: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if word in line)


def test_status_shows_model_readiness_and_epoch(cluster):
    result = status(cluster)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].startswith("small  ready  epoch 7  36 layers, 4 of 128")


def test_status_shows_every_actor_in_the_order_of_ranks(cluster):
    output = status(cluster).stdout
    assert output.index("ostro-attention-0") < output.index("ostro-expert-1")
    row = line_of(output, "ostro-expert-1")
    assert row[:7] == ["ostro-expert-1", "expert", "1", "loading", "50%", "01234567", "cpu"]
    assert row[-5:] == ["1", "GiB", "of", "4", "GiB"]
    assert "cuda:0" in line_of(output, "ostro-attention-0")


def test_status_shows_every_cell_of_the_table_in_a_terminal_of_80_columns(cluster, monkeypatch):
    for name, value in {"TTY_COMPATIBLE": "1", "COLUMNS": "80", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    output = re.sub(r"\x1b\[[0-9;]*m", "", status(cluster).stdout)
    assert max(len(line) for line in output.splitlines()) <= 80
    row = line_of(output, "ostro-expert-1")
    assert row[:7] == ["ostro-expert-1", "expert", "1", "loading", "50%", "01234567", "cpu"]
    assert row[-5:] == ["1", "GiB", "of", "4", "GiB"]


def test_status_shows_load(cluster):
    row = " ".join(line_of(status(cluster).stdout, "running"))
    assert "3 running, 1 waiting KV pages 25% used prefix hits 50% 12.5 tokens/s" in row


def test_status_tells_of_drafts_where_there_are_any():
    load = cluster_pb2.Load(draft_acceptance=0.614, tokens_per_step=2.84)
    assert load_lines(load)[1].plain == "drafts   61% right, 2.84 tokens a step"
    load = cluster_pb2.Load(draft_acceptance=0.0, tokens_per_step=1.0)
    assert load_lines(load)[1].plain == "drafts   0% right, 1.00 tokens a step"
    assert len(load_lines(cluster_pb2.Load(tokens_per_step=1.0))) == 1


def test_status_shows_a_heat_strip_for_each_shard(cluster):
    output = status(cluster).stdout
    assert "  a  \u2588  100%" in output
    assert "  b  \u00b7  0%" in output


def test_status_does_without_experts_where_the_cluster_does_not_tell(cluster):
    cluster.tells_experts = False
    result = status(cluster)
    assert result.exit_code == 0
    assert "experts  " not in result.stdout


def test_status_json_is_one_object_named_as_in_the_protos(cluster):
    picture = json.loads(status(cluster, "--json").stdout)
    assert picture["model"]["experts_per_token"] == 4
    assert picture["cluster"]["epoch"] == "7"
    assert picture["cluster"]["actors"][0]["state"] == "ACTOR_STATE_LOADING"
    assert picture["expert_tokens"] == {"a": {"0": 40.0}, "b": {"1": 0.0}}


def test_status_tells_of_a_certificate_that_expires_soon(tmp_path):
    authority = Authority(tmp_path)

    def seen(days: float, *options: str) -> str:
        pair = authority.issue("server", "localhost", days=days)
        credentials = grpc.ssl_server_credentials([(pair.key.read_bytes(), pair.cert.read_bytes())])
        fake = FakeCluster()
        with serve_in_thread(
            lambda server: cluster_pb2_grpc.add_ClusterServiceServicer_to_server(fake, server),
            credentials=credentials,
        ) as address:
            fake.url = address.replace("127.0.0.1", "localhost")
            result = status(fake, "--ca", str(authority.ca), *options)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    assert "TLS      the certificate expires in 2 days, on 20" in seen(2.5)
    assert "expires" not in seen(20)
    told = json.loads(seen(2.5, "--json"))["certificate_expires"]
    left = datetime.fromisoformat(told) - datetime.now(UTC)
    assert timedelta(days=2) < left < timedelta(days=3)


def test_status_of_clear_text_tells_of_no_certificate(cluster):
    assert json.loads(status(cluster, "--json").stdout)["certificate_expires"] is None


def test_status_says_in_one_line_that_nothing_answers(free_port):
    result = CliRunner().invoke(app, ["status", "--url", f"127.0.0.1:{free_port()}"])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "start a cluster with `ostro serve`" in result.stderr
    assert result.stderr.count("\n") == 1


def test_sum_by_shard_shares_a_tokens_between_copies():
    placements = [placement(0, 5, 10, "a", "b"), placement(1, 5, 4, "b")]
    assert sum_by_shard(placements) == {"a": {5: 5.0}, "b": {5: 9.0}}


def test_heat_strip_grows_with_load():
    strip = heat_strip([0, 1, 50, 100], highest=100, width=10)
    assert strip.plain == "\u00b7\u2581\u2585\u2588"


def test_heat_strip_joins_neighbours_to_fit_the_width():
    assert len(heat_strip([1.0] * 100, highest=1.0, width=30).plain) <= 30
