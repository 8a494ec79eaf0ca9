"""What a user sees: `ostro serve` in a process of its own, talked to by real clients."""

import base64
import json
import re
from contextlib import closing

import checkpoints
import grpc
import httpx
import openai
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from mistralai.client import Mistral
from prometheus_client.parser import text_string_to_metric_families
from served import Served
from wait_for import wait_for

from ostro.actors.engine.stages import STAGES
from ostro.actors.errors import DeadlineError, InvalidRequestError, TooLargeError
from ostro.cluster.client import Client
from ostro.protos import cluster_pb2, cluster_pb2_grpc, generation_pb2, generation_pb2_grpc

pytestmark = pytest.mark.cluster

THINK = 34  # [THINK] in the reduced tokenizer, as in Tekken
HIGH = generation_pb2.REASONING_EFFORT_HIGH


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    model_dir = tmp_path_factory.mktemp("tiny")
    checkpoints.make_tiny_checkpoint(model_dir, num_layers=2, with_tokenizer=True)
    settings = (
        "served_name=tiny",
        "serving.max_body_bytes=1048576",
        "reasoning.efforts.low.budget_tokens=12",
        "layout.num_micro_batches=2",
    )
    overrides = [part for setting in settings for part in ("--set", setting)]
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with Served(log, "laptop", "--model", str(model_dir), *overrides) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="none", _strict_response_validation=True
    ) as client:
        yield client


@pytest.fixture(scope="module")
def channel(served):
    with grpc.insecure_channel(served.grpc_address) as channel:
        yield channel


def ask(text="What is 2 + 2?"):
    return [{"role": "user", "content": text}]


def conversation(text="What is 2 + 2?"):
    part = generation_pb2.Part(text=text)
    message = generation_pb2.Message(role=generation_pb2.ROLE_USER, parts=[part])
    return generation_pb2.Conversation(messages=[message])


def options(max_tokens, **fields):
    stopping = generation_pb2.StoppingOptions(max_tokens=max_tokens, ignore_eos=True)
    sampling = generation_pb2.SamplingOptions(temperature=0)
    return generation_pb2.GenerationOptions(stopping=stopping, sampling=sampling, **fields)


def test_start_says_where_it_answers(served):
    text = served.wait_announced()
    assert f":{served.http_port}" in text
    assert f":{served.grpc_port}" in text
    assert "curl" in text


def test_openai_client_gets_the_same_answer_whole_and_streamed(client):
    settings = {"model": "tiny", "messages": ask(), "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**settings)
    text, usage = "", None
    for chunk in client.chat.completions.create(
        **settings, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            text += choice.delta.content or ""
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert whole.usage.completion_tokens == usage.completion_tokens
    assert whole.choices[0].finish_reason in ("stop", "length")


def test_mistral_client_gets_an_answer_whole_and_streamed(served):
    settings = {"model": "tiny", "messages": ask(), "temperature": 0, "max_tokens": 16}
    with Mistral(api_key="none", server_url=served.url) as client:
        whole = client.chat.complete(**settings)
        with client.chat.stream(**settings) as events:
            text = "".join(event.data.choices[0].delta.content or "" for event in events)
        assert client.models.list().data[0].id == "tiny"
    assert text == (whole.choices[0].message.content or "")


def test_grpc_and_http_give_the_same_tokens(served, channel):
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    request = generation_pb2.StreamChatRequest(
        conversation=conversation(), options=options(20, return_token_ids=True)
    )
    events = list(stub.StreamChat(request, timeout=60))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started"
    assert kinds[-2:] == ["finish", "ended"]
    over_grpc = [token for event in events for token in event.delta.token_ids]
    body = {
        "model": "tiny",
        "messages": ask(),
        "temperature": 0,
        "max_tokens": 20,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60).json()
    assert len(over_grpc) == 20
    assert answer["choices"][0]["token_ids"] == over_grpc


def test_grpc_unary_chat_reports_usage_and_finish(channel):
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    request = generation_pb2.ChatRequest(conversation=conversation(), options=options(9))
    answer = stub.Chat(request, timeout=60)
    assert answer.usage.completion_tokens == 9
    assert answer.choices[0].finish.reason == generation_pb2.FINISH_REASON_LENGTH


def test_grpc_continues_token_ids_and_text(channel):
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    ids = stub.Tokenize(generation_pb2.TokenizeRequest(text="Hello there"), timeout=30).token_ids
    back = stub.Detokenize(generation_pb2.DetokenizeRequest(token_ids=ids[1:]), timeout=30)
    assert back.text == "Hello there"
    request = generation_pb2.StreamGenerateRequest(
        tokens=generation_pb2.Tokens(ids=ids), options=options(5, return_token_ids=True)
    )
    events = list(stub.StreamGenerate(request, timeout=60))
    assert sum(len(event.delta.token_ids) for event in events) == 5


def test_grpc_describes_model_and_cluster(channel):
    stub = cluster_pb2_grpc.ClusterServiceStub(channel)
    model = stub.GetModel(cluster_pb2.GetModelRequest(), timeout=30)
    assert (model.id, model.experts, model.experts_per_token) == ("tiny", 16, 4)
    cluster = stub.GetCluster(cluster_pb2.GetClusterRequest(), timeout=30).cluster
    assert cluster.ready
    roles = sorted(cluster_pb2.ActorRole.Name(actor.role) for actor in cluster.actors)
    assert [role for role in roles if role.endswith(("ATTENTION", "EXPERT"))] == [
        "ACTOR_ROLE_ATTENTION",
        "ACTOR_ROLE_EXPERT",
        "ACTOR_ROLE_EXPERT",
    ]


def test_grpc_health_is_told_per_service(channel):
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "ostro.v1.GenerationService", "ostro.v1.ClusterService"):
        request = health_pb2.HealthCheckRequest(service=service)
        serving = health_pb2.HealthCheckResponse.SERVING
        assert health.Check(request, timeout=30).status == serving
        watch = health.Watch(request, timeout=30)
        assert next(watch).status == serving
        watch.cancel()
    with pytest.raises(grpc.RpcError) as refused:
        health.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=30)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


def test_grpc_reflection_describes_the_services(channel):
    """Enough of them for a client that has no protos to call one."""
    database = ProtoReflectionDescriptorDatabase(channel)
    assert {"ostro.v1.GenerationService", "ostro.v1.ClusterService"} <= set(database.get_services())
    pool = DescriptorPool(database)
    method = pool.FindServiceByName("ostro.v1.GenerationService").FindMethodByName("Tokenize")
    call = channel.unary_unary(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=GetMessageClass(method.input_type).SerializeToString,
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    answer = call(GetMessageClass(method.input_type)(text="Hello"), timeout=30)
    assert len(answer.token_ids) > 1


def test_grpc_errors_bring_their_details(served):
    with (
        Client(served.grpc_address) as client,
        pytest.raises(InvalidRequestError) as refused,
    ):
        list(client.stream_chat("Hi", temperature=-3))
    assert (refused.value.code, refused.value.param) == ("invalid_value", "temperature")


def test_grpc_messages_beyond_the_limit_are_refused_with_a_clear_status(served):
    with Client(served.grpc_address) as client, pytest.raises(TooLargeError, match="larger than"):
        client.tokenize("x" * (33 * 2**20))


def test_a_thinking_budget_is_enforced_and_echoed(served, channel):
    """A bias opens the thinking, since a random model does not open it by itself."""
    settings = options(
        60, reasoning=generation_pb2.ReasoningOptions(effort=HIGH, max_thinking_tokens=10)
    )
    settings.sampling.logit_bias[THINK] = 100
    request = generation_pb2.ChatRequest(conversation=conversation(), options=settings)
    answer = generation_pb2_grpc.GenerationServiceStub(channel).Chat(request, timeout=60)
    report = answer.choices[0].reasoning
    assert report.ended_by == generation_pb2.ReasoningReport.ENDED_BY_BUDGET
    assert 10 <= report.thinking_tokens < 50
    assert answer.usage.thinking_tokens == report.thinking_tokens


@pytest.mark.parametrize(("effort", "budget"), [("none", 0), ("low", 12), ("high", None)])
def test_the_answer_echoes_what_was_made_of_the_effort(served, effort, budget):
    body = {"model": "tiny", "messages": ask(), "max_tokens": 4, "reasoning_effort": effort}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["reasoning"]["effort"] == effort
    assert answer["reasoning"]["budget"] == budget


BAD_INPUT = [
    ({"reasoning_effort": "ultra"}, "reasoning_effort"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"temperature": "hot"}, "temperature"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": ask("word " * 40_000)}, "messages"),
    ({"model": "gpt-5"}, "model"),
    ({"top_p": 0}, "top_p"),
    ({"n": 300}, "n"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
]


@pytest.mark.parametrize(
    ("change", "field"), BAD_INPUT, ids=[str(i) for i in range(len(BAD_INPUT))]
)
def test_bad_input_gets_4xx_with_the_fields_name(served, change, field):
    body = {"model": "tiny", "messages": ask(), "max_tokens": 4, **change}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60)
    assert 400 <= answer.status_code < 500
    assert field in json.dumps(answer.json()["error"])


def test_broken_bytes_and_huge_bodies_are_refused_and_serving_goes_on(served):
    url = f"{served.url}/v1/chat/completions"
    headers = {"content-type": "application/json"}
    assert httpx.post(url, content=b'{"a": "\xff\xfe', headers=headers).status_code in (400, 422)
    assert (
        httpx.post(url, content=b"x" * 10_000_000, headers=headers, timeout=60).status_code == 413
    )
    assert httpx.post(url, content=b"", headers=headers).status_code in (400, 422)
    assert httpx.get(f"{served.url}/health").status_code == 200


def test_grpc_bad_input_is_invalid_argument_with_the_fields_name(channel):
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    request = generation_pb2.ChatRequest(
        conversation=conversation(),
        options=generation_pb2.GenerationOptions(
            sampling=generation_pb2.SamplingOptions(temperature=-3)
        ),
    )
    with pytest.raises(grpc.RpcError) as refused:
        stub.Chat(request, timeout=30)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "temperature" in refused.value.details()


def wait_idle(client):
    wait_for(lambda: not client.cluster().load.running)


def test_leaving_a_stream_frees_its_pages(served):
    body = {
        "model": "tiny",
        "messages": ask(),
        "max_tokens": 20_000,
        "ignore_eos": True,
        "stream": True,
    }
    url = f"{served.url}/v1/chat/completions"
    with Client(served.grpc_address) as client:
        with httpx.stream("POST", url, json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            while not next(lines).startswith("data:"):
                pass
            assert client.cluster().load.running
        wait_idle(client)


def test_leaving_a_grpc_stream_frees_its_pages(served):
    with Client(served.grpc_address) as client:
        with closing(client.stream_chat("Hi", options=options(20_000))) as events:
            next(events)
            assert client.cluster().load.running
        wait_idle(client)


@pytest.mark.parametrize("streams", [True, False])
def test_the_callers_grpc_deadline_ends_the_generation(served, streams):
    with Client(served.grpc_address, timeout_s=1.5) as client:
        settings = {"options": options(20_000)}
        with pytest.raises(DeadlineError):
            _ = (
                list(client.stream_chat("Hi", **settings))
                if streams
                else client.chat("Hi", **settings)
            )
        wait_idle(client)


def test_a_running_generation_can_be_cancelled_from_another_connection(served, channel):
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    request = generation_pb2.StreamChatRequest(
        conversation=conversation(), options=options(20_000), request_id="to-cancel"
    )
    stream = stub.StreamChat(request, timeout=120)
    assert next(stream).WhichOneof("event") == "started"
    control = {"id": "to-cancel", "action": "cancel"}
    answer = httpx.post(f"{served.url}/v1/chat/completions/control", json=control, timeout=30)
    assert answer.status_code == 200
    finishes = [event.finish for event in stream if event.WhichOneof("event") == "finish"]
    assert [finish.reason for finish in finishes] == [generation_pb2.FINISH_REASON_CANCELLED]


def test_a_running_response_is_cancelled_by_its_id(served, client):
    stream = client.responses.create(
        model="tiny", input="What is 2 + 2?", stream=True, extra_body={"ignore_eos": True}
    )
    control = {"id": next(stream).response.id, "action": "cancel"}
    answer = httpx.post(f"{served.url}/v1/chat/completions/control", json=control, timeout=30)
    assert answer.json()["applied"]
    last = list(stream)[-1]
    assert (last.type, last.response.status) == ("response.incomplete", "cancelled")


def test_choices_share_their_prompt_and_the_first_is_the_answer_of_one_alone(served, client):
    prompt = ask("Count the pebbles on the beach. " * 8)
    sampled = {"model": "tiny", "messages": prompt, "max_tokens": 8, "temperature": 1, "seed": 5}

    def tokens_found() -> float:
        text = httpx.get(f"{served.url}/metrics", timeout=30).text
        hits = re.findall(r"^ostro_prefix_cache_hits_total\{.*\} (\S+)$", text, re.MULTILINE)
        return sum(map(float, hits))

    found_before = tokens_found()
    several = client.chat.completions.create(**sampled, n=3, extra_body={"ignore_eos": True})
    num_prompt_tokens = several.usage.prompt_tokens
    assert tokens_found() - found_before >= 2 * (num_prompt_tokens - 64) > 0
    assert several.usage.num_cached_tokens <= num_prompt_tokens - 64
    assert several.usage.completion_tokens == 3 * 8
    again = client.chat.completions.create(**sampled, n=3, extra_body={"ignore_eos": True})
    alone = client.chat.completions.create(**sampled, extra_body={"ignore_eos": True})
    answers = [choice.message.content for choice in several.choices]
    assert answers == [choice.message.content for choice in again.choices]
    assert answers[0] == alone.choices[0].message.content
    assert len(set(answers)) == 3


def test_controls_by_the_callers_id_reach_every_choice(served, channel):
    """A bias opens the thinking, since a random model does not open it by itself."""
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    settings = options(20_000, choices=2, reasoning=generation_pb2.ReasoningOptions(effort=HIGH))
    settings.sampling.logit_bias[THINK] = 100
    request = generation_pb2.StreamChatRequest(
        conversation=conversation(), options=settings, request_id="both"
    )
    stream = stub.StreamChat(request, timeout=120)
    assert next(stream).WhichOneof("event") == "started"
    control = generation_pb2.ControlGenerationRequest
    for action in (control.ACTION_END_THINKING, control.ACTION_CANCEL):
        assert stub.ControlGeneration(control(request_id="both", action=action)).applied
        while action == control.ACTION_END_THINKING:
            event = next(stream)
            if event.delta.channel == generation_pb2.CHANNEL_ANSWER:
                break
    finishes = [event.finish for event in stream if event.WhichOneof("event") == "finish"]
    assert sorted(finish.choice for finish in finishes) == [0, 1]
    assert [finish.reason for finish in finishes] == [generation_pb2.FINISH_REASON_CANCELLED] * 2
    report = generation_pb2.ReasoningReport
    assert [finish.report.ended_by for finish in finishes] == [report.ENDED_BY_CALLER] * 2


def test_prompts_of_one_completion_answer_as_each_alone(client):
    prompts = ["The sea is", "Two and two"]

    def told(prompt):
        answer = client.completions.create(
            model="tiny", prompt=prompt, n=2, max_tokens=6, temperature=1, seed=4, echo=True
        )
        return [(choice.index, choice.text) for choice in answer.choices]

    together, first, second = told(prompts), told(prompts[0]), told(prompts[1])
    assert together == [*first, *((index + 2, text) for index, text in second)]
    assert [text.startswith(prompts[index // 2]) for index, text in together] == [True] * 4


def test_metrics_tell_requests_and_the_cell_and_no_text(served):
    body = {"model": "tiny", "messages": ask("a secret wombat"), "max_tokens": 4}
    httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60).raise_for_status()
    text = httpx.get(f"{served.url}/metrics", timeout=30).text
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    for name in (
        "ostro_request_success_total",
        "ostro_generation_tokens_total",
        "ostro_request_prefill_time_seconds_count",
        "ostro_request_part_seconds_count",
        "ostro_step_seconds_total",
        "ostro_attention_wait_seconds_total",
        "ostro_actor_memory_used_bytes",
    ):
        assert values[name] > 0, name
    assert "wombat" not in text


def test_a_request_tells_where_its_time_went_if_asked(served):
    body = {"model": "tiny", "messages": ask(), "max_tokens": 4, "ignore_eos": True}
    ask_for_it = {"x-ostro-trace": "1"}
    url = f"{served.url}/v1/chat/completions"
    told = httpx.post(url, json=body, headers=ask_for_it, timeout=60).headers["server-timing"]
    parts = {name: float(ms) for name, ms in re.findall(r"(\w+);dur=([\d.]+)", told)}
    for part in ("gateway", "prefill", "decode", "attention", "dispatch", "experts", "sample"):
        assert parts[part] > 0, part
    following = ("gateway", "queue", "prefill", "decode")
    assert sum(parts[part] for part in following) == pytest.approx(parts["total"], abs=0.01)
    stages = sum(parts[part] for part in (*STAGES, "between_steps"))
    assert stages == pytest.approx(parts["prefill"] + parts["decode"], abs=0.01)


def test_images_get_a_clear_refusal(served):
    pixel = base64.b64encode(b"not an image").decode()
    part = {"type": "image_url", "image_url": f"data:image/png;base64,{pixel}"}
    body = {"model": "tiny", "messages": [{"role": "user", "content": [part]}]}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=30)
    assert answer.status_code == 400
    assert re.search("image", answer.text)
