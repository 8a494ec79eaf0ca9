"""Prompt lookup: the longest, then the latest earlier run; any text and any growth."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostro.actors.engine.ngrams import NgramIndex


def _draft(
    prompt: list[int],
    output: list[int],
    num_tokens: int,
    *,
    max_ngram: int = 4,
    min_ngram: int = 2,
    piece: int = 1000,
    most_of_prompt: int | None = None,
) -> list[int]:
    index = NgramIndex(
        prompt,
        output,
        max_ngram=max_ngram,
        min_ngram=min_ngram,
        most_of_prompt=most_of_prompt,
    )
    while index.extend(piece):
        pass
    return index.draft(num_tokens)


def _slow_draft(text: list[int], num_tokens: int, *, max_ngram: int, min_ngram: int) -> list[int]:
    """The meaning: by scanning."""
    for size in range(min(max_ngram, len(text) - 1), min_ngram - 1, -1):
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[len(text) - size :]:
                longer = list(text)
                for place in range(end, end + num_tokens):
                    longer.append(longer[place])
                return longer[len(text) :]
    return []


def test_worked_example() -> None:
    assert _draft([1, 2, 3, 1, 2], [], 4) == [3, 1, 2, 3]


@pytest.mark.parametrize(
    ("text", "drafted"),
    [
        ([], []),
        ([5], []),
        ([5, 5], []),
        ([5, 5, 5], [5, 5, 5]),
        ([1, 2, 3, 4], []),
        ([7, 1, 2, 8, 1, 2, 9, 7, 1, 2], [8, 1, 2]),  # the longer run before the later one
        ([3, 1, 2, 8, 4, 1, 2, 9, 5, 1, 2], [9, 5, 1]),  # of equal ones the later
    ],
    ids=str,
)
def test_the_longest_and_then_the_latest_run_counts(text: list[int], drafted: list[int]) -> None:
    assert _draft(text, [], 3) == drafted


def test_a_run_may_begin_in_the_prompt_and_end_in_the_output() -> None:
    assert _draft([1, 2], [3, 4, 1, 2, 3], 2) == [4, 1]


def test_nothing_is_drafted_before_all_text_is_taken_in() -> None:
    index = NgramIndex([1, 2] * 4, output := [], max_ngram=4, min_ngram=2)
    assert (index.extend(5), index.draft(2)) == (5, [])
    assert (index.extend(5), index.draft(2)) == (3, [1, 2])
    output.append(1)
    assert index.draft(2) == []
    assert (index.extend(5), index.draft(2)) == (1, [2, 1])
    assert index.extend(5) == 0


@pytest.mark.parametrize(
    ("most_of_prompt", "drafted"), [(None, [7, 8]), (8, [7, 8]), (7, []), (1, []), (0, [])]
)
def test_a_long_prompt_is_looked_up_in_its_last_tokens(
    most_of_prompt: int | None, drafted: list[int]
) -> None:
    prompt = [5, 1, 2, 7, 8, 9, 3, 4, 6]
    assert _draft(prompt, [1, 2], 2, most_of_prompt=most_of_prompt) == drafted
    assert _draft(prompt, [6, 0, 1, 6, 0], 2, most_of_prompt=most_of_prompt) == [1, 6]


def test_token_ids_of_any_size_are_told_apart() -> None:
    assert _draft([0, 0, 1, 1 << 20, 131_071, 9, 1 << 20, 131_071], [], 1) == [9]
    assert _draft([0, 1, 5, 1, 0, 6, 0, 1], [], 1) == [5]


@given(
    text=st.lists(st.integers(0, 3), max_size=24),
    split=st.integers(0, 24),
    piece=st.integers(1, 30),
    min_ngram=st.integers(1, 3),
    more=st.integers(0, 2),
    num_tokens=st.integers(0, 7),
)
def test_drafts_are_those_of_a_scan(
    text: list[int], split: int, piece: int, min_ngram: int, more: int, num_tokens: int
) -> None:
    sizes = {"max_ngram": min_ngram + more, "min_ngram": min_ngram}
    found = _draft(text[:split], text[split:], num_tokens, piece=piece, **sizes)
    assert found == (_slow_draft(text, num_tokens, **sizes) if num_tokens else [])
