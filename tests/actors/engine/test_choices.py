"""One request per choice: names, numbers and seeds."""

from __future__ import annotations

import msgspec
import pytest
from engine_fakes import make_fake_image, make_request

from ostro.actors.engine.choice_seed import choice_seed
from ostro.actors.engine.choices import (
    callers_id,
    choice_ids,
    each_choice,
    submission_of,
    unique_id,
)


def test_each_choice_differs_in_id_number_and_seed_alone() -> None:
    image = make_fake_image(0, 2, 1)
    request = msgspec.structs.replace(
        make_request("mine#i-7.6", images=(image,)), choice=6, num_choices=3
    )
    first, second, third = choices = each_choice(request)
    assert [choice.request_id for choice in choices] == ["mine#i-7.6", "mine#i-7.7", "mine#i-7.8"]
    assert [choice.choice for choice in choices] == [6, 7, 8]
    assert first.sampling == request.sampling
    assert len({choice.sampling.seed for choice in choices}) == 3
    assert all(choice.num_choices == 1 for choice in choices)
    assert second.images[0] is third.images[0] is image
    assert choice_ids(request) == [choice.request_id for choice in choices]


def test_a_single_choice_is_the_request_itself() -> None:
    request = make_request("a")
    (only,) = each_choice(request)
    assert only is request
    assert request.counted_prompt_tokens == len(request.prompt_token_ids)


def test_choices_count_their_prompt_once_between_them() -> None:
    request = msgspec.structs.replace(make_request("a#1.0", range(12)), num_choices=4)
    assert [choice.counted_prompt_tokens for choice in each_choice(request)] == [3] * 4


def test_seeds_of_choices_are_fixed_and_do_not_overlap_with_the_next_seeds() -> None:
    assert choice_seed(7, 0) == 7
    assert choice_seed(7, 1) == choice_seed(7, 1)
    drawn = [choice_seed(seed, index) for seed in range(100) for index in range(16)]
    assert len(set(drawn)) == len(drawn)
    assert all(0 <= seed < 2**63 for seed in drawn)


@pytest.mark.parametrize("request_id", ["mine", "a.b", "a#b", "a#1.0", "#"])
def test_names_lead_back_to_submission_and_caller(request_id: str) -> None:
    names = [unique_id(request_id, "replica-3", choice) for choice in range(2)]
    assert len(set(names)) == 2
    assert len({submission_of(name) for name in names}) == 1
    assert {callers_id(name) for name in names} == {request_id}
    assert callers_id(submission_of(names[0])) == request_id


def test_names_that_are_not_ours_stay_as_they_are() -> None:
    assert submission_of("chat-1.5") == callers_id("chat-1.5") == "chat-1.5"
