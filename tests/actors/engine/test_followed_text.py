"""Where an answer stands in the text that was expected, and what should come next."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec
import pytest
from engine_fakes import make_progress, make_request
from hypothesis import given
from hypothesis import strategies as st

from ostro.actors.engine.followed_text import FollowedText, packed

_END_THINKING = 4
_TEXT = [*range(100, 160)]


def _follow(
    text: Sequence[int], *output: int, prompt: Sequence[int] = (1, 3), most: int = 7
) -> list[int]:
    return FollowedText([*text], [*prompt], [*output], _END_THINKING).draft(most)


def test_worked_example() -> None:
    text = [1, 2, 3, 4, 5, 6]
    assert _follow(text, 1) == [2, 3, 4, 5, 6]
    assert _follow(text, 1, 9) == [3]
    assert _follow(text, 1, 9, 4, 5) == [6]


def test_an_answer_begins_where_the_text_does() -> None:
    assert _follow(_TEXT) == _TEXT[:7]
    assert _follow(_TEXT, 100, 101) == _TEXT[2:9]


def test_an_answer_that_the_prompt_begins_goes_on_within_the_text() -> None:
    assert _follow(_TEXT, *_TEXT[30:32], prompt=[3, *_TEXT[20:30]]) == _TEXT[32:39]


@pytest.mark.parametrize(
    ("output", "following"),
    [
        ([*_TEXT[:9], 7, *_TEXT[10:13]], _TEXT[13:17]),
        ([*_TEXT[:9], 7, 8, 9, *_TEXT[10:13]], _TEXT[13:17]),
        ([*_TEXT[:9], 7, 8, *_TEXT[9:12]], _TEXT[12:16]),
        ([*_TEXT[:9], *_TEXT[12:15]], _TEXT[15:19]),
        ([*_TEXT[:9], *_TEXT[50:53]], _TEXT[53:57]),
        ([*_TEXT[40:50], *_TEXT[:6]], _TEXT[6:13]),
    ],
    ids=["one token for another", "three for one", "more", "fewer", "a long cut", "a move back"],
)
def test_an_answer_that_left_the_text_is_found_in_it_again(
    output: list[int], following: list[int]
) -> None:
    found = _follow(_TEXT, *output)
    assert found == following


def test_of_equal_places_the_next_one_ahead_is_taken() -> None:
    line = [7, 8, 9]
    text = [*line, 1, *line, 2, *line, 3, *line, 5]
    assert _follow(text, *line, 1, 50, 51, 8, 9) == [2, 7, 8]
    assert _follow(text, *line, 1, *line, 2, 50, 51, 8, 9)[0] == 3


def test_thinking_spoils_nothing() -> None:
    thinking = [3, 55, 110, 111, 112, 56, 57, _END_THINKING]
    assert _follow(_TEXT, *thinking) == _TEXT[:7]
    followed = FollowedText(_TEXT, [1], [*thinking, *_TEXT], _END_THINKING)
    assert followed.num_met == len(_TEXT)


def test_trust_grows_with_what_came_as_it_should() -> None:
    output = [*_TEXT[:5], 7]
    followed = FollowedText(_TEXT, [1], output, None)
    told = []
    for token in _TEXT[6:12]:
        told.append((len(followed.draft(7)), followed.is_sure))
        output.append(token)
    assert told == [(1, False), (2, False), (3, False), (4, True), (5, True), (6, True)]


def test_so_many_tokens_are_likely_as_came_in_a_row() -> None:
    def likely(output: list[int]) -> int:
        return FollowedText(_TEXT, [1], output, _END_THINKING).num_likely

    edited = [token if token % 7 else 7 for token in _TEXT]
    assert likely([]) > 7
    assert likely(_TEXT[:50]) > likely([]) > likely(edited[:9]) > likely(edited) > 1
    assert likely([*edited, _END_THINKING]) == likely([])
    another = [token if token % 4 else 7 for token in _TEXT]
    assert likely(another) == 0
    assert not FollowedText([*_TEXT, 9], [1], another[:-1], None).is_sure
    assert FollowedText([5], [1], [5] * 9000, None).num_likely > 7
    long = [5] * 9000
    assert FollowedText(long, [1], long, None).num_likely > 7


def test_each_token_of_the_text_is_met_once() -> None:
    output = [*_TEXT[:10], *_TEXT[:10], 7, *_TEXT[45:]]
    followed = FollowedText(_TEXT, [1], output, None)
    # The first of a run that is found again far away was not where it should be.
    assert followed.num_met == 10 + 15 - 1


def test_nothing_is_drafted_of_another_text_nor_beyond_the_end() -> None:
    assert _follow(_TEXT, 7, 8, 9) == []
    assert _follow(_TEXT, *_TEXT) == []
    assert _follow([5], 5, 6, 7) == []


@given(
    text=st.lists(st.integers(5, 8), min_size=1, max_size=40),
    prompt=st.lists(st.integers(5, 8), max_size=4),
    output=st.lists(st.integers(3, 9), max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    most=st.integers(0, 7),
)
def test_what_is_found_depends_on_the_tokens_alone(
    text: list[int], prompt: list[int], output: list[int], cuts: list[int], most: int
) -> None:
    at_once = FollowedText(text, prompt, output, _END_THINKING)
    grown: list[int] = []
    by_parts = FollowedText(text, prompt, grown, _END_THINKING)
    for cut in [*sorted(cuts), len(output)]:
        grown += output[len(grown) : cut]
        drafts = by_parts.draft(most)
        place = [text[i : i + len(drafts)] for i in range(len(text) + 1)]
        assert drafts in place
        assert len(drafts) <= most
    assert by_parts.num_met == at_once.num_met <= min(len(text), len(output))
    assert by_parts.draft(most) == at_once.draft(most)
    assert by_parts.is_sure == at_once.is_sure


def test_a_long_text_is_taken_in_bit_by_bit() -> None:
    drawn = random.Random(1)
    text = [drawn.randrange(10, 50_000) for _ in range(100_000)]
    output = text[:300]
    followed = FollowedText(text, [1], output, None)
    assert followed.draft(7) == text[300:307]
    output += [7, *text[90_000:90_200]]
    assert followed.draft(7) == text[90_200:90_207]


def test_a_request_follows_what_was_predicted_of_it() -> None:
    assert packed([1, 256]) == bytes([1, 0, 0, 0, 0, 1, 0, 0])
    request = make_request(prompt=[3, 5])
    assert make_progress(request).prediction is None
    progress = make_progress(msgspec.structs.replace(request, prediction=packed(_TEXT)))
    assert progress.prediction is not None
    progress.output_token_ids += _TEXT[:3]
    assert progress.prediction.draft(2) == _TEXT[3:5]
