"""What the door writes down of whom it did not let in."""

from __future__ import annotations

import json
import logging

from door_keys import GENERATE, make_door

from ostro.actors.errors import UnauthenticatedError
from ostro.cluster.access import ANY_KEY
from ostro.cluster.door import Call


def test_strangers_do_not_push_out_what_others_did(caplog):
    caplog.set_level(logging.INFO, logger="ostro.audit")
    now_s = [1000.0]
    door = make_door(clock=lambda: now_s[0])

    def visit(key: str) -> None:
        call = Call(request_id="", route="GET /v1/models", client="")
        try:
            door.let_in(call, key, ANY_KEY)
        except UnauthenticatedError:
            call.status = 401
        door.close(call)

    for _ in range(5000):
        visit("ostro-guessed")
    for _ in range(1000):
        visit(GENERATE)
    now_s[0] += 0.15
    visit("ostro-guessed")
    visit("ostro-guessed")
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [line["tenant"] for line in lines] == [""] * 600 + ["acme"] * 1000 + [""]
    assert [line["left_out"] for line in lines if "left_out" in line] == [4400]
    assert lines[600]["left_out"] == 4400
