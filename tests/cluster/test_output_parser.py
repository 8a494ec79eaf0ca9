"""OutputParser: thinking, answer and tool calls by token id, stop strings never half shown."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostro.cluster.detokenizer import TokenTable
from ostro.cluster.output_parser import (
    Channel,
    OutputFormat,
    OutputParser,
    ParsedStep,
    StopMatcher,
)
from ostro.cluster.prompt import SpecialTokens

NUM_SPECIAL = 8
BOS, EOS, TOOL_CALLS, ARGS, THINK, END_THINK, INST = 0, 1, 2, 3, 4, 5, 6
SPECIAL = SpecialTokens(
    bos=BOS,
    eos=EOS,
    tool_calls=TOOL_CALLS,
    arguments=ARGS,
    begin_think=THINK,
    end_think=END_THINK,
)
TABLE = TokenTable(
    [f"<{i}>".encode() for i in range(NUM_SPECIAL)] + [bytes([b]) for b in range(256)], NUM_SPECIAL
)


def ids(*parts: str | int) -> list[int]:
    """Token ids: a mark as it is, text byte by byte."""
    out: list[int] = []
    for part in parts:
        out += [part] if isinstance(part, int) else [NUM_SPECIAL + b for b in part.encode()]
    return out


def parse(
    *parts: str | int,
    output_format: OutputFormat = OutputFormat.TOOLS,
    stop: tuple[str, ...] = (),
    min_tokens: int = 0,
    starts_in_thinking: bool = False,
) -> ParsedStep:
    """Everything that came out, fed one token at a time."""
    parser = OutputParser(
        TABLE,
        SPECIAL,
        output_format,
        stop=stop,
        min_tokens=min_tokens,
        starts_in_thinking=starts_in_thinking,
    )
    whole = ParsedStep()
    for token_id in ids(*parts):
        step = parser.feed([token_id])
        whole.channels += step.channels
        whole.add(step)
        if step.matched_stop is not None:
            return whole
    whole.add(parser.finish())
    return whole


def test_parser_tells_thinking_from_answer() -> None:
    step = parse(THINK, "so", END_THINK, "yes", EOS)
    assert (step.thinking, step.answer, step.calls) == ("so", "yes", [])
    assert step.channels == [Channel.THINKING] * 4 + [Channel.ANSWER] * 4


def test_parser_begins_in_thinking_when_the_prompt_ends_there() -> None:
    step = parse("so", END_THINK, "yes", starts_in_thinking=True)
    assert (step.thinking, step.answer) == ("so", "yes")


@pytest.mark.parametrize(
    ("parts", "thinking", "answer"),
    [
        ((END_THINK, "a", END_THINK, "b"), "", "ab"),
        ((THINK, "a", THINK, "b", END_THINK, "c"), "ab", "c"),
        ((THINK, "a", END_THINK, "b", THINK, "c", END_THINK, "d"), "ac", "bd"),
        ((ARGS, "a", INST, "b", BOS), "", "ab"),
    ],
)
def test_parser_tolerates_stray_marks(
    parts: tuple[str | int, ...], thinking: str, answer: str
) -> None:
    step = parse(*parts)
    assert (step.thinking, step.answer) == (thinking, answer)


def test_parser_takes_mark_names_in_letters_for_text() -> None:
    assert parse("[THINK]a[/THINK][TOOL_CALLS]").answer == "[THINK]a[/THINK][TOOL_CALLS]"


def test_parser_ends_a_cut_character_where_its_channel_ends() -> None:
    parser = OutputParser(TABLE, SPECIAL, OutputFormat.CHAT)
    step = parser.feed([THINK, NUM_SPECIAL + 0xE2, END_THINK, *ids("a")])
    assert (step.thinking, step.answer) == ("\ufffd", "a")


# ---- tool calls


def test_parser_gives_tool_calls_whole() -> None:
    step = parse(TOOL_CALLS, "f", ARGS, '{"a": 1}', TOOL_CALLS, "g-2", ARGS, "{}", EOS)
    assert [(call.name, call.arguments) for call in step.calls] == [
        ("f", '{"a": 1}'),
        ("g-2", "{}"),
    ]
    assert step.answer == ""
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", call.call_id) for call in step.calls)
    assert len({call.call_id for call in step.calls}) == 2


def test_parser_takes_tool_calls_from_thinking_and_after_text() -> None:
    step = parse("Well.", THINK, "so", TOOL_CALLS, "f", ARGS, "{}")
    assert (step.answer, step.thinking, len(step.calls)) == ("Well.", "so", 1)


def test_parser_takes_a_name_without_the_args_mark() -> None:
    [call] = parse(TOOL_CALLS, ' f{"a": {"b": 2}}').calls
    assert (call.name, json.loads(call.arguments)) == ("f", {"a": {"b": 2}})


def test_parser_ends_a_call_where_thinking_begins() -> None:
    step = parse(TOOL_CALLS, "f", ARGS, "{}", THINK, "so", END_THINK, "yes")
    assert (len(step.calls), step.thinking, step.answer) == (1, "so", "yes")


@pytest.mark.parametrize(
    "arguments",
    ['{"a": ', "[1]", '{"a": NaN}', "{} and more", "", '{"a":' * 100_000],
    ids=["cut", "no-object", "nan", "text-after", "empty", "deep"],
)
def test_parser_gives_a_broken_call_as_text(arguments: str) -> None:
    step = parse(TOOL_CALLS, "f", ARGS, arguments, TOOL_CALLS, "g", ARGS, "{}")
    assert step.answer == "f" + arguments
    assert [call.name for call in step.calls] == ["g"]


@pytest.mark.parametrize("name", ["", "two words", "n" * 65, "caf\u00e9"])
def test_parser_gives_a_call_of_no_proper_name_as_text(name: str) -> None:
    step = parse(TOOL_CALLS, name, ARGS, "{}")
    assert (step.answer, step.calls) == (name + "{}", [])


def test_parser_keeps_arguments_as_the_model_wrote_them() -> None:
    arguments = '{"n": ' + "9" * 5000 + ', "n": 1.0e400, "s": "\u20ac"}'
    [call] = parse(TOOL_CALLS, "f", ARGS, arguments).calls
    assert call.arguments == arguments


@pytest.mark.parametrize("output_format", [OutputFormat.CHAT, OutputFormat.RAW])
def test_parser_gives_calls_as_text_when_no_tools_are_offered(output_format: OutputFormat) -> None:
    step = parse("a", TOOL_CALLS, "f", ARGS, "{}", output_format=output_format)
    assert (step.answer, step.calls) == ("af{}", [])


def test_parser_ends_thinking_at_a_call_that_is_not_offered() -> None:
    step = parse(THINK, "so", TOOL_CALLS, "f", output_format=OutputFormat.CHAT)
    assert (step.thinking, step.answer) == ("so", "f")


def test_raw_parser_knows_no_thinking() -> None:
    step = parse("a", THINK, "b", END_THINK, "c", output_format=OutputFormat.RAW)
    assert (step.thinking, step.answer) == ("", "abc")


# ---- stop strings


def test_parser_stops_over_token_borders() -> None:
    step = parse("one STOP two", stop=("STOP",))
    assert (step.answer, step.matched_stop) == ("one ", "STOP")
    assert len(step.channels) == len("one STOP")


def test_parser_matches_no_stop_in_thinking_or_calls() -> None:
    step = parse(
        THINK, "STOP", END_THINK, "a", TOOL_CALLS, "f", ARGS, '{"STOP": 1}', stop=("STOP",)
    )
    assert (step.thinking, step.answer, step.matched_stop) == ("STOP", "a", None)
    assert step.calls[0].arguments == '{"STOP": 1}'


def test_parser_matches_no_stop_across_a_thinking_block() -> None:
    step = parse("ST", THINK, "OP", END_THINK, "OP", stop=("STOP",))
    assert (step.thinking, step.answer, step.matched_stop) == ("OP", "STOP", None)


def test_parser_matches_no_stop_before_min_tokens() -> None:
    step = parse("a.b.c.d", stop=(".",), min_tokens=3)
    assert (step.answer, step.matched_stop) == ("a.b", ".")


def test_parser_shows_what_only_looked_like_a_stop() -> None:
    parser = OutputParser(TABLE, SPECIAL, OutputFormat.CHAT, stop=("STOP",))
    assert parser.feed(ids("aSTO")).answer == "a"
    assert parser.feed(ids("STO")).answer == "STO"
    assert parser.finish().answer == "STO"


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The meaning of a stop string, over a whole text."""
    for end in range(1, len(text) + 1):
        found = max((s for s in stops if text[:end].endswith(s)), key=len, default=None)
        if found is not None:
            return text[: end - len(found)], found
    return text, None


def num_held(text: str, stops: list[str]) -> int:
    return max(
        (n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0
    )


@given(
    st.lists(st.text("ab\u20ac", max_size=4), max_size=12),
    st.lists(st.text("ab\u20ac", min_size=1, max_size=5), max_size=4),
)
def test_stop_matcher_equals_the_whole_text_and_never_shows_half(
    chunks: list[str], stops: list[str]
) -> None:
    whole, expected_stop = expected("".join(chunks), stops)
    matcher, shown, seen, found = StopMatcher(stops), "", "", None
    for chunk in chunks:
        text, found = matcher.push(chunk)
        shown, seen = shown + text, seen + chunk
        if found is not None:
            break
        assert len(shown) == len(seen) - num_held(seen, stops)
    shown += matcher.flush()
    assert (shown, found) == (whole, expected_stop)


@given(
    st.lists(
        st.sampled_from([*"ab.{}", "\u20ac", THINK, END_THINK, TOOL_CALLS, ARGS, EOS]), max_size=20
    ),
    st.integers(1, 5),
)
def test_parser_gives_the_same_however_tokens_are_batched(
    parts: list[str | int], batch: int
) -> None:
    one_by_one = parse(*parts, stop=(".a", "b."))
    parser = OutputParser(TABLE, SPECIAL, OutputFormat.TOOLS, stop=(".a", "b."))
    tokens, batched = ids(*parts), ParsedStep()
    for begin in range(0, len(tokens), batch):
        step = parser.feed(tokens[begin : begin + batch])
        batched.channels += step.channels
        batched.add(step)
        if step.matched_stop is not None:
            break
    else:
        batched.add(parser.finish())
    assert batched.thinking == one_by_one.thinking
    assert batched.answer == one_by_one.answer
    assert batched.channels == one_by_one.channels
    assert batched.matched_stop == one_by_one.matched_stop
    assert [c.name for c in batched.calls] == [c.name for c in one_by_one.calls]
