"""`ostro serve` over TLS, with certificates of clients, talked to by real clients."""

import ipaddress
import json
import signal
import socket
import ssl
import time

import grpc
import httpx
import openai
import pytest
from certificates import Authority
from listeners import listening, own_address
from served import Served
from typer.testing import CliRunner
from wait_for import wait_for

from ostro.cluster.cli import app
from ostro.protos import cluster_pb2, cluster_pb2_grpc, generation_pb2, generation_pb2_grpc

pytestmark = pytest.mark.cluster

WAIT_S = 60
MODEL = "ostro-teaching-7m"
NORWAY = [{"role": "user", "content": "What is the capital of Norway?"}]


class Secured:
    """A served cluster and the certificates of both sides."""

    def __init__(self, folder):
        self.authority, self.clients = Authority(folder / "ca"), Authority(folder / "clients")
        hosts = ["localhost", "127.0.0.1", *filter(None, [own_address()])]
        self.server = self.authority.issue("server", *hosts)
        self.alice = self.clients.issue("alice", common_name="alice")
        settings = {
            "host": "0.0.0.0",
            "tls.cert_file": self.server.cert,
            "tls.key_file": self.server.key,
            "tls.client_ca_file": self.clients.ca,
        }
        overrides = [f"--set=serving.{name}={value}" for name, value in settings.items()]
        self.served = Served(folder / "serve.log", *overrides, trust=self.trust())

    def trust(self, client=None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.authority.ca)
        if client is not None:
            context.load_cert_chain(client.cert, client.key)
        return context

    def channel(self, client=None) -> grpc.Channel:
        key, cert = (client.key.read_bytes(), client.cert.read_bytes()) if client else (None, None)
        ca = self.authority.ca.read_bytes()
        return grpc.secure_channel(
            self.served.grpc_address, grpc.ssl_channel_credentials(ca, key, cert)
        )

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.served.url, verify=self.trust(self.alice), timeout=WAIT_S)

    def options(self) -> list[str]:
        """Of the commands that call it."""
        files = {"--ca": self.authority.ca, "--cert": self.alice.cert, "--key": self.alice.key}
        return [str(part) for option in files.items() for part in option]


@pytest.fixture(scope="module")
def secured(tmp_path_factory):
    secured = Secured(tmp_path_factory.mktemp("tls"))
    with secured.served:
        yield secured


@pytest.fixture
def channel(secured):
    with secured.channel(secured.alice) as channel:
        yield channel


def long_request(request_id: str) -> generation_pb2.StreamChatRequest:
    part = generation_pb2.Part(text="Count.")
    message = generation_pb2.Message(role=generation_pb2.ROLE_USER, parts=[part])
    stopping = generation_pb2.StoppingOptions(max_tokens=3000, ignore_eos=True)
    return generation_pb2.StreamChatRequest(
        conversation=generation_pb2.Conversation(messages=[message]),
        options=generation_pb2.GenerationOptions(stopping=stopping),
        request_id=request_id,
    )


def num_running(channel) -> int:
    stub = cluster_pb2_grpc.ClusterServiceStub(channel)
    request = cluster_pb2.GetClusterRequest()
    return stub.GetCluster(request, timeout=WAIT_S).cluster.load.running


def wait_idle(channel) -> None:
    wait_for(lambda: not num_running(channel))


def test_openai_client_streams_over_https(secured):
    with openai.OpenAI(
        base_url=f"{secured.served.url}/v1",
        api_key="none",
        http_client=openai.DefaultHttpxClient(verify=secured.trust(secured.alice)),
    ) as client:
        chunks = list(
            client.chat.completions.create(model=MODEL, messages=NORWAY, stream=True, temperature=0)
        )
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text.startswith("Oslo")


def test_grpc_streams_over_a_secure_channel(channel):
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    request = long_request("secure")
    request.options.stopping.max_tokens = 20
    events = [event.WhichOneof("event") for event in stub.StreamChat(request, timeout=WAIT_S)]
    assert events[0] == "started"
    assert "delta" in events
    assert events[-1] == "ended"


def test_clients_without_a_certificate_and_clear_text_are_refused(secured):
    served = secured.served
    answer = httpx.get(f"{served.url}/v1/models", verify=secured.trust(), timeout=WAIT_S)
    assert answer.status_code == 401
    assert "client certificate" in answer.json()["error"]["message"]
    with secured.channel() as channel, pytest.raises(grpc.RpcError) as refused:
        num_running(channel)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{served.http_port}/ready", timeout=WAIT_S)
    with grpc.insecure_channel(served.grpc_address) as channel, pytest.raises(grpc.RpcError):
        num_running(channel)


def test_the_faces_alone_listen_on_an_address_that_others_can_call(secured):
    served = secured.served
    found = listening(served.children())
    inner = {(host, port) for host, port in found if ipaddress.ip_address(host).is_loopback}
    assert found - inner == {("0.0.0.0", served.http_port), ("0.0.0.0", served.grpc_port)}
    assert len(inner) > 10  # Ray's, Serve's and the shards'
    if (address := own_address()) is None:
        return
    for _, port in inner:
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((address, port), 5).close()
    trust = secured.trust(secured.alice)
    models = httpx.get(f"https://{address}:{served.http_port}/v1/models", verify=trust)
    assert models.json()["data"][0]["id"] == MODEL


def test_it_says_how_to_call_it_and_the_commands_do(secured):
    text = secured.served.wait_announced()
    assert f"https://127.0.0.1:{secured.served.http_port}/v1\n" in text
    assert f"curl --cacert {secured.server.cert} --cert CLIENT.pem --key CLIENT.key https:" in text
    assert (
        f"ostro chat --url https://{secured.served.grpc_address} --ca {secured.server.cert}" in text
    )
    url = ["--url", f"https://{secured.served.grpc_address}"]
    status = CliRunner().invoke(app, ["status", "--json", *url, *secured.options()])
    assert json.loads(status.stdout)["model"]["id"] == MODEL
    question = ["chat", NORWAY[0]["content"], *url, *secured.options()]
    assert CliRunner().invoke(app, question).stdout.startswith("Oslo")


@pytest.mark.slow
def test_leaving_a_stream_ends_the_generation(secured, channel):
    body = {"messages": NORWAY, "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with (
        secured.http() as client,
        client.stream("POST", "/v1/chat/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()
        while "content" not in next(lines):
            pass
        assert num_running(channel)
    wait_idle(channel)


@pytest.mark.slow
def test_leaving_before_the_answer_ends_the_generation(secured, channel):
    body = {"messages": NORWAY, "max_tokens": 3000, "ignore_eos": True}
    with secured.http() as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json=body, timeout=0.5)
    wait_idle(channel)


@pytest.mark.slow
def test_cancelling_a_call_ends_the_generation(channel):
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    stream = stub.StreamChat(long_request("leaving"), timeout=WAIT_S)
    assert next(stream).WhichOneof("event") == "started"
    assert num_running(channel)
    stream.cancel()
    wait_idle(channel)


@pytest.mark.slow
def test_large_bodies_pass(secured):
    messages = [{"role": "user", "content": "x" * 20_000_000}]
    with secured.http() as client:
        answer = client.post("/v1/chat/completions", json={"messages": messages})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.slow
def test_a_renewed_certificate_is_shown_while_a_stream_goes_on(secured, channel):
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    where = ("127.0.0.1", secured.served.http_port)
    before = ssl.get_server_certificate(where)
    stream = stub.StreamChat(long_request("through"), timeout=2 * WAIT_S)
    assert next(stream).WhichOneof("event") == "started"
    secured.authority.issue("server", "localhost", "127.0.0.1")
    deadline = time.monotonic() + WAIT_S
    while ssl.get_server_certificate(where) == before:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert [event.WhichOneof("event") for event in stream][-1] == "ended"


@pytest.mark.slow
def test_a_batch_and_a_bench_of_the_http_face_trust_the_authority(secured, tmp_path):
    questions, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    line = {"custom_id": "1", "url": "/v1/chat/completions", "body": {"messages": NORWAY}}
    questions.write_text(json.dumps(line))
    command = ["run-batch", str(questions), str(answers), "--url", secured.served.url]
    done = CliRunner().invoke(app, [*command, *secured.options()])
    assert done.exit_code == 0, done.output
    assert "Oslo" in answers.read_text()
    command = ["bench", "serve", secured.served.url, "--model", MODEL, "--concurrency", "1"]
    command += ["--requests", "2", "--rounds", "1", "--prompt-tokens", "8", "--new-tokens", "4"]
    done = CliRunner().invoke(app, [*command, "--token-ids", "100:200", *secured.options()])
    assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_a_stop_lets_streams_end(tmp_path):
    secured = Secured(tmp_path)
    try:
        secured.served.wait_ready()
        secured.served.wait_announced()
        with secured.channel(secured.alice) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            request = long_request("draining")
            request.options.stopping.max_tokens = 500
            stream = stub.StreamChat(request, timeout=WAIT_S)
            assert next(stream).WhichOneof("event") == "started"
            secured.served.process.send_signal(signal.SIGINT)
            finishes = [event.finish for event in stream if event.WhichOneof("event") == "finish"]
        assert [finish.reason for finish in finishes] == [generation_pb2.FINISH_REASON_LENGTH]
        assert secured.served.process.wait(120) == 0
    finally:
        secured.served.process.kill()
        secured.served.process.wait(WAIT_S)


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_port_taken(tmp_path):
    secured = Secured(tmp_path)
    try:
        secured.served.wait_ready()
    finally:
        secured.served.process.kill()
        secured.served.process.wait(WAIT_S)
    deadline = time.monotonic() + WAIT_S
    for port in (secured.served.http_port, secured.served.grpc_port):
        while answers(port):
            assert time.monotonic() < deadline, f"something still listens on {port}"
            time.sleep(0.2)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
