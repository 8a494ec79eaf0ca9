"""What of a submission is submitted again after a failure."""

from __future__ import annotations

import msgspec
from engine_fakes import make_request

from ostro.actors.engine.choices import each_choice
from ostro.actors.engine.request import (
    FinishReason,
    GenerationRequest,
    ThinkingParams,
    TokenEvent,
)
from ostro.actors.fabric.messages import Cancel, EndThinking
from ostro.cluster.unfinished import Unfinished


def _prompts(*num_choices: int) -> list[GenerationRequest]:
    asked, first = [], 0
    for number in num_choices:
        request = make_request("mine", [1, first + 5])
        asked.append(msgspec.structs.replace(request, choice=first, num_choices=number))
        first += number
    return asked


def _brought(choice: int, *token_ids: int, finish: FinishReason | None = None) -> TokenEvent:
    return TokenEvent("", 0, list(token_ids), choice=choice, finish_reason=finish)


def test_a_submission_begins_with_whole_requests():
    asked = _prompts(2, 1)
    submits = Unfinished(asked).submits("i-1")
    assert [submit.request.request_id for submit in submits] == ["mine#i-1.0", "mine#i-1.2"]
    assert [submit.request.num_choices for submit in submits] == [2, 1]
    assert [submit.output_token_ids for submit in submits] == [None, None]


def test_what_has_not_ended_goes_on_choice_by_choice_with_its_output():
    asked = _prompts(2, 1, 1)
    unfinished = Unfinished(asked)
    first = unfinished.submits("i-1")[0].request
    unfinished.observe(_brought(1, 7))
    unfinished.observe(_brought(1, 8, 9))
    unfinished.observe(_brought(2, 7, finish=FinishReason.STOP))
    again = unfinished.submits("i-2")
    assert [(submit.request.request_id, submit.output_token_ids) for submit in again] == [
        ("mine#i-2.0", []),
        ("mine#i-2.1", [7, 8, 9]),
        ("mine#i-2.3", []),
    ]
    named = [msgspec.structs.replace(submit.request, request_id="") for submit in again[:2]]
    assert named == [
        msgspec.structs.replace(choice, request_id="") for choice in each_choice(first)
    ]


def test_what_nobody_has_let_in_begins_anew():
    unfinished = Unfinished(_prompts(2))
    unfinished.submits("i-1")
    (again,) = unfinished.submits("i-2")
    assert (again.request.num_choices, again.output_token_ids) == (2, None)


def test_a_choice_that_was_dropped_does_not_go_on():
    unfinished = Unfinished(_prompts(3))
    unfinished.was_accepted = True
    unfinished.submits("i-2")
    unfinished.drop({"mine#i-2.1"})
    unfinished.observe(_brought(1, 5))
    assert [submit.request.choice for submit in unfinished.submits("i-3")] == [0, 2]


def test_a_prompt_is_let_go_with_its_last_choice():
    unfinished = Unfinished(_prompts(2, 1))
    unfinished.observe(_brought(0, 5, finish=FinishReason.LENGTH))
    assert len(unfinished._requests) == 2
    unfinished.observe(_brought(1, finish=FinishReason.CANCELLED))
    assert [request.choice for request in unfinished._requests] == [2]
    unfinished.observe(_brought(2, 4, finish=FinishReason.STOP))
    assert not unfinished
    assert unfinished._requests == []


def _thinking_prompt() -> GenerationRequest:
    thinking = ThinkingParams(begin_token_id=3, end_token_id=4, starts_open=True)
    return msgspec.structs.replace(_prompts(2)[0], thinking=thinking)


def _ended(unfinished: Unfinished) -> list[bool]:
    submits = unfinished.submits("again")
    return [s.request.thinking is not None and s.request.thinking.ended_by_caller for s in submits]


def test_an_end_of_thinking_that_was_asked_for_is_asked_for_again():
    unfinished = Unfinished([_thinking_prompt()])
    unfinished.submits("i-1")
    unfinished.observe(_brought(0, 7))
    unfinished.observe(_brought(1, 7))
    unfinished.heed([EndThinking(0, "mine#i-1.1")])
    assert _ended(unfinished) == [False, True]
    by_caller = msgspec.structs.replace(_brought(1, 4), thinking_ended_by="caller")
    unfinished.observe(by_caller)
    assert _ended(unfinished) == [False, True]


def test_an_end_of_thinking_that_came_too_late_is_none():
    unfinished = Unfinished([_thinking_prompt()])
    unfinished.submits("i-1")
    unfinished.observe(msgspec.structs.replace(_brought(0, 4), thinking_ended_by="model"))
    unfinished.heed([EndThinking(0, "mine#i-1.0")])
    assert _ended(unfinished) == [False, False]


def test_what_was_cancelled_ends_with_the_loss():
    unfinished = Unfinished(_prompts(2))
    unfinished.submits("i-1")
    unfinished.observe(msgspec.structs.replace(_brought(0, 7, 8), num_thinking_tokens=2))
    unfinished.heed([Cancel(0, "mine#i-1.0"), Cancel(0, "mine#i-1.1")])
    ends = unfinished.take_cancelled()
    assert [(end.choice, end.first_index, end.num_thinking_tokens) for end in ends] == [
        (0, 2, 2),
        (1, 0, 0),
    ]
    assert {end.finish_reason for end in ends} == {FinishReason.CANCELLED}
    assert not unfinished
