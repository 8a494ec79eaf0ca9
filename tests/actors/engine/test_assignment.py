"""Placement of requests on attention shards."""

import msgspec
from engine_fakes import make_fake_image

from ostro.actors.engine.assignment import Assigner
from ostro.actors.engine.prefix_cache import page_hashes
from ostro.actors.engine.request import GenerationRequest, SamplingParams, StopParams


def request(name, tokens):
    return GenerationRequest(
        request_id=name,
        prompt_token_ids=tokens,
        sampling=SamplingParams(),
        stop=StopParams(max_tokens=4),
    )


def test_assigner_takes_the_least_loaded_shard_when_nothing_is_cached():
    assigner = Assigner([0, 1], page_size=4)
    assigner.add(0, request("a", list(range(10))))
    assert assigner.ranked(request("b", [1, 2, 3]))[0] == 1


def test_assigner_spreads_requests_that_all_share_a_prefix():
    assigner = Assigner([0, 1], page_size=4)
    shared = [1, 2, 3, 4]
    assigner.cache_changed(0, page_hashes(shared, 4, ""), [])
    placed = []
    for index in range(10):
        wanted = request(f"r{index}", [*shared, *range(100, 120)])
        placed.append(assigner.ranked(wanted)[0])
        assigner.add(placed[-1], wanted)
    assert sorted(placed) == [0] * 5 + [1] * 5


def test_assigner_prefers_the_longest_cached_prefix_at_equal_load():
    assigner = Assigner([0, 1, 2], page_size=4)
    prompt = list(range(12))
    hashes = page_hashes(prompt, 4, "")
    assigner.cache_changed(1, hashes[:1], [])
    assigner.cache_changed(2, hashes[:2], [])
    assert assigner.ranked(request("b", prompt))[0] == 2
    assigner.cache_changed(2, [], hashes[:1])
    assert assigner.ranked(request("b", prompt))[0] == 1


def test_assigner_does_not_share_prefixes_between_salts():
    assigner = Assigner([0, 1], page_size=4)
    prompt = list(range(8))
    assigner.cache_changed(1, page_hashes(prompt, 4, "tenant"), [])
    assert assigner.ranked(request("b", prompt))[0] == 0


def test_assigner_counts_load_until_a_request_ends():
    assigner = Assigner([0, 1], page_size=4)
    assigner.add(0, request("a", [1] * 5))
    assert assigner.waiting(0) == (1, 5)
    assigner.grow(0, "a", 1)
    assert assigner.waiting(0) == (0, 0)
    assigner.remove(0, "a")
    assigner.add(1, request("b", [1]))
    assert assigner.ranked(request("c", [1]))[0] == 0


def test_assigner_goes_by_what_is_on_an_image():
    assigner = Assigner([0, 1], page_size=4)
    cat, dog = (
        msgspec.structs.replace(request(name, [5] * 12), images=(make_fake_image(2, 9, mark),))
        for name, mark in (("cat", 1), ("dog", 2))
    )
    assigner.cache_changed(0, page_hashes(cat.prompt_token_ids, 4, "", cat.images), [])
    assigner.cache_changed(1, page_hashes(dog.prompt_token_ids, 4, "", dog.images), [])
    assert (assigner.ranked(cat)[0], assigner.ranked(dog)[0]) == (0, 1)


def test_assigner_counts_pixels_of_live_requests():
    assigner = Assigner([0, 1], page_size=4)
    image = msgspec.structs.replace(make_fake_image(0, 4, 1), pixels=bytes(100))
    assigner.add(0, msgspec.structs.replace(request("a", [5] * 12), images=(image, image)))
    assigner.add(0, request("b", [5] * 12))
    assert (assigner.live_image_bytes(0), assigner.live_image_bytes(1)) == (200, 0)
    assigner.remove(0, "a")
    assert assigner.live_image_bytes(0) == 0
