"""Requests take, share, publish and give back pages."""

from __future__ import annotations

import pytest
from engine_fakes import make_fake_image, make_request

from ostro.actors.engine.page_pool import PageLeakError
from ostro.actors.engine.request import RequestProgress
from ostro.actors.engine.request_pages import RequestPages
from ostro.actors.engine.step import ScheduledRequest, ScheduledStep


def _progress(num_tokens: int, *, salt: str = "") -> RequestProgress:
    request = make_request(prompt=range(5, 5 + num_tokens), cache_salt=salt)
    return RequestProgress(request, arrived_s=0.0)


def _computed(pages: RequestPages, num_tokens: int) -> RequestProgress:
    progress = _progress(num_tokens)
    assert pages.grow(progress, num_tokens)
    pages.publish(progress, num_tokens)
    return progress


def test_pages_are_taken_as_tokens_need_them() -> None:
    pages = RequestPages(4, 2, prefix_cache=True)
    progress = _progress(5)
    assert pages.missing(progress, 5) == 3
    assert pages.grow(progress, 5)
    assert pages.missing(progress, 6) == 0
    assert not pages.grow(progress, 9)
    assert len(progress.pages) == 3


def test_prefix_is_shared_while_its_first_holder_still_runs() -> None:
    pages = RequestPages(8, 2, prefix_cache=True)
    first, second = _computed(pages, 5), _progress(7)
    assert pages.adopt(second) == 4
    assert second.pages == first.pages[:2]
    pages.check([first, second])


def test_last_known_token_is_always_left_to_compute() -> None:
    pages = RequestPages(8, 2, prefix_cache=True)
    _computed(pages, 4)
    assert pages.adopt(_progress(4)) == 2


def test_pages_of_an_image_are_shared_with_the_same_image_only() -> None:
    pages = RequestPages(16, 2, prefix_cache=True)
    same, again, other = (
        RequestProgress(
            make_request(prompt=range(5, 15), images=(make_fake_image(4, 4, mark),)), arrived_s=0.0
        )
        for mark in (1, 1, 2)
    )
    assert pages.grow(same, 10)
    pages.publish(same, 10)
    assert pages.adopt(again) == 8
    assert pages.adopt(other) == 4


def test_prefix_is_not_shared_between_salts() -> None:
    pages = RequestPages(8, 2, prefix_cache=True)
    _computed(pages, 4)
    assert pages.adopt(_progress(5, salt="other")) == 0


def test_nothing_is_shared_when_the_prefix_cache_is_off() -> None:
    pages = RequestPages(8, 2, prefix_cache=False)
    _computed(pages, 4)
    assert pages.adopt(_progress(5)) == 0
    assert pages.changes() == ([], [])


def test_page_of_a_token_that_nobody_knows_is_not_published() -> None:
    pages = RequestPages(8, 2, prefix_cache=True)
    progress = _progress(3)
    assert pages.grow(progress, 4)
    pages.publish(progress, 4)
    assert len(pages.changes()[0]) == 1


def test_pages_are_published_once_each_as_they_fill() -> None:
    pages = RequestPages(8, 2, prefix_cache=True)
    progress = _progress(7)
    assert pages.grow(progress, 7)
    counts = []
    for num_computed in range(1, 8):
        pages.publish(progress, num_computed)
        counts.append(len(pages.changes()[0]))
    assert counts == [0, 1, 0, 1, 0, 1, 0]


def test_steps_in_flight_keep_the_pages_they_were_given() -> None:
    pages = RequestPages(8, 2, prefix_cache=True)
    progress = _computed(pages, 4)
    given = progress.pages
    pages.release(progress)
    assert not progress.pages
    assert len(given) == 2


def test_a_new_owner_finds_what_completed_steps_wrote_and_nothing_else() -> None:
    pages = RequestPages(8, 2, prefix_cache=True)
    served = _computed(pages, 5)
    in_flight = ScheduledStep(0, 0.0)
    in_flight.entries.append(ScheduledRequest(served, 2, 2, [7, 8], served.pages, False))
    pages.changes()
    pages.hand_over([served], [in_flight])
    again = _progress(5)
    assert pages.adopt(again) == 2
    added, dropped = pages.changes()
    assert (len(added), dropped) == (1, [])
    pages.release(again)
    assert pages.pool.num_free == 8


def test_pages_that_somebody_holds_are_not_handed_over() -> None:
    pages = RequestPages(8, 2, prefix_cache=True)
    _computed(pages, 3)
    with pytest.raises(PageLeakError):
        pages.hand_over([], [])
