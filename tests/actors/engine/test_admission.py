"""The door refuses what it cannot serve or hold, and says when to come back."""

from __future__ import annotations

import pytest
from engine_fakes import make_request

from ostro.actors.engine.admission import AdmissionPolicy, check_servable
from ostro.actors.engine.request import RequestProgress
from ostro.actors.errors import InvalidRequestError, OverloadedError


def _progress(arrival: int, scheduling_class: int = 0, num_tokens: int = 3) -> RequestProgress:
    request = make_request(prompt=[5] * num_tokens, scheduling_class=scheduling_class)
    progress = RequestProgress(request, arrived_s=0.0)
    progress.arrival = arrival
    return progress


def _retry_after_s(policy: AdmissionPolicy, num_waiting_tokens: int) -> float:
    with pytest.raises(OverloadedError) as caught:
        policy.check(2, num_waiting_tokens, 1)
    assert caught.value.code == "queue_full"
    assert caught.value.retry_after_s is not None
    return caught.value.retry_after_s


def test_policy_refuses_when_enough_requests_wait() -> None:
    policy = AdmissionPolicy(2, 1000)
    policy.check(1, 10, 10)
    with pytest.raises(OverloadedError, match="2 requests wait"):
        policy.check(2, 20, 10)


def test_policy_refuses_when_enough_tokens_wait() -> None:
    policy = AdmissionPolicy(100, 50)
    policy.check(1, 40, 10)
    with pytest.raises(OverloadedError, match="40 prompt tokens wait"):
        policy.check(1, 40, 11)


def test_policy_lets_any_prompt_in_when_nothing_waits() -> None:
    AdmissionPolicy(1, 50).check(0, 0, 51)


def test_a_tenant_may_have_as_much_waiting_as_there_is_room_left() -> None:
    policy = AdmissionPolicy(100, 1000)
    policy.check(49, 490, 10, of_tenant=(49, 490))
    with pytest.raises(OverloadedError, match="50 of your requests"):
        policy.check(50, 500, 10, of_tenant=(50, 500))
    with pytest.raises(OverloadedError, match="400 of your prompt tokens"):
        policy.check(4, 400, 201, of_tenant=(4, 400))
    policy.check(50, 500, 500)  # somebody else's first, or nobody's


def test_policy_sends_callers_away_for_as_long_as_the_queue_takes_to_drain() -> None:
    policy = AdmissionPolicy(2, 10_000)
    for _ in range(20):
        policy.record(100, 0.5)
    assert _retry_after_s(policy, 1000) == pytest.approx(5.0)


def test_policy_follows_a_changing_pace() -> None:
    policy = AdmissionPolicy(2, 10_000)
    for _ in range(200):
        policy.record(100, 0.5)
    for _ in range(200):
        policy.record(200, 0.5)
    assert _retry_after_s(policy, 1000) == pytest.approx(2.5, rel=0.01)


@pytest.mark.parametrize(("num_waiting_tokens", "retry_after_s"), [(1, 1.0), (10**9, 60.0)])
def test_policy_sends_callers_away_for_a_second_to_a_minute(
    num_waiting_tokens: int, retry_after_s: float
) -> None:
    policy = AdmissionPolicy(2, 10**10)
    policy.record(100, 1.0)
    assert _retry_after_s(policy, num_waiting_tokens) == retry_after_s


def test_policy_sends_callers_away_for_a_second_before_it_knows_the_pace() -> None:
    assert _retry_after_s(AdmissionPolicy(2, 10**10), 10**6) == 1.0


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "code"),
    [
        ([], 1, "invalid_value"),
        ([5], 0, "invalid_value"),
        ([5] * 4, 1, "context_length_exceeded"),
    ],
)
def test_request_that_cannot_be_served_even_alone_is_refused(
    prompt: list[int], max_tokens: int, code: str
) -> None:
    progress = RequestProgress(make_request(prompt=prompt, max_tokens=max_tokens), arrived_s=0.0)
    with pytest.raises(InvalidRequestError) as caught:
        check_servable(progress, longest=4)
    assert caught.value.code == code
    assert caught.value.param in ("prompt", "max_tokens")


def test_prompt_that_leaves_room_for_one_token_is_served() -> None:
    check_servable(_progress(0, num_tokens=3), longest=4)
