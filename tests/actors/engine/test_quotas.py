"""Quotas by tenant: what gets in, when the refused should come back, what an end costs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from ostro.actors.engine.quotas import TenantQuotas
from ostro.actors.errors import QuotaError, SpentQuotaError
from ostro.configs.key_table import Quota


@dataclass
class Clock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


def quotas_of(clock: Clock, **limits: int) -> TenantQuotas:
    quotas = TenantQuotas(clock)
    quotas.configure({"acme": Quota(**limits)})
    return quotas


def refusal(quotas: TenantQuotas, num_prompt_tokens: int = 1) -> QuotaError:
    with pytest.raises(QuotaError) as caught:
        quotas.begin("acme", num_prompt_tokens)
    return caught.value


def test_who_has_no_quota_is_not_limited():
    quotas = quotas_of(Clock(), requests_per_minute=1)
    for _ in range(100):
        quotas.begin("other", 10**9)


def test_requests_per_minute_refill_evenly():
    clock = Clock()
    quotas = quotas_of(clock, requests_per_minute=6)
    for _ in range(6):
        quotas.begin("acme", 1)
    error = refusal(quotas)
    assert (error.code, error.param) == ("quota_exceeded", "requests_per_minute")
    assert error.retry_after_s == pytest.approx(10.0)
    clock.now_s += 9.9
    assert refusal(quotas).retry_after_s == pytest.approx(0.1)
    clock.now_s += 0.2
    quotas.begin("acme", 1)
    refusal(quotas)


def test_what_generates_nothing_is_a_request_of_no_tokens():
    clock = Clock()
    quotas = quotas_of(clock, requests_per_minute=2, tokens_per_minute=10, concurrent_requests=1)
    quotas.count_request("acme")
    quotas.count_request("acme")
    quotas.count_request("other")
    assert refusal(quotas).param == "requests_per_minute"
    with pytest.raises(QuotaError) as caught:
        quotas.count_request("acme")
    assert caught.value.retry_after_s == pytest.approx(30.0)
    clock.now_s += 60
    quotas.begin("acme", 10)  # no token was charged, and nothing runs
    quotas.count_request("acme")  # spent tokens do not stand in its way


def test_a_quota_is_spent_while_the_smallest_request_has_to_wait():
    clock = Clock()
    quotas = quotas_of(clock, tokens_per_minute=600)
    quotas.begin("acme", 580)
    assert type(refusal(quotas, 100)) is QuotaError  # a shorter prompt would get in
    quotas.end("acme", 100)  # 80 in debt, of which ten a second are recovered
    assert type(refusal(quotas, 100)) is SpentQuotaError
    clock.now_s += 7.5
    assert type(refusal(quotas, 100)) is QuotaError  # and will, within the second
    clock.now_s += SpentQuotaError.HOLDS_S
    quotas.begin("acme", 1)


def test_a_bucket_holds_no_more_than_a_minute():
    clock = Clock()
    quotas = quotas_of(clock, requests_per_minute=2)
    clock.now_s += 3600
    quotas.begin("acme", 1)
    quotas.begin("acme", 1)
    refusal(quotas)


def test_a_prompt_is_reserved_at_the_door_and_the_completion_charged_at_the_end():
    clock = Clock()
    quotas = quotas_of(clock, tokens_per_minute=600)
    quotas.begin("acme", 400)
    error = refusal(quotas, 300)
    assert error.param == "tokens_per_minute"
    assert error.retry_after_s == pytest.approx(10.0)
    quotas.end("acme", 500)  # a debt of 300: ten tokens a second pay it back
    assert refusal(quotas, 100).retry_after_s == pytest.approx(40.0)
    clock.now_s += 40.1
    quotas.begin("acme", 100)


def test_a_prompt_larger_than_the_budget_gets_in_when_the_budget_is_whole():
    clock = Clock()
    quotas = quotas_of(clock, tokens_per_minute=60)
    quotas.begin("acme", 600)
    assert refusal(quotas).retry_after_s == pytest.approx(541.0)


def test_concurrent_requests_are_counted_until_they_end():
    quotas = quotas_of(Clock(), concurrent_requests=2)
    quotas.begin("acme", 1)
    quotas.begin("acme", 1)
    error = refusal(quotas)
    assert (error.param, error.retry_after_s) == ("concurrent_requests", 1.0)
    quotas.end("acme", 10)
    quotas.begin("acme", 1)


def test_a_refused_request_costs_nothing():
    clock = Clock()
    quotas = quotas_of(clock, requests_per_minute=2, tokens_per_minute=100)
    quotas.begin("acme", 100)
    refusal(quotas, 50)
    clock.now_s += 30.1
    quotas.begin("acme", 50)


def test_a_request_that_was_not_served_is_given_back():
    quotas = quotas_of(Clock(), requests_per_minute=1, tokens_per_minute=10, concurrent_requests=1)
    quotas.begin("acme", 10)
    quotas.undo("acme", 10)
    quotas.begin("acme", 10)


def test_what_ran_before_a_quota_came_counts_towards_it():
    quotas = TenantQuotas(Clock())
    quotas.begin("acme", 1)
    quotas.configure({"acme": Quota(concurrent_requests=1)})
    assert refusal(quotas).param == "concurrent_requests"


@pytest.mark.parametrize(("limit", "num_left"), [(10, 7), (4, 1), (2, 0)])
def test_what_was_used_of_an_old_quota_stays_used_under_a_new_one(limit, num_left):
    quotas = quotas_of(Clock(), requests_per_minute=5)
    for _ in range(3):
        quotas.begin("acme", 1)
    quotas.configure({"acme": Quota(requests_per_minute=limit)})
    for _ in range(num_left):
        quotas.begin("acme", 1)
    refusal(quotas)


def test_a_quota_that_is_lifted_holds_nobody():
    quotas = quotas_of(Clock(), requests_per_minute=1, tokens_per_minute=1)
    quotas.begin("acme", 1)
    quotas.configure({})
    quotas.begin("acme", 1)
    quotas.end("acme", 1)
