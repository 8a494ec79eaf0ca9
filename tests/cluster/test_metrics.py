"""What a replica counts, and what it tells of the cell."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace

import pytest
from certificates import Authority, tls_config
from prometheus_client.parser import text_string_to_metric_families
from scripted_frontend import (
    FINISHED,
    MODEL,
    STARTED,
    THOUGHTFUL,
    THREE,
    ScriptedCell,
    ScriptedFrontend,
)

from ostro.actors.engine.stages import STAGES
from ostro.actors.errors import (
    DeadlineError,
    NotReadyError,
    OverloadedError,
    ShardLostError,
    UnauthenticatedError,
)
from ostro.actors.fabric.messages import State
from ostro.cluster.cell_metrics import expert_imbalance, expert_rows
from ostro.cluster.fetch_outcome import FetchOutcome
from ostro.cluster.generation import ChatGeneration, TextDelta
from ostro.cluster.metrics import Metrics
from ostro.cluster.metrics_list import METRICS, PREFIX
from ostro.configs.observability import ObservabilityConfig

CHAT = ChatGeneration(messages=())


def play(metrics: Metrics, *script, stop_after: int | None = None) -> ScriptedFrontend:
    """Read a scripted generation through `metrics.watch`, or the first events of it."""

    async def run() -> ScriptedFrontend:
        frontend = ScriptedFrontend(*script)
        async with contextlib.aclosing(metrics.watch(frontend.chat(CHAT))) as events:
            num_read = 0
            async for _ in events:
                num_read += 1
                if num_read == stop_after:
                    break
        return frontend

    return asyncio.run(run())


def value(metrics: Metrics, name: str, **labels) -> float | None:
    return metrics.registry.get_sample_value("ostro_" + name, {"model_name": MODEL, **labels})


def rendered(cell: ScriptedCell | None, *config: ObservabilityConfig) -> str:
    return asyncio.run(Metrics(MODEL, *config).render(cell)).decode()


def test_a_finished_generation_is_counted_and_timed():
    metrics = Metrics(MODEL)
    play(metrics, *THOUGHTFUL)
    assert value(metrics, "request_success_total", finished_reason="stop") == 1
    assert value(metrics, "time_to_first_token_seconds_sum", effort="low") == 0.05
    assert value(metrics, "time_to_first_answer_token_seconds_sum", effort="low") == 0.2
    assert value(metrics, "e2e_request_latency_seconds_sum", effort="low") == 0.5
    assert value(metrics, "request_queue_time_seconds_sum") == 0.01
    assert value(metrics, "request_prefill_time_seconds_sum") == 0.03
    assert value(metrics, "request_decode_time_seconds_sum") == 0.44
    gap_s = value(metrics, "request_time_per_output_token_seconds_sum")
    assert gap_s == pytest.approx((0.5 - 0.05) / (11 - 1))
    assert value(metrics, "inter_token_latency_seconds_count") == 3
    assert value(metrics, "thinking_tokens_total", effort="low") == 5
    assert value(metrics, "thinking_ended_total", by="model", effort="low") == 1
    assert value(metrics, "image_tokens_total") == 3
    assert value(metrics, "request_prompt_tokens_sum") == 7
    assert value(metrics, "request_generation_tokens_sum", effort="low") == 11


def test_a_requests_time_is_told_part_by_part():
    metrics = Metrics(MODEL)
    play(metrics, *THOUGHTFUL)
    parts = {
        name: value(metrics, "request_part_seconds_sum", part=name)
        for name in ("gateway", "between_steps", *STAGES)
    }
    assert parts["experts"] == 0.2
    assert parts["gateway"] == pytest.approx(0.5 - 0.01 - 0.03 - 0.44)
    assert sum(parts.values()) == pytest.approx(0.5 - 0.01)  # all but the queue
    assert value(metrics, "request_part_seconds_sum", part="prefill") is None


def test_a_request_of_several_choices_counts_once_and_all_its_thinking():
    metrics = Metrics(MODEL)
    play(metrics, *THREE)
    assert value(metrics, "request_success_total", finished_reason="tool_calls") == 1
    assert value(metrics, "request_success_total", finished_reason="length") is None
    assert value(metrics, "e2e_request_latency_seconds_count", effort="low") == 1
    assert value(metrics, "thinking_tokens_total", effort="low") == 3 * 5
    assert value(metrics, "thinking_ended_total", by="model", effort="low") == 3
    assert value(metrics, "request_params_n_sum") == 3
    # Gaps within the first choice (three) and the third (one), none between choices.
    assert value(metrics, "inter_token_latency_seconds_count") == 4


def test_a_reader_that_leaves_after_some_choices_is_disconnected():
    metrics = Metrics(MODEL)
    play(metrics, *THREE, stop_after=len(THREE) - 1)
    assert value(metrics, "request_success_total", finished_reason="disconnected") == 1
    assert value(metrics, "e2e_request_latency_seconds_count", effort="low") is None


def test_a_reader_that_leaves_counts_as_disconnected_and_closes_the_generation():
    metrics = Metrics(MODEL)
    frontend = play(metrics, *THOUGHTFUL, stop_after=2)
    assert frontend.num_closed == 1
    assert value(metrics, "request_success_total", finished_reason="disconnected") == 1
    assert value(metrics, "request_success_total", finished_reason="stop") is None


def test_refusals_at_the_door_are_told_from_failures_later():
    metrics = Metrics(MODEL)
    with pytest.raises(OverloadedError):
        play(metrics, OverloadedError("full"))
    with pytest.raises(ShardLostError):
        play(metrics, STARTED, ShardLostError("rank 1"))
    assert value(metrics, "admission_rejections_total", reason="queue_full") == 1
    assert value(metrics, "request_failure_total", code="queue_full") == 1
    assert value(metrics, "request_failure_total", code="shard_lost") == 1
    assert value(metrics, "admission_rejections_total", reason="shard_lost") is None
    assert value(metrics, "request_success_total", finished_reason="disconnected") is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [(NotReadyError("loading"), "not_ready"), (DeadlineError("late"), "deadline_exceeded")],
)
def test_a_request_given_up_before_it_began_was_not_admitted(error, reason):
    metrics = Metrics(MODEL)
    with pytest.raises(type(error)):
        play(metrics, error)
    assert value(metrics, "admission_rejections_total", reason=reason) == 1


def test_tenants_are_counted_and_the_last_to_come_share_a_label():
    metrics = Metrics(MODEL, ObservabilityConfig(max_tenants=2))
    for tenant in ("a", "b", "c", "d", "a", ""):
        play(metrics, replace(STARTED, tenant=tenant), FINISHED)
    counts = {t: value(metrics, "tenant_requests_total", tenant=t) for t in ("a", "b", "other")}
    assert counts == {"a": 2, "b": 1, "other": 2}
    assert value(metrics, "tenant_prompt_tokens_total", tenant="a") == 2 * 7
    assert value(metrics, "tenant_generation_tokens_total", tenant="other") == 2 * 11
    assert value(metrics, "tenant_requests_total", tenant="c") is None
    assert value(metrics, "tenant_requests_total", tenant="") is None


def test_no_text_reaches_the_metrics():
    metrics = Metrics(MODEL)
    play(metrics, STARTED, TextDelta(text="a secret word"), FINISHED)
    assert "secret" not in asyncio.run(metrics.render(None)).decode()


def test_the_cells_numbers_are_read_at_scrape_time():
    lines = rendered(ScriptedCell()).splitlines()
    for line in (
        'ostro_cell_ready{model_name="tiny-small-4"} 1.0',
        'ostro_num_requests_running{engine="0",model_name="tiny-small-4"} 2.0',
        'ostro_num_requests_waiting{engine="0",model_name="tiny-small-4"} 1.0',
        'ostro_kv_cache_usage_perc{engine="0",model_name="tiny-small-4"} 0.25',
        'ostro_prompt_tokens_total{engine="0",model_name="tiny-small-4"} 40.0',
        'ostro_generation_tokens_total{engine="0",model_name="tiny-small-4"} 50.0',
        'ostro_prefix_cache_queries_total{engine="0",model_name="tiny-small-4"} 40.0',
        'ostro_prefix_cache_hits_total{engine="0",model_name="tiny-small-4"} 10.0',
        'ostro_num_preemptions_total{engine="0",model_name="tiny-small-4"} 3.0',
        'ostro_spec_decode_num_drafts_total{engine="0",model_name="tiny-small-4"} 20.0',
        'ostro_spec_decode_num_draft_tokens_total{engine="0",model_name="tiny-small-4"} 30.0',
        'ostro_spec_decode_num_accepted_tokens_total{engine="0",model_name="tiny-small-4"} 10.0',
        'ostro_spec_decode_num_draft_tokens_per_pos_total{engine="0",'
        'model_name="tiny-small-4",position="0"} 20.0',
        'ostro_spec_decode_num_accepted_tokens_per_pos_total{engine="0",'
        'model_name="tiny-small-4",position="1"} 2.0',
        'ostro_num_tokens_waiting{engine="0",model_name="tiny-small-4"} 0.0',
        'ostro_expert_tokens_total{expert="0",layer="all",model_name="tiny-small-4"} 10.0',
        'ostro_steps_total{model_name="tiny-small-4"} 20.0',
        'ostro_step_seconds_total{model_name="tiny-small-4",stage="attention"} 1.5',
        'ostro_step_seconds_total{model_name="tiny-small-4",stage="experts"} 0.5',
        'ostro_combine_seconds_total{model_name="tiny-small-4",stage="wait"} 0.5',
        'ostro_attention_wait_seconds_total{model_name="tiny-small-4"} 0.5',
        'ostro_cell_epoch{model_name="tiny-small-4"} 3.0',
    ):
        assert line in lines
    restarts = (
        'ostro_actor_restarts_total{actor="experts-1",model_name="tiny-small-4",role="expert"}'
    )
    assert f"{restarts} 2.0" in lines
    assert any(line.startswith("ostro_actor_state{") and "attention-0" in line for line in lines)


def test_experts_are_told_layer_by_layer_where_asked():
    text = rendered(ScriptedCell(), ObservabilityConfig(expert_layers=True))
    lines = [line for line in text.splitlines() if line.startswith("ostro_expert_tokens_total")]
    assert lines == [
        f'ostro_expert_tokens_total{{expert="{e}",layer="{layer}",model_name="{MODEL}"}} {rows}'
        for layer, rows_E in enumerate([[6.0, 2.0], [4.0, 0.0]])
        for e, rows in enumerate(rows_E)
    ]


def test_what_is_served_is_the_list_as_the_client_library_reads_it(tmp_path):
    metrics = Metrics(MODEL, tls=tls_config(Authority(tmp_path).issue("server", "box")))
    for tenant in ("a", ""):
        play(metrics, replace(STARTED, tenant=tenant), *THOUGHTFUL[1:])
    with pytest.raises(OverloadedError):
        play(metrics, OverloadedError("full"))
    metrics.count_refused_key(UnauthenticatedError("no key"))
    metrics.observe_fetch(FetchOutcome.OK, 0.1, 1000)
    text = asyncio.run(metrics.render(ScriptedCell())).decode()
    served = {}
    for family in text_string_to_metric_families(text):
        if family.name.endswith("_created"):
            continue
        labels = {name for sample in family.samples for name in sample.labels} - {"le"}
        served[family.name] = (family.type, family.documentation, labels)
    assert served == {
        PREFIX + spec.name: (spec.kind.value, spec.text, set(spec.label_names))
        for spec in METRICS.values()
    }


def test_the_end_of_a_certificate_is_that_of_the_file_as_it_lies_there(tmp_path):
    authority = Authority(tmp_path)
    metrics = Metrics(MODEL, tls=tls_config(authority.issue("server", "box", days=3)))

    def days_left() -> float:
        text = asyncio.run(metrics.render(None)).decode()
        line = next(li for li in text.splitlines() if li.startswith("ostro_tls_expiry_timestamp"))
        assert 'file="cert_file"' in line
        return (float(line.split()[-1]) - time.time()) / 86400

    assert days_left() == pytest.approx(3, abs=0.1)
    authority.issue("server", "box", days=60)
    assert days_left() == pytest.approx(60, abs=0.1)


# What dashboards and autoscalers made for vLLM look for, and what reasoning and experts add.
EXPECTED = """
    num_requests_running{engine} num_requests_waiting{engine} kv_cache_usage_perc{engine}
    prompt_tokens_total{engine} generation_tokens_total{engine} prefix_cache_queries_total{engine}
    prefix_cache_hits_total{engine} num_preemptions_total{engine}
    spec_decode_num_drafts_total{engine} spec_decode_num_draft_tokens_total{engine}
    spec_decode_num_accepted_tokens_total{engine}
    spec_decode_num_accepted_tokens_per_pos_total{engine,position}
    request_success_total{finished_reason} time_to_first_token_seconds inter_token_latency_seconds
    request_time_per_output_token_seconds e2e_request_latency_seconds request_queue_time_seconds
    request_prefill_time_seconds request_decode_time_seconds admission_rejections_total{reason}
    time_to_first_answer_token_seconds{effort} thinking_tokens_total{effort}
    thinking_ended_total{by} expert_tokens_total{layer,expert} expert_imbalance_ratio
    dispatch_seconds_total{stage} combine_seconds_total{stage} attention_wait_seconds_total
    expert_wait_seconds_total actor_state{role,state} actor_restarts_total
""".split()


@pytest.mark.parametrize("expected", EXPECTED)
def test_the_names_that_others_rely_on_are_in_the_list(expected):
    name, _, labels = expected.rstrip("}").partition("{")
    spec = next(spec for spec in METRICS.values() if spec.family == f"ostro_{name}")
    assert set(filter(None, labels.split(","))) <= set(spec.labels)


def test_a_cell_that_does_not_answer_leaves_its_numbers_out():
    for text in (rendered(None), rendered(ScriptedCell(is_ready=False))):
        assert 'ostro_cell_ready{model_name="tiny-small-4"} 0.0' in text
        assert "ostro_num_requests_running" not in text


def state(rows_LE, physical_to_logical, rank_of_physical) -> State:
    return State(0, 0, True, [], {}, rows_LE, physical_to_logical, rank_of_physical, {}, 0)


@pytest.mark.parametrize(
    ("rows_LE", "physical_to_logical", "rank_of_physical", "expected"),
    [
        ([[6, 2], [4, 0]], [0, 1], [1, 2], 10 / 6),
        ([[5, 5]], [0, 1], [1, 2], 1.0),
        ([[8, 2]], [0, 1, 0], [1, 2, 2], 6 / 5),  # a hot expert with a copy beside the cold one
        ([[0, 0]], [0, 1], [1, 2], 0.0),
        ([], [], [], 0.0),
        ([], [0, 1], [1, 2], 0.0),
    ],
)
def test_expert_imbalance_is_busiest_over_mean(
    rows_LE, physical_to_logical, rank_of_physical, expected
):
    assert expert_imbalance(state(rows_LE, physical_to_logical, rank_of_physical)) == (
        pytest.approx(expected)
    )


def test_expert_rows_sum_over_layers():
    assert expert_rows(state([[6, 2], [4, 0]], [0, 1], [1, 2])) == [10, 2]
