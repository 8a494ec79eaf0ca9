"""Who watches the router: one that was made anew learns the keys, then takes over."""

from __future__ import annotations

import logging

import pytest
from wait_for import wait_for

from ostro.actors.errors import NotReadyError
from ostro.cluster.router_watch import watched_router


class DyingRouter:
    """A router that is started, until the test says that it died."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.started = True
        self.failures: list[NotReadyError] = []
        self.num_looks = 0

    def is_started(self) -> bool:
        self.num_looks += 1
        if self.failures:
            raise self.failures.pop()
        return self.started

    def resume(self) -> None:
        self.calls.append("resume")
        self.started = True

    def publish_keys(self) -> None:
        self.calls.append("keys")


def looked_at(router: DyingRouter) -> None:
    seen = router.num_looks
    wait_for(lambda: router.num_looks > seen + 1)


def test_a_router_that_was_made_anew_learns_the_keys_and_resumes_once() -> None:
    router = DyingRouter()
    with watched_router(router, router.publish_keys, poll_s=0.01):
        looked_at(router)
        assert router.calls == []
        router.started = False
        wait_for(lambda: "resume" in router.calls)
        looked_at(router)
    assert router.calls == ["keys", "resume"]


def test_a_router_that_cannot_be_reached_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ostro.cluster.router_watch")
    router = DyingRouter()
    router.started = False
    router.failures = [NotReadyError("it is being made"), NotReadyError("it is being made")]
    with watched_router(router, router.publish_keys, poll_s=0.01):
        wait_for(lambda: "resume" in router.calls)
    assert caplog.text.count("it is being made") == 2


def test_keys_that_cannot_be_published_hold_the_router_back() -> None:
    """It would let no caller in, or those without a quota."""
    router, refusals = DyingRouter(), [NotReadyError("busy")]
    router.started = False

    def publish_keys() -> None:
        if refusals:
            raise refusals.pop()
        router.publish_keys()

    with watched_router(router, publish_keys, poll_s=0.01):
        wait_for(lambda: "resume" in router.calls)
    assert router.calls == ["keys", "resume"]


def test_an_error_that_nobody_expected_does_not_end_the_watch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    router = DyingRouter()
    router.started = False
    failures = [OSError("the keys cannot be read")]

    def publish_keys() -> None:
        if failures:
            raise failures.pop()
        router.publish_keys()

    with watched_router(router, publish_keys, poll_s=0.01):
        wait_for(lambda: "resume" in router.calls)
    assert router.calls == ["keys", "resume"]
    assert "the keys cannot be read" in caplog.text
