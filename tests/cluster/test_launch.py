"""Starting on a machine that is too busy: what is said, and what does not matter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray

from ostro.actors.errors import NotReadyError
from ostro.cluster import launch
from ostro.configs.load import load_deployment


def test_a_ray_that_does_not_come_up_is_told_of_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def times_out(**_: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", times_out)
    with pytest.raises(NotReadyError, match=r"is the machine busy.*timed out during startup"):
        launch._connect(load_deployment("laptop").layout)


def test_other_errors_of_ray_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(**_: object) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuses)
    with pytest.raises(ConnectionError, match="nobody there"):
        launch._connect(load_deployment("laptop").layout)


def test_a_router_too_busy_to_say_how_far_it_is_does_not_end_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = iter(["still busy", "here"])
    told: list[object] = []

    def get(_: object, timeout: float | None = None) -> object:
        if timeout is not None and (answer := next(answers)) == "still busy":
            raise ray.exceptions.GetTimeoutError(answer)
        return "state"

    polls = iter([False, True])
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: (refs if next(polls) else [], []))
    router = SimpleNamespace(state=SimpleNamespace(remote=lambda: "asked"))
    launch._wait_started(router, "started", lambda stage, state: told.append((stage, state)))
    assert told == [("load", "state")]
