"""Drafts of an EAGLE head against plain torch: chunks, verification, images, shared pages."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import msgspec
import pictures
import pytest
import torch
from eagle_oracle import EagleOracle, write_fp8_head
from eagle_rig import EagleRig
from model_rig import load_image_oracle, load_oracle, make_progress, oracle_image_states

from ostro.actors.engine.followed_text import packed
from ostro.actors.engine.request import RequestProgress, RequestState
from ostro.actors.model.random_checkpoint import TINY, TINY_VISION, write_random_head
from ostro.configs.model import load_model_config

NUM_DRAFTS = 3


class Pair:
    """A tiny model, a head for it, and both in plain torch."""

    def __init__(self, directory: Path) -> None:
        self.model = checkpoints.make_tiny_checkpoint(directory / "model", seed=3, num_layers=2)
        self.head = directory / "head"
        write_random_head(self.head, TINY, load_model_config(self.model), seed=4)
        self._oracle = load_oracle(self.model)

    def oracle_of(self, head: Path) -> EagleOracle:
        weights = (self._oracle.model.embed_tokens.weight, self._oracle.lm_head.weight)
        return EagleOracle(head, *(weight.detach() for weight in weights))

    @torch.no_grad()
    def drafts(
        self, progress: RequestProgress, num_drafts: int, head: Path | None = None
    ) -> list[int]:
        """What the head drafts after the known tokens, of which the model has seen all but one."""
        oracle = self.oracle_of(head or self.head)
        tokens = progress.known_tokens(0, progress.num_known_tokens)
        hidden_TD = self._oracle.model(torch.tensor([tokens[:-1]])).last_hidden_state[0]
        return oracle.drafts(oracle.embed(tokens[1:]), hidden_TD, num_drafts)

    def check(self, requests: Sequence[RequestProgress], num_drafts: int = NUM_DRAFTS) -> None:
        """Each has the oracle's drafts."""
        for progress in requests:
            assert progress.draft_token_ids == self.drafts(progress, num_drafts)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    torch.set_num_threads(1)
    return Pair(tmp_path_factory.mktemp("pair"))


def some_tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(13, 1000, (count,), generator=generator).tolist()


@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("chunk", [1, 7, 30])
def test_drafts_after_a_prompt_are_the_oracles_for_every_chunking(
    pair: Pair, chunk: int, num_micro_batches: int
) -> None:
    rig = EagleRig(pair.model, pair.head, page_size=8, num_micro_batches=num_micro_batches)
    progress = make_progress("r", some_tokens(30, 1))
    while (left := 30 - progress.num_computed_tokens) > chunk:
        rig.advance([(progress, chunk)], NUM_DRAFTS)
        assert bool(progress.draft_token_ids) == (left - chunk == 1)
    rig.advance([(progress, left)], NUM_DRAFTS, tokens=[[77]])
    pair.check([progress])


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_drafts_of_mixed_steps_are_the_oracles(pair: Pair, num_micro_batches: int) -> None:
    """Prompts of several lengths, one still under way, steps that verify, over page boundaries."""
    rig = EagleRig(pair.model, pair.head, page_size=4, num_micro_batches=num_micro_batches)
    a, b, c = (make_progress(str(n), some_tokens(n, n)) for n in (9, 3, 40))
    rig.advance([(a, 9), (b, 3), (c, 11)], NUM_DRAFTS, tokens=[[5], [6], []])
    pair.check([a, b])
    assert c.draft_token_ids == []
    # All of a's drafts are right; of b's the second is wrong; c goes on with its prompt.
    rig.advance(
        [(a, 1), (b, 1), (c, 13)],
        NUM_DRAFTS,
        drafts=[[21, 22, 23], [31, 32, 33], []],
        tokens=[[21, 22, 23, 24], [31, 99], []],
    )
    pair.check([a, b])
    # None of a's is right; b has none; c's prompt ends.
    rig.advance(
        [(a, 1), (b, 1), (c, 16)],
        NUM_DRAFTS,
        drafts=[[41, 42, 43], [], []],
        tokens=[[51], [52], [53]],
    )
    pair.check([a, b, c])
    for step in range(4):
        rig.advance([(a, 1), (b, 1), (c, 1)], NUM_DRAFTS, tokens=[[60 + step]] * 3)
    pair.check([a, b, c])


@pytest.mark.parametrize("seed", range(4))
def test_drafts_of_random_steps_are_the_oracles(pair: Pair, seed: int) -> None:
    """Requests come one after the other; each step takes any of them, by any number of tokens."""
    draw = random.Random(seed)
    rig = EagleRig(pair.model, pair.head, page_size=4, num_micro_batches=draw.choice([1, 2]))
    requests: list[RequestProgress] = []
    for _ in range(14):
        if len(requests) < 4:
            requests.append(make_progress(str(len(requests)), some_tokens(draw.randint(1, 20), 5)))
        taken = draw.sample(requests, draw.randint(1, len(requests)))
        parts, tokens, drafts = [], [], []
        for progress in taken:
            left = progress.num_known_tokens - progress.num_computed_tokens
            count = draw.randint(1, left)
            verified = some_tokens(draw.randint(0, 3), draw.randint(0, 99)) if left == 1 else []
            accepted = verified[: draw.randint(0, len(verified))]
            parts.append((progress, count))
            drafts.append(verified)
            tokens.append([*accepted, draw.randint(13, 999)] if count == left else [])
        num_drafts = draw.randint(0, 4)
        rig.advance(parts, num_drafts, tokens=tokens, drafts=drafts)
        for progress in taken:
            decodes = progress.num_known_tokens - progress.num_computed_tokens == 1
            if decodes and num_drafts:
                pair.check([progress], num_drafts)
            else:
                assert progress.draft_token_ids == []


@pytest.mark.parametrize("num_drafts", [1, 2, 7])
def test_any_number_of_drafts_are_the_oracles(pair: Pair, num_drafts: int) -> None:
    rig = EagleRig(pair.model, pair.head, page_size=4)
    progress = make_progress("r", some_tokens(14, 2))
    rig.advance([(progress, 14)], num_drafts, tokens=[[8]])
    pair.check([progress], num_drafts)


def test_the_head_takes_note_of_steps_that_ask_for_no_drafts(pair: Pair) -> None:
    rig = EagleRig(pair.model, pair.head, page_size=4)
    progress = make_progress("r", some_tokens(14, 3))
    rig.advance([(progress, 14)], 0, tokens=[[8]])
    for token in (9, 10, 11):
        rig.advance([(progress, 1)], 0, tokens=[[token]])
        assert progress.draft_token_ids == []
    rig.advance([(progress, 1)], NUM_DRAFTS, tokens=[[12]])
    pair.check([progress])


def test_without_pages_there_are_as_many_drafts_as_have_room(pair: Pair) -> None:
    rig = EagleRig(pair.model, pair.head, page_size=8)
    progress = make_progress("r", some_tokens(4, 4))
    progress.pages.append(3)
    rig.may_grow = False
    for num_known, token in enumerate((20, 21, 22, 23), start=5):
        uncomputed = progress.num_known_tokens - progress.num_computed_tokens
        rig.advance([(progress, uncomputed)], NUM_DRAFTS, tokens=[[token]])
        assert progress.draft_token_ids == pair.drafts(progress, min(NUM_DRAFTS, 8 - num_known))


def test_requests_with_different_room_share_the_steps_of_the_head(pair: Pair) -> None:
    rig = EagleRig(pair.model, pair.head, page_size=8)
    requests = [make_progress(str(n), some_tokens(n, n)) for n in (4, 6, 2, 8)]
    rooms = [3, 1, 7, 0]
    for progress, room in zip(requests, rooms, strict=True):
        progress.max_num_tokens = progress.num_prompt_tokens + 1 + room + 1
    parts = [(progress, progress.num_prompt_tokens) for progress in requests]
    rig.advance(parts, 7, tokens=[[70], [71], [72], [73]])
    for progress, room in zip(requests, rooms, strict=True):
        assert progress.draft_token_ids == pair.drafts(progress, room)


def test_requests_that_ended_or_lost_their_pages_get_no_drafts(pair: Pair) -> None:
    rig = EagleRig(pair.model, pair.head)
    requests = [make_progress(str(n), some_tokens(5, n)) for n in range(3)]
    rig.advance([(one, 5) for one in requests], 0, tokens=[[7]] * 3)
    asked: list[str] = []
    grow = rig.grow

    def lose_some(progress: RequestProgress, num_tokens: int) -> bool:
        asked.append(progress.request_id)
        return grow(progress, num_tokens)

    rig.drafter._grow = lose_some
    requests[0].move_to(RequestState.FINISHED)
    requests[1].move_to(RequestState.PREEMPTED)
    rig.advance([(one, 1) for one in requests], NUM_DRAFTS, tokens=[[9]] * 3)
    assert asked == ["2"]
    assert [one.draft_token_ids for one in requests[:2]] == [[], []]
    pair.check(requests[2:])


def test_the_head_guesses_nothing_while_a_prediction_is_followed(pair: Pair) -> None:
    rig = EagleRig(pair.model, pair.head)
    plain, predicted = (make_progress(str(n), some_tokens(6, n)) for n in range(2))
    text = some_tokens(20, 2)
    predicted.request = msgspec.structs.replace(predicted.request, prediction=packed(text))
    rig.advance([(plain, 6), (predicted, 6)], NUM_DRAFTS, tokens=[[7], text[:1]])
    pair.check([plain])
    assert predicted.draft_token_ids == []
    rig.advance([(plain, 1), (predicted, 1)], NUM_DRAFTS, tokens=[[7], [7]])  # it goes elsewhere
    pair.check([plain, predicted])


def test_a_request_that_was_cancelled_within_its_step_does_no_harm(pair: Pair) -> None:
    """Its last token is known to nobody."""
    rig = EagleRig(pair.model, pair.head)
    gone, stays = (make_progress(str(n), some_tokens(n, n)) for n in (5, 6))
    rig.advance([(gone, 5), (stays, 6)], 0, tokens=[[7], [8]])
    gone.move_to(RequestState.FINISHED)
    rig.advance([(gone, 1), (stays, 1)], NUM_DRAFTS, tokens=[[], [9]])
    pair.check([stays])


def test_a_prefix_that_another_request_computed_serves_the_head_too(pair: Pair) -> None:
    rig = EagleRig(pair.model, pair.head, page_size=4)
    shared = some_tokens(13, 6)
    first = make_progress("first", [*shared, 500, 501])
    rig.advance([(first, 15)], NUM_DRAFTS, tokens=[[7]])
    second = make_progress("second", [*shared, 600, 601, 602])
    second.pages = array("i", first.pages[:3])
    second.num_computed_tokens = 12
    rig.advance([(second, 4), (first, 1)], NUM_DRAFTS, tokens=[[8], [9]])
    pair.check([first, second])


def test_a_page_end_that_was_followed_by_another_token_costs_drafts_alone(pair: Pair) -> None:
    """The last place of a shared page may stand for a token that came next to somebody else."""
    rig = EagleRig(pair.model, pair.head, page_size=4)
    shared = some_tokens(12, 7)
    first = make_progress("first", [*shared, 500, 501])
    rig.advance([(first, 14)], NUM_DRAFTS, tokens=[[7]])
    second = make_progress("second", [*shared, 600, 601])
    second.pages = array("i", first.pages[:3])
    second.num_computed_tokens = 12
    rig.advance([(second, 2)], NUM_DRAFTS, tokens=[[8]])
    assert len(second.draft_token_ids) == NUM_DRAFTS
    assert all(0 <= token < 1024 for token in second.draft_token_ids)


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_drafts_of_heads_as_they_are_published_are_the_oracles(
    pair: Pair, kind: str, tmp_path: Path
) -> None:
    head = tmp_path / "head"
    config = load_model_config(pair.model)
    if kind == "fp8":
        write_fp8_head(pair.head, head)
    else:
        write_random_head(head, replace(TINY, dtype="bfloat16"), config, num_layers=1)
    rig = EagleRig(pair.model, head)
    progress = make_progress("r", some_tokens(21, 8))
    rig.advance([(progress, 21)], NUM_DRAFTS, tokens=[[8]])
    assert progress.draft_token_ids == pair.drafts(progress, NUM_DRAFTS, head)


# Text between and around images; 12 is text that looks like a line's end.
TOKENS, IMAGES = pictures.prompt_of(
    [
        *(1, 100, 101, 12),
        pictures.make_image(84, 56, seed=1),
        *(103, 104),
        pictures.make_image(28, 112, seed=2),
        pictures.make_image(28, 28, seed=3),
        *(105, 106),
    ]
)


@pytest.fixture(scope="module")
def with_images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[int]]:
    """A model that takes images, a head for it, and the oracle's drafts after the prompt and 7."""
    directory = tmp_path_factory.mktemp("images")
    model = checkpoints.make_tiny_checkpoint(directory / "model", num_layers=2, vision=TINY_VISION)
    head = directory / "head"
    write_random_head(head, TINY, load_model_config(model), seed=4)
    oracle: Any = load_image_oracle(model)
    embedded_TD, hidden_TD = oracle_image_states(oracle, TOKENS, IMAGES)
    embed_VD = oracle.model.language_model.embed_tokens.weight.detach()
    eagle = EagleOracle(head, embed_VD, oracle.lm_head.weight.detach())
    following_TD = torch.cat((embedded_TD[1:], eagle.embed([7])))
    return model, head, eagle.drafts(following_TD, hidden_TD, NUM_DRAFTS)


@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("chunk", [1, 4, 5, len(TOKENS)])
def test_images_stand_in_the_place_of_their_tokens(
    with_images: tuple[Path, Path, list[int]], chunk: int, num_micro_batches: int
) -> None:
    model, head, expected = with_images
    rig = EagleRig(model, head, page_size=4, num_micro_batches=num_micro_batches)
    progress = make_progress("r", TOKENS, images=IMAGES)
    other = make_progress("other", some_tokens(3, 1))
    rig.advance([(other, 3)], 0, tokens=[[5]])
    while (left := len(TOKENS) - progress.num_computed_tokens) > chunk:
        rig.advance([(other, 1), (progress, chunk)], 0, tokens=[[6], []])
    rig.advance([(other, 1), (progress, left)], NUM_DRAFTS, tokens=[[6], [7]])
    assert progress.draft_token_ids == expected
