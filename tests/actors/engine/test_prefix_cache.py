"""Full pages are found again by content, shared, and forgotten when their page is taken."""

from __future__ import annotations

from hashlib import blake2b
from struct import pack

import pytest
from engine_fakes import make_fake_image, make_request, seen_tokens
from hypothesis import given
from hypothesis import strategies as st

from ostro.actors.engine.page_pool import PageLeakError, PagePool
from ostro.actors.engine.prefix_cache import PrefixCache, extend_page_hashes, page_hashes
from ostro.actors.engine.request import GenerationRequest


def _cached(pool: PagePool, cache: PrefixCache, hashes: list[int]) -> list[int]:
    pages = pool.allocate(len(hashes))
    assert pages is not None
    for page_hash, page in zip(hashes, pages, strict=True):
        assert cache.insert(page_hash, page)
    pool.release(pages)
    return pages


def test_page_hash_covers_parent_salt_and_tokens() -> None:
    first = blake2b(bytes(8) + b"salt" + pack("<2I", 5, 6), digest_size=8).digest()
    second = blake2b(first + b"salt" + pack("<2I", 7, 131071), digest_size=8).digest()
    assert page_hashes([5, 6, 7, 131071, 9], 2, "salt") == [
        int.from_bytes(first, "little"),
        int.from_bytes(second, "little"),
    ]


def test_page_hashes_differ_from_the_first_different_token_on() -> None:
    one, other = page_hashes(range(8), 2, ""), page_hashes([0, 1, 2, 9, 4, 5, 6, 7], 2, "")
    assert [a == b for a, b in zip(one, other, strict=True)] == [True, False, False, False]


def test_page_hashes_differ_between_salts() -> None:
    assert page_hashes([1, 2], 2, "a") != page_hashes([1, 2], 2, "b")


def test_page_hashes_leave_out_a_page_that_is_not_full() -> None:
    assert len(page_hashes([1, 2, 3], 2, "")) == 1
    assert page_hashes([1], 2, "") == []


def test_page_hashes_differ_from_the_page_where_another_image_begins() -> None:
    tokens = [1, 5, 5, 5, 5, 5, 2, 2]
    one, other = (page_hashes(tokens, 2, "", [make_fake_image(3, 3, mark=mark)]) for mark in (1, 2))
    assert [a == b for a, b in zip(one, other, strict=True)] == [True, False, False, False]
    assert one == page_hashes(tokens, 2, "", [make_fake_image(3, 3, mark=1)])
    assert one[1:] != page_hashes(tokens, 2, "")[1:]


def test_page_hashes_tell_where_an_image_begins() -> None:
    one, other = (page_hashes([5] * 4, 4, "", [make_fake_image(s, 2, mark=1)]) for s in (1, 2))
    assert one != other


# (tokens before it, mark); equal digests mean equal shapes, so a mark fixes the tokens.
_IMAGES = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), max_size=4)
_NUM_TOKENS = (0, 2, 5, 5)


@given(_IMAGES, _IMAGES, st.integers(1, 5))
def test_pages_are_shared_exactly_where_tokens_and_images_are_the_same(
    one: list[tuple[int, int]], other: list[tuple[int, int]], page_size: int
) -> None:
    """Every token has the same id, so that only images tell prompts apart."""
    hashes, seen = [], []
    for spans in (one, other):
        images, free = [], 0
        for gap, mark in spans:
            images.append(make_fake_image(free + gap, _NUM_TOKENS[mark], mark))
            free += gap + _NUM_TOKENS[mark]
        request = make_request(prompt=[5] * 32, images=tuple(images))
        hashes.append(page_hashes(request.prompt_token_ids, page_size, "", images))
        seen.append(_with_starts(request, seen_tokens(request, request.prompt_token_ids)))
    for index, (a, b) in enumerate(zip(*hashes, strict=True)):
        end = (index + 1) * page_size
        assert (a == b) == (seen[0][:end] == seen[1][:end])


def _with_starts(request: GenerationRequest, seen: list[int]) -> list[tuple[int, int]]:
    """Each token with the place in its image, so that two images side by side are not one."""
    places = [0] * len(seen)
    for image in request.images:
        for offset in range(image.num_tokens):
            places[image.start + offset] = offset
    return list(zip(seen, places, strict=True))


@given(
    st.lists(st.integers(0, 2**32 - 1), max_size=40),
    st.integers(1, 5),
    st.integers(0, 8),
    st.text(max_size=3),
)
def test_page_hashes_can_be_extended_page_by_page(
    tokens: list[int], page_size: int, num_first: int, salt: str
) -> None:
    hashes: list[int] = []
    images = [make_fake_image(2, 3, mark=1), make_fake_image(9, 20, mark=2)]
    extend_page_hashes(hashes, tokens[: num_first * page_size], page_size, salt, images)
    extend_page_hashes(hashes, tokens[num_first * page_size :], page_size, salt, images)
    assert hashes == page_hashes(tokens, page_size, salt, images)


def test_cache_matches_the_longest_cached_prefix_and_holds_it() -> None:
    pool = PagePool(4, page_size=2)
    cache = PrefixCache(pool)
    pages = _cached(pool, cache, [11, 12])
    assert cache.match([11, 12, 13]) == pages
    assert pool.num_free == 2
    pool.check(dict.fromkeys(pages, 1))


def test_cache_matches_nothing_behind_a_gap() -> None:
    pool = PagePool(4, page_size=2)
    cache = PrefixCache(pool)
    _cached(pool, cache, [12])
    assert cache.match([11, 12]) == []


def test_cache_keeps_the_first_of_two_pages_with_one_content() -> None:
    pool = PagePool(2, page_size=2)
    cache = PrefixCache(pool)
    pages = pool.allocate(2)
    assert pages is not None
    assert cache.insert(11, pages[0])
    assert not cache.insert(11, pages[1])
    pool.release(pages)
    assert cache.match([11]) == [pages[0]]


def test_cache_forgets_a_page_that_was_handed_out_again() -> None:
    pool = PagePool(1, page_size=2)
    cache = PrefixCache(pool)
    _cached(pool, cache, [11])
    pool.allocate(1)
    assert cache.match([11]) == []
    cache.check()


def test_cache_tells_what_was_added_and_dropped_since_last_asked() -> None:
    pool = PagePool(1, page_size=2)
    cache = PrefixCache(pool)
    _cached(pool, cache, [11])
    assert cache.drain_changes() == ([11], [])
    _cached(pool, cache, [12])
    assert cache.drain_changes() == ([12], [11])
    assert cache.drain_changes() == ([], [])


def test_cache_does_not_mention_what_came_and_went_between_two_questions() -> None:
    pool = PagePool(1, page_size=2)
    cache = PrefixCache(pool)
    _cached(pool, cache, [11])
    cache.drain_changes()
    _cached(pool, cache, [12])
    _cached(pool, cache, [11])
    assert cache.drain_changes() == ([], [])


def test_cache_check_names_a_page_kept_without_a_hash() -> None:
    pool = PagePool(2, page_size=2)
    cache = PrefixCache(pool)
    pages = pool.allocate(1)
    assert pages is not None
    pool.keep(pages[0])
    with pytest.raises(PageLeakError, match=r"pages \[0\]"):
        cache.check()
