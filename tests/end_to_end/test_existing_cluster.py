"""`ostro serve` on a Ray cluster of several nodes that somebody else started.

The nodes are processes of this machine with labels and resources of the test's choosing. The tests
build on each other in this order: what runs, what is refused meanwhile, what is left at the end.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import checkpoints
import grpc
import httpx
import pytest
import ray
from certificates import Authority, tls_config
from free_port import free_port
from ray.cluster_utils import Cluster
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from ostro.cluster import launch as launching
from ostro.cluster.launch import launch
from ostro.configs.deployment import Layout, LayoutConfig
from ostro.configs.errors import ConfigError
from ostro.configs.load import load_deployment
from ostro.protos import cluster_pb2, cluster_pb2_grpc

pytestmark = pytest.mark.cluster

START_TIMEOUT_S = 240
OBJECT_STORE_BYTES = 80 * 2**20
ROLE, DOMAIN = "ostro.role", "ray.io/gpu-domain"
ROLE_NAMES = {
    cluster_pb2.ACTOR_ROLE_ATTENTION: "attention",
    cluster_pb2.ACTOR_ROLE_EXPERT: "expert",
}
SPLIT = LayoutConfig(layout=Layout.SPLIT, num_attention_shards=1, num_expert_shards=2)


@pytest.fixture(scope="module")
def cluster():
    """A head without CPUs, a node for attention, a node for experts; this process is connected."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            # A dead node is found sooner; a busy one still has the usual 10 s to answer.
            "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 3},
        },
    )
    try:
        for role in ("attention", "expert"):
            add_node(cluster, {ROLE: role}, num_cpus=2)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, namespace=launching.NAMESPACE, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def add_node(cluster, labels, **resources):
    return cluster.add_node(
        labels=labels, object_store_memory=OBJECT_STORE_BYTES, wait=False, **resources
    )


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    checkpoints.make_tiny_checkpoint(directory, num_layers=2, with_tokenizer=True)
    return directory


class Served:
    """`ostro serve` as a user of the cluster runs it."""

    def __init__(self, address: str, model_dir: Path, log: Path) -> None:
        self.http_port, self.grpc_port, self.log = free_port(), free_port(), log
        self.url = f"http://127.0.0.1:{self.http_port}"
        command = [Path(sys.executable).with_name("ostro"), "serve", "laptop"]
        command += ["--model", model_dir, "--set", "layout.step_timeout_s=20"]
        command += ["--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port)]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"RAY_ADDRESS": address},
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while "curl" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def chat(self) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
        body |= {"max_tokens": 12, "ignore_eos": True}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60)

    def shards(self):
        with grpc.insecure_channel(f"127.0.0.1:{self.grpc_port}") as channel:
            stub = cluster_pb2_grpc.ClusterServiceStub(channel)
            cluster = stub.GetCluster(cluster_pb2.GetClusterRequest(), timeout=30).cluster
        return [actor for actor in cluster.actors if actor.role in ROLE_NAMES]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def served(cluster, model_dir, tmp_path_factory):
    served = Served(cluster.address, model_dir, tmp_path_factory.mktemp("log") / "serve.log")
    try:
        served.wait_ready()
        yield served
        if served.process.poll() is None:
            served.stop()
    finally:
        served.process.kill()


def deployment(model_dir, *overrides):
    ports = (f"serving.http_port={free_port()}", f"serving.grpc_port={free_port()}")
    return load_deployment("laptop", [f"model={model_dir}", *ports, *overrides])


def labels_of_nodes():
    return {node["NodeID"]: node["Labels"] for node in ray.nodes() if node["Alive"]}


def test_shards_run_on_the_nodes_of_their_role(served):
    labels, shards = labels_of_nodes(), served.shards()
    assert len(shards) == 3
    for shard in shards:
        assert labels[shard.node_id][ROLE] == ROLE_NAMES[shard.role]


def test_a_chat_is_answered(served):
    answer = served.chat()
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 12


def test_step_plans_travel_over_tcp_between_nodes(served):
    router = ray.get_actor(launching.ROUTER_NAME, namespace=launching.NAMESPACE)
    address = ray.get(router.address.remote(), timeout=30)
    node = next(node for node in ray.nodes() if node["Labels"].get(ROLE) == "attention")
    assert address.startswith(f"tcp:{node['NodeManagerAddress']}:")


def test_a_second_launch_is_refused_and_does_no_harm(served, model_dir):
    groups = placement_group_table().keys()
    with pytest.raises(ConfigError, match="already runs a cell"):
        launch(deployment(model_dir), model_dir)
    assert placement_group_table().keys() == groups
    assert served.chat().status_code == 200


@pytest.mark.slow
def test_a_lost_node_is_made_up_for_by_the_next_one(cluster, served):
    before = served.chat().json()["choices"][0]["message"]["content"]
    lost = {shard.node_id for shard in served.shards() if ROLE_NAMES[shard.role] == "expert"}
    node = next(node for node in cluster.worker_nodes if node.node_id in lost)
    cluster.remove_node(node, allow_graceful=False)
    add_node(cluster, {ROLE: "expert"}, num_cpus=2)
    deadline = time.monotonic() + 120
    while (answer := served.chat()).status_code != 200:
        assert answer.status_code == 503
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.5)
    assert answer.json()["choices"][0]["message"]["content"] == before
    assert not lost & {shard.node_id for shard in served.shards()}
    test_shards_run_on_the_nodes_of_their_role(served)


def test_the_end_leaves_the_ray_cluster_as_it_was(cluster, served):
    assert served.stop() == 0, served.log.read_text()
    deadline = time.monotonic() + 30
    while ray.util.list_named_actors(all_namespaces=True) or reserved_groups():
        assert time.monotonic() < deadline, placement_group_table()
        time.sleep(0.2)
    assert len(labels_of_nodes()) == len(cluster.list_all_nodes())
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"] == 4


def reserved_groups():
    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


def test_a_certificate_is_read_on_the_head(cluster, tmp_path):
    authority = Authority(tmp_path)
    tls = tls_config(authority.issue("server", "llm.example.com"))
    certificate = launching._read_certificate(tls, is_here=False)
    assert certificate.names == ("llm.example.com",)
    with pytest.raises(ConfigError, match=r"cannot be read.*on the head node, \d"):
        launching._read_certificate(replace(tls, key_file="/no/such.key"), is_here=False)


def test_a_layout_that_is_too_large_is_refused_at_once(cluster, model_dir):
    with pytest.raises(
        ConfigError, match=r"ostro\.role=expert: .* 3 x \(1 CPU\), .* room for 2 on 1"
    ):
        launch(deployment(model_dir, "layout.num_expert_shards=3"), model_dir)
    with pytest.raises(ConfigError, match="room for 0 on 1 with 2 CPU and 0 GPU"):
        launch(deployment(model_dir, "layout.device=cuda"), model_dir)
    assert not reserved_groups()
    assert ray.is_initialized()


def test_a_layout_that_finds_its_nodes_taken_is_refused(cluster, model_dir, monkeypatch):
    monkeypatch.setattr(launching, "_GROUP_TIMEOUT_S", 1.0)
    taken = placement_group([{"CPU": 1}], bundle_label_selector=[{ROLE: "expert"}])
    try:
        assert taken.wait(30)
        with pytest.raises(ConfigError, match="3 CPU are free now"):
            launch(deployment(model_dir), model_dir)
    finally:
        remove_placement_group(taken)
    assert not reserved_groups()


def test_gpu_ranks_share_an_nvlink_domain_with_room_for_both_roles(cluster):
    """Domain "a" has the most GPUs, but for one role only."""
    for role, domain, num_gpus in (("expert", "a", 4), ("attention", "b", 1), ("expert", "b", 2)):
        add_node(cluster, {ROLE: role, DOMAIN: domain}, num_cpus=num_gpus, num_gpus=num_gpus)
    cluster.wait_for_nodes()
    labels = labels_of_nodes()
    group = launching._make_group(SPLIT, "cuda", launching._nodes())
    try:
        table = placement_group_table(group)
        placed = [labels[table["bundles_to_node_id"][rank]] for rank in range(3)]
    finally:
        remove_placement_group(group)
    assert [node[ROLE] for node in placed] == ["attention", "expert", "expert"]
    assert {node[DOMAIN] for node in placed} == {"b"}
    assert table["bundles"][0] == {"CPU": 1.0, "GPU": 1.0}
