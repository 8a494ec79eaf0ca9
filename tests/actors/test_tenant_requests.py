"""Tenants in a cell: whose requests are whose, and what their quotas count."""

from __future__ import annotations

import msgspec
import pytest
from engine_fakes import make_request
from rank_reports import step_that_finished

from ostro.actors.cell_requests import CellRequests
from ostro.actors.engine.quotas import TenantQuotas
from ostro.actors.engine.request import GenerationRequest
from ostro.actors.errors import InvalidRequestError, OverloadedError, QuotaError
from ostro.configs.deployment import EngineConfig
from ostro.configs.key_table import Quota


def _of(tenant: str, name: str) -> GenerationRequest:
    return msgspec.structs.replace(make_request(name), tenant=tenant)


def _quotas(**limits: int) -> TenantQuotas:
    quotas = TenantQuotas()
    quotas.configure({"acme": Quota(**limits)})
    return quotas


def test_requests_are_found_by_their_tenant_alone() -> None:
    requests = CellRequests(EngineConfig(), [0], TenantQuotas())
    requests.place(_of("acme", "chat#i-1.0"), "i")
    requests.place(_of("other", "chat#i-2.0"), "i")

    def found(name: str, tenant: str | None) -> list[str]:
        return [live.request_id for live in requests.find(name, tenant)]

    assert found("chat", "acme") == found("chat#i-1.0", "acme") == ["chat#i-1.0"]
    assert found("chat", "other") == found("chat#i-2", "other") == ["chat#i-2.0"]
    assert found("chat#i-2.0", "acme") == found("chat#i-2", "acme") == found("chat", "nobody") == []
    assert found("chat", None) == found("chat#i-2.0", None) == ["chat#i-2.0"]
    requests.follow(step_that_finished("chat#i-2.0"), elapsed_s=0.1)
    assert found("chat", None) == ["chat#i-1.0"]
    assert found("chat", "other") == []


def test_quotas_are_counted_until_a_request_ends() -> None:
    requests = CellRequests(EngineConfig(), [0], _quotas(concurrent_requests=1))
    requests.place(_of("acme", "a"), "i")
    with pytest.raises(QuotaError):
        requests.place(_of("acme", "b"), "i")
    requests.place(_of("other", "c"), "i")
    requests.follow(step_that_finished("a"), elapsed_s=0.1)
    requests.place(_of("acme", "b"), "i")


def test_output_is_charged_when_a_request_ends() -> None:
    requests = CellRequests(EngineConfig(), [0], _quotas(tokens_per_minute=600))
    requests.place(_of("acme", "a"), "i")
    report = step_that_finished("a", outputs=[("a", [1] * 1200)])
    requests.follow(report, elapsed_s=0.1)
    with pytest.raises(QuotaError) as caught:
        requests.place(_of("acme", "b"), "i")
    assert caught.value.retry_after_s == pytest.approx(60, abs=2)


def test_a_request_that_finds_no_room_costs_nothing() -> None:
    quotas = _quotas(concurrent_requests=2)
    requests = CellRequests(EngineConfig(max_waiting_requests=1), [0], quotas)
    requests.place(_of("acme", "a"), "i")
    with pytest.raises(OverloadedError, match="wait already"):
        requests.place(_of("acme", "b"), "i")
    requests.follow(step_that_finished("a"), elapsed_s=0.1)
    for name in "cd":
        CellRequests(EngineConfig(), [0], quotas).place(_of("acme", name), "i")


def test_requests_of_an_epoch_that_failed_cost_nothing() -> None:
    quotas = _quotas(concurrent_requests=1, requests_per_minute=1)
    requests = CellRequests(EngineConfig(), [0], quotas)
    requests.place(_of("acme", "a"), "i")
    assert [live.request_id for live in requests.give_up()] == ["a"]
    requests.follow(step_that_finished("a"), elapsed_s=0.1)  # said by a rank that does not know yet
    CellRequests(EngineConfig(), [0], quotas).place(_of("acme", "a"), "i")


def test_choices_count_one_by_one_and_their_prompt_once() -> None:
    quotas = _quotas(concurrent_requests=3, requests_per_minute=2, tokens_per_minute=1000)
    requests = CellRequests(EngineConfig(), [0], quotas)
    request = msgspec.structs.replace(_of("acme", "mine#i-1.0"), num_choices=3)
    requests.place(request, "i")
    with pytest.raises(QuotaError, match="concurrent_requests"):
        requests.place(_of("acme", "b"), "i")
    requests.follow(step_that_finished("mine#i-1.1"), elapsed_s=0.1)
    requests.place(_of("acme", "b"), "i")
    requests.follow(step_that_finished("mine#i-1.0"), elapsed_s=0.1)
    with pytest.raises(QuotaError, match="requests_per_minute"):
        requests.place(_of("acme", "c"), "i")
    requests.give_up()  # gives back the prompt of "b", and no more: that of "mine" was served
    again = CellRequests(EngineConfig(), [0], quotas)
    again.place(_of("acme", "d"), "i")
    with pytest.raises(QuotaError, match="requests_per_minute"):
        again.place(_of("acme", "e"), "i")


def test_more_choices_than_a_tenant_may_ever_have_are_refused_for_good() -> None:
    requests = CellRequests(EngineConfig(), [0], _quotas(concurrent_requests=2))
    request = msgspec.structs.replace(_of("acme", "mine#i-1.0"), num_choices=3)
    with pytest.raises(InvalidRequestError, match="3 answers") as caught:
        requests.place(request, "i")
    assert (caught.value.code, caught.value.param) == ("above_quota", "n")


def test_what_is_resumed_costs_only_what_it_brings_from_there() -> None:
    quotas = _quotas(concurrent_requests=1, requests_per_minute=1, tokens_per_minute=600)
    before = CellRequests(EngineConfig(), [0], quotas)
    before.place(_of("acme", "a#i-1.0"), "i")
    before.give_up()
    after = CellRequests(EngineConfig(), [0], quotas)
    after.place(_of("acme", "a#i-2.0"), "i", is_resumed=True)
    with pytest.raises(QuotaError, match="concurrent_requests"):
        after.place(_of("acme", "b#i-1.0"), "i")
    after.follow(step_that_finished("a#i-2.0", outputs=[("a#i-2.0", [1] * 1200)]), elapsed_s=0.1)
    with pytest.raises(QuotaError, match="tokens_per_minute"):
        after.place(_of("acme", "b#i-1.0"), "i")


def test_what_is_resumed_runs_beside_as_many_as_a_quota_allows() -> None:
    requests = CellRequests(EngineConfig(), [0], _quotas(concurrent_requests=1))
    requests.place(_of("acme", "a#i-1.0"), "i")
    requests.place(_of("acme", "b#i-2.0"), "i", is_resumed=True)
    assert len(requests) == 2
