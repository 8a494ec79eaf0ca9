"""`ostro serve` with keys and two ingress replicas: who gets in, what they may use, rotation."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import checkpoints
import grpc
import httpx
import openai
import pytest
from served import Served
from wait_for import wait_for

from ostro.protos import cluster_pb2, cluster_pb2_grpc, generation_pb2, generation_pb2_grpc

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NUM_REPLICAS = 2
OSTRO = Path(sys.executable).with_name("ostro")
GREETING = {"messages": [{"role": "user", "content": "mellon"}], "max_tokens": 4, "temperature": 0}


class Keyed(Served):
    """A server with a key file and an audit log."""

    def __init__(self, directory: Path, model_dir: Path) -> None:
        self.key_file, self.audit_file = directory / "keys.yaml", directory / "audit.jsonl"
        self.user, self.other, self.admin = (
            self.add("acme"),
            self.add("other"),
            self.add("ops", "--scope", "admin"),
        )
        settings = (
            f"serving.num_ingress_replicas={NUM_REPLICAS}",
            f"security.key_file={self.key_file}",
            f"security.audit_file={self.audit_file}",
            "serving.body_timeout_s=2",
            "layout.num_expert_shards=1",
        )
        overrides = [part for setting in settings for part in ("--set", setting)]
        super().__init__(directory / "serve.log", "laptop", "--model", str(model_dir), *overrides)

    def keys(self, *arguments: str) -> str:
        command = [OSTRO, "keys", *arguments, "--file", self.key_file]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def add(self, tenant: str, *arguments: str) -> str:
        return self.keys("add", tenant, *arguments)

    def chat(self, key: str, **fields) -> httpx.Response:
        """From a connection of its own, so that replicas take turns."""
        headers = {"authorization": f"Bearer {key}"}
        url = f"{self.url}/v1/chat/completions"
        return httpx.post(url, json={**GREETING, **fields}, headers=headers, timeout=60)

    def refuses_to_tokenize(self, key: str, quota: str) -> bool:
        headers = {"authorization": f"Bearer {key}"}
        url = f"{self.url}/tokenize"
        answer = httpx.post(url, json={"prompt": "mellon"}, headers=headers, timeout=60)
        return answer.status_code == 429 and answer.json()["error"]["param"] == quota

    def statuses(self, key: str, count: int = 4 * NUM_REPLICAS) -> set[int]:
        return {self.chat(key).status_code for _ in range(count)}

    def audited(self) -> list[dict]:
        return [json.loads(line) for line in self.audit_file.read_text().splitlines()]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    model_dir = tmp_path_factory.mktemp("tiny")
    checkpoints.make_tiny_checkpoint(model_dir, num_layers=2, with_tokenizer=True)
    with Keyed(tmp_path_factory.mktemp("keyed"), model_dir) as served:
        yield served


def test_only_who_has_a_key_gets_in_over_http(served):
    assert served.chat("ostro-unknown").status_code == 401
    assert httpx.post(f"{served.url}/v1/completions", json={}).status_code == 401
    assert served.chat(served.user).status_code == 200
    assert httpx.get(f"{served.url}/metrics").status_code == 401
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.user) as client:
        model = client.models.list().data[0].id
        stream = client.chat.completions.create(model=model, stream=True, **GREETING)
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"


def test_a_large_body_of_a_stranger_is_not_waited_for(served):
    url = f"{served.url}/v1/chat/completions"
    assert httpx.post(url, content=bytes(8 * 2**20), timeout=20).status_code == 401


def test_a_body_that_does_not_come_is_given_up(served):
    with socket.create_connection(("127.0.0.1", served.http_port), 20) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-api-key: {served.user}\r\n"
        connection.sendall(head.encode() + b"content-length: 1000\r\n\r\n{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_only_who_has_a_key_gets_in_over_grpc(served):
    user = generation_pb2.Message(
        role=generation_pb2.ROLE_USER, parts=[generation_pb2.Part(text="mellon")]
    )
    request = generation_pb2.StreamChatRequest(
        conversation=generation_pb2.Conversation(messages=[user]),
        options=generation_pb2.GenerationOptions(
            stopping=generation_pb2.StoppingOptions(max_tokens=4)
        ),
    )
    with grpc.insecure_channel(served.grpc_address) as channel:
        chat = generation_pb2_grpc.GenerationServiceStub(channel).StreamChat
        cluster = cluster_pb2_grpc.ClusterServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(chat(request))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.RpcError) as caught:
            cluster.GetCluster(
                cluster_pb2.GetClusterRequest(), metadata=[("x-api-key", served.user)]
            )
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(grpc.RpcError) as caught:
            next(iter(cluster.WatchCluster(cluster_pb2.WatchClusterRequest())))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        messages = list(chat(request, metadata=[("x-api-key", served.user)]))
    assert messages[-1].WhichOneof("event") == "ended"


def test_the_command_line_shows_its_key(served):
    def status(**environment: str) -> subprocess.CompletedProcess:
        command = [OSTRO, "status", "--url", served.grpc_address]
        environment = {**os.environ, **environment}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    refused, seen = status(OSTRO_API_KEY=""), status(OSTRO_API_KEY=served.admin)
    assert refused.returncode == 1
    assert "OSTRO_API_KEY" in refused.stderr
    assert seen.returncode == 0, seen.stderr
    assert "attention-0" in seen.stdout


def test_rotation_reaches_every_replica_without_a_restart(served):
    fresh = served.add("acme", "--note", "fresh")
    wait_for(lambda: served.statuses(fresh) == {200})
    listed = served.keys("list").splitlines()
    (key_id,) = (line.split()[0] for line in listed if line.strip().endswith("fresh"))
    served.keys("remove", key_id)
    wait_for(lambda: served.statuses(fresh) == {401})
    good = served.key_file.read_text()
    served.key_file.write_text("keys: [")
    wait_for(lambda: "the keys stay as they were" in served.log.read_text())
    assert served.statuses(served.user) == {200}
    served.key_file.write_text(good)


def test_a_quota_holds_over_all_replicas_exactly(served):
    key = served.add("small")
    served.keys("limit", "small", "--requests-per-minute", "5")
    wait_for(lambda: served.chat(key).status_code == 429)  # the quota is in force, and used up
    wait_for(lambda: served.refuses_to_tokenize(key, "requests_per_minute"))
    served.keys("limit", "small", "--requests-per-minute", "1000", "--tokens-per-minute", "100000")
    wait_for(lambda: served.statuses(key) == {200})
    served.keys("limit", "small", "--concurrent-requests", "3", "--max-tokens-per-request", "200")
    wait_for(lambda: served.chat(key, max_tokens=201).status_code == 400)
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(served.chat, key, max_tokens=200, ignore_eos=True) for _ in range(16)]
        answers = [answer.result() for answer in asked]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(answer.json()["error"]["param"] == "concurrent_requests" for answer in refused)
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)


def test_tenants_do_not_find_each_others_prompts_in_the_cache(served):
    prompt = [{"role": "user", "content": "the same long prompt " * 20}]

    def cached_tokens(key: str) -> int:
        usage = served.chat(key, messages=prompt).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    first = cached_tokens(served.user)  # the page that begins every prompt
    assert cached_tokens(served.user) > first
    assert cached_tokens(served.other) == 0


@pytest.mark.parametrize("steering", ["user", "admin"])
def test_a_generation_is_steered_by_its_own_tenant_or_an_admin_alone(served, steering):
    name, num_tokens = f"long-{steering}", 1500

    def control(key: str, action: str) -> bool:
        answer = httpx.post(
            f"{served.url}/v1/chat/completions/control",
            json={"id": name, "action": action},
            headers={"x-api-key": key},
        )
        return answer.json()["applied"]

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            served.chat, served.user, request_id=name, max_tokens=num_tokens, ignore_eos=True
        )
        wait_for(lambda: control(served.user, "reasoning_end"))  # now it runs
        assert not control(served.other, "cancel")
        assert control(getattr(served, steering), "cancel")
        assert running.result().json()["usage"]["completion_tokens"] < num_tokens


def test_every_call_has_a_line_in_the_audit_log(served):
    served.chat(served.user)
    lines = served.audited()
    text = served.audit_file.read_text()
    assert {"POST /v1/chat/completions", "grpc StreamChat"} <= {line["route"] for line in lines}
    assert {line["tenant"] for line in lines} >= {"", "acme", "ops", "small"}
    ended = [line for line in lines if line["finish_reason"] == "length"]
    assert all(line["completion_tokens"] and line["prompt_tokens"] for line in ended)
    assert {401, 200, "OK", "UNAUTHENTICATED", "PERMISSION_DENIED"} <= {
        line["status"] for line in lines
    }
    assert "mellon" not in text
    assert not any(key in text for key in (served.user, served.admin, "ostro-unknown"))
    assert served.user not in served.log.read_text()
