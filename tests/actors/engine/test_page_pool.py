"""Pages are handed out once, counted, kept idle for their content, and never lost."""

from __future__ import annotations

import pytest

from ostro.actors.engine.page_pool import PageLeakError, PagePool


def test_pool_hands_out_every_page_once() -> None:
    pool = PagePool(4, page_size=16)
    assert sorted((pool.allocate(3) or []) + (pool.allocate(1) or [])) == [0, 1, 2, 3]
    assert pool.num_free == 0


def test_pool_takes_nothing_when_there_are_fewer_pages_than_asked() -> None:
    pool = PagePool(2, page_size=16)
    assert pool.allocate(3) is None
    assert pool.num_free == 2


def test_pool_frees_a_page_with_its_last_reference() -> None:
    pool = PagePool(1, page_size=16)
    pages = pool.allocate(1)
    assert pages is not None
    pool.acquire(pages[0])
    pool.release(pages)
    assert pool.num_free == 0
    pool.release(pages)
    assert pool.num_free == 1


def test_pool_evicts_the_longest_unused_page_and_the_end_of_a_chain_first() -> None:
    pool = PagePool(4, page_size=16)
    evicted: list[int] = []
    pool.watch_evictions(evicted.append)
    first, second = pool.allocate(2), pool.allocate(2)
    assert first is not None
    assert second is not None
    for page in (*first, *second):
        pool.keep(page)
    pool.release(second)
    pool.release(first)
    pool.allocate(3)
    assert evicted == [second[1], second[0], first[1]]


def test_pool_prefers_free_pages_to_idle_ones() -> None:
    pool = PagePool(2, page_size=16)
    evicted: list[int] = []
    pool.watch_evictions(evicted.append)
    pages = pool.allocate(2)
    assert pages is not None
    pool.keep(pages[0])
    pool.release(pages)
    assert pool.allocate(1) == [pages[1]]
    assert evicted == []


def test_pool_gives_an_idle_page_back_to_one_who_acquires_it() -> None:
    pool = PagePool(1, page_size=16)
    pages = pool.allocate(1)
    assert pages is not None
    pool.keep(pages[0])
    pool.release(pages)
    pool.acquire(pages[0])
    assert pool.num_free == 0
    pool.check({pages[0]: 1})


def test_pool_refuses_a_release_too_many() -> None:
    pool = PagePool(1, page_size=16)
    pages = pool.allocate(1)
    assert pages is not None
    pool.release(pages)
    with pytest.raises(PageLeakError, match="page 0 was released more often"):
        pool.release(pages)


def test_pool_check_names_a_page_that_nobody_holds_any_more() -> None:
    pool = PagePool(3, page_size=16)
    pool.allocate(2)
    with pytest.raises(PageLeakError, match="page 1: 1 references counted, 0 held"):
        pool.check({0: 1})


def test_pool_check_names_a_page_with_more_holders_than_references() -> None:
    pool = PagePool(3, page_size=16)
    pool.allocate(1)
    with pytest.raises(PageLeakError, match="page 0: 1 references counted, 2 held"):
        pool.check({0: 2})
