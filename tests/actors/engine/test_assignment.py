"""Placement of requests on attention shards."""

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
    assert assigner.choose(request("b", [1, 2, 3])) == 1


def test_assigner_prefers_the_longest_cached_prefix_over_load():
    assigner = Assigner([0, 1, 2], page_size=4)
    prompt = list(range(12))
    hashes = page_hashes(prompt, 4, "")
    assigner.cache_changed(1, hashes[:1], [])
    assigner.cache_changed(2, hashes[:2], [])
    assigner.add(2, request("a", list(range(100, 200))))
    assert assigner.choose(request("b", prompt)) == 2
    assigner.cache_changed(2, [], hashes[:1])
    assert assigner.choose(request("b", prompt)) == 1


def test_assigner_does_not_share_prefixes_between_salts():
    assigner = Assigner([0, 1], page_size=4)
    prompt = list(range(8))
    assigner.cache_changed(1, page_hashes(prompt, 4, "tenant"), [])
    assert assigner.choose(request("b", prompt)) == 0


def test_assigner_counts_load_until_a_request_ends():
    assigner = Assigner([0, 1], page_size=4)
    assigner.add(0, request("a", [1] * 5))
    assert assigner.waiting(0) == (1, 5)
    assigner.grow(0, "a", 1)
    assert assigner.waiting(0) == (0, 0)
    assigner.remove(0, "a")
    assigner.add(1, request("b", [1]))
    assert assigner.choose(request("c", [1])) == 0
