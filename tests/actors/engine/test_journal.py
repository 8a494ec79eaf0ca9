"""The journal gives back what it takes to go on with a request."""

from __future__ import annotations

import pytest
from engine_fakes import make_request

from ostro.actors.engine.journal import Journal
from ostro.actors.errors import InvalidRequestError, NotFoundError, OverloadedError


def test_journal_replays_a_request_with_its_output() -> None:
    journal = Journal(max_entries=4)
    journal.add(request := make_request("a"), rank=1)
    journal.record("a", [5])
    journal.record("a", [6, 7])
    assert journal.replay("a") == (request, [5, 6, 7])


def test_journal_gives_a_copy_that_later_tokens_do_not_reach() -> None:
    journal = Journal(max_entries=4)
    journal.add(make_request("a"), rank=1)
    _, output = journal.replay("a")
    journal.record("a", [5])
    assert output == []


def test_journal_knows_the_requests_of_a_rank() -> None:
    journal = Journal(max_entries=4)
    for request_id, rank in (("a", 0), ("b", 1), ("c", 0)):
        journal.add(make_request(request_id), rank)
    assert journal.entries_of(0) == ["a", "c"]
    journal.move("a", 1)
    assert journal.entries_of(0) == ["c"]
    assert journal.rank_of("a") == 1


def test_journal_drops_tokens_that_come_after_the_end() -> None:
    journal = Journal(max_entries=4)
    journal.add(make_request("a"), rank=0)
    journal.forget("a")
    journal.forget("a")
    journal.record("a", [5])
    assert "a" not in journal
    with pytest.raises(NotFoundError, match="'a'"):
        journal.replay("a")


def test_journal_is_bounded() -> None:
    journal = Journal(max_entries=1)
    journal.add(make_request("a"), rank=0)
    with pytest.raises(OverloadedError):
        journal.add(make_request("b"), rank=0)
    journal.forget("a")
    journal.add(make_request("b"), rank=0)
    assert len(journal) == 1


def test_journal_refuses_an_id_in_use() -> None:
    journal = Journal(max_entries=4)
    journal.add(make_request("a"), rank=0)
    with pytest.raises(InvalidRequestError) as caught:
        journal.add(make_request("a"), rank=1)
    assert (caught.value.code, caught.value.param) == ("duplicate_request_id", "request_id")
