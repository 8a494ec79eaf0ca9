"""Statistics of load tests: percentiles, token times, goodput, what a run's figures hold."""

import pytest

from ostro.cluster.bench_statistics import Failure, LoadRun, Outcome, Slo, percentile, summarize

BROKEN = Outcome(due_s=0.0, ended_s=1.0, failure=Failure("timeout", "too long"))


def answered(*arrivals_s, due_s=0.0, tokens=None):
    return Outcome(
        due_s=due_s,
        ended_s=arrivals_s[-1],
        arrivals_s=arrivals_s,
        num_output_tokens=len(arrivals_s) if tokens is None else tokens,
    )


def summary(*outcomes, slo=None, elapsed_s=4.0):
    values = summarize(LoadRun(outcomes=outcomes, elapsed_s=elapsed_s), slo or Slo())
    return {quantity: value for (quantity, _), value in values.items()}


@pytest.mark.parametrize(
    ("percent", "expected"), [(1, 1), (25, 1), (26, 2), (50, 2), (75, 3), (99, 4), (100, 4)]
)
def test_percentile_is_the_nearest_rank(percent, expected):
    assert percentile([4, 2, 1, 3], percent) == expected


def test_p99_of_a_hundred_samples_leaves_one_out():
    assert percentile(range(100), 99) == 98


@pytest.mark.parametrize(("samples", "percent"), [([], 50), ([1], 0), ([1], 101)])
def test_percentile_refuses_what_has_no_meaning(samples, percent):
    with pytest.raises(ValueError, match="percent"):
        percentile(samples, percent)


def test_first_output_counts_from_when_the_request_was_due():
    assert answered(1.5, 2.0, due_s=1.0).ttft_s() == 0.5


def test_tokens_are_spread_evenly_over_arrivals():
    outcome = answered(1.0, 2.0, 3.0, 4.0, tokens=8)
    assert outcome.gaps_s() == [1.0, 1.0, 1.0]
    assert outcome.tpot_s() == 0.5  # six tokens in the three seconds after the first two


def test_an_answer_that_comes_at_once_has_no_time_per_token():
    assert answered(1.0, tokens=9).tpot_s() is None


@pytest.mark.parametrize(
    ("outcome", "is_met"),
    [
        (answered(0.5, 0.6), True),
        (answered(0.6, 0.7), False),
        (answered(0.5, 1.0), False),
        (answered(0.5, 0.6, 1.1, tokens=30), True),
        (answered(0.4, tokens=9), True),
        (BROKEN, False),
    ],
    ids=["at the limits", "late", "slow", "fast tokens in few arrivals", "at once", "failed"],
)
def test_slo_asks_for_both_its_sides(outcome, is_met):
    assert Slo(ttft_s=0.5, itl_s=0.11).is_met(outcome) is is_met


def test_goodput_is_a_share_of_all_requests_and_a_rate_over_the_run():
    found = summary(answered(0.1, 0.2), answered(3.0, 3.1), BROKEN, BROKEN, slo=Slo(ttft_s=1.0))
    assert found["goodput share"] == 25.0
    assert found["goodput"] == 0.25


def test_summary_has_no_goodput_without_an_slo():
    assert not [name for name in summary(answered(1.0, 2.0)) if "goodput" in name]


def test_summary_counts_tokens_and_errors():
    found = summary(answered(1.0, 2.0, tokens=6), answered(1.0, 3.0, tokens=2), BROKEN)
    assert found["errors"] == 1
    assert found["output"] == 2.0
    assert found["requests"] == 0.5
    assert found["tokens per arrival"] == 2.0
    assert (found["ITL p50"], found["ITL p99"]) == (1500.0, 2000.0)


def test_summary_of_failures_alone_holds_their_number_alone():
    assert summary(BROKEN, BROKEN) == {"errors": 2.0}
