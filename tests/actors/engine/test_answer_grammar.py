"""One answer under its grammar: every way through satisfies it, nothing else gets through."""

from __future__ import annotations

import json
import random
from concurrent.futures import Future
from typing import Any

import pytest
from engine_fakes import EOS, make_progress, make_request
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import validate
from llguidance import LLMatcher
from tokenizer_files import write_tokenizer

from ostro.actors.engine.answer_grammar import AnswerGrammar
from ostro.actors.engine.grammar import GrammarError, make_tokenizer
from ostro.actors.engine.grammar_masks import MaskMaker
from ostro.actors.engine.request import GrammarParams, RequestProgress, ThinkingParams
from ostro.actors.engine.token_rules import begin, observe, sampling_state
from ostro.actors.engine.vocabulary import FILE_NAME, Vocabulary, read_vocabulary

VOCABULARY = 1000  # no multiple of 32
THINK, END_THINK = 3, 4
A, B, C, D, E, F, G = range(5, 12)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return read_vocabulary(
        write_tokenizer(tmp_path_factory.mktemp("model"), VOCABULARY) / FILE_NAME
    )


@pytest.fixture(scope="module")
def tokenizer(vocabulary: Vocabulary) -> Any:
    return make_tokenizer(vocabulary, VOCABULARY)


def members(mask: bytearray, size: int) -> list[int]:
    return [token_id for token_id in range(size) if mask[token_id // 8] >> token_id % 8 & 1]


# ---- schemas, at random

_SCHEMAS = st.recursive(
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": "integer", "minimum": -20, "maximum": 300},
            {"type": "string", "maxLength": 4},
            {"enum": ["x", 'say "y"', 7, None]},
            {"type": "string", "pattern": "^[0-9]{2}-[a-z]+$", "maxLength": 6},
        ]
    ),
    lambda inner: st.one_of(
        st.builds(
            lambda items, most: {"type": "array", "items": items, "maxItems": most},
            inner,
            st.integers(0, 2),
        ),
        st.builds(
            lambda found: {
                "type": "object",
                "properties": found,
                "required": list(found),
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(["a", "name", "is it", "\u00e9"]), inner, max_size=3),
        ),
        st.builds(lambda *either: {"anyOf": list(either)}, inner, inner),
    ),
    max_leaves=5,
)


def walk(grammar: AnswerGrammar, vocabulary: Vocabulary, draw: random.Random) -> bytes:
    """An answer of allowed tokens, at random and rather short ones than long."""
    text = b""
    for _ in range(2000):
        mask = grammar.allowed(also=None, banned=())
        if mask is None:
            break
        token_id = draw.choice(members(mask, VOCABULARY))
        if token_id == vocabulary.eos_token_id:
            break
        grammar.observe(token_id)
        text += vocabulary.pieces[token_id]
        if grammar.is_complete:
            break
    assert grammar.error is None
    return text


@settings(max_examples=60, deadline=None)
@given(schema=_SCHEMAS, seed=st.integers(0, 2**32))
def test_any_way_through_a_schema_is_json_of_it(
    vocabulary: Vocabulary, tokenizer: Any, schema: dict[str, Any], seed: int
) -> None:
    text = json.dumps(
        {"grammars": [{"json_schema": schema | {"x-guidance": {"whitespace_flexible": False}}}]}
    )
    grammar = AnswerGrammar(LLMatcher(tokenizer, text, log_level=0), GrammarParams(text=text))
    validate(json.loads(walk(grammar, vocabulary, random.Random(seed))), schema)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_what_the_mask_leaves_out_is_what_the_grammar_refuses(
    vocabulary: Vocabulary, tokenizer: Any, seed: int
) -> None:
    # Without that, where the grammar leaves one text to go on with, fewer tokens are allowed.
    text = '%llguidance {"no_forcing": true}\nstart: /[a-c]{1,3}(yes|no)?/ "!"'
    matcher, draw = LLMatcher(tokenizer, text, log_level=0), random.Random(seed)
    grammar = AnswerGrammar(matcher, GrammarParams(text=text))
    while not grammar.is_complete:
        mask = grammar.allowed(also=None, banned=())
        assert mask is not None
        allowed = members(mask, VOCABULARY)
        for token_id in range(VOCABULARY):
            takes = matcher.validate_tokens([token_id]) == 1
            assert takes is (token_id in allowed)
        grammar.observe(draw.choice(allowed))


# ---- among thinking, bans and ends; tokens from 5 on are the letters from a on


def life(text: str, *output: int, prefix: tuple[int, ...] = (), **fields: Any) -> RequestProgress:
    params = GrammarParams(text=text, prefix_token_ids=prefix, held_token_ids=(EOS,))
    progress = make_progress(make_request(max_tokens=50, grammar=params, **fields), *output)
    begin(progress)
    return progress


def thinking(**fields: Any) -> ThinkingParams:
    return ThinkingParams(begin_token_id=THINK, end_token_id=END_THINK, **fields)


def choices(progress: RequestProgress) -> list[int]:
    """Tokens that the sampler may choose; all letters where it is free."""
    state = sampling_state(progress)
    if state.forced_token_id is not None:
        return [state.forced_token_id]
    allowed = range(12) if state.allowed is None else members(state.allowed, 12)
    return [token_id for token_id in allowed if token_id not in state.banned_token_ids]


def test_an_answer_may_begin_with_thinking_once_and_thinks_freely() -> None:
    progress = life('start: "a" "b"', thinking=thinking())
    assert choices(progress) == [THINK, A]
    observe(progress, THINK)
    assert choices(progress) == [t for t in range(12) if t != EOS]
    for token_id in (G, THINK, END_THINK):
        observe(progress, token_id)
    assert choices(progress) == [A]
    observe(progress, A)
    assert choices(progress) == [B]


def test_an_answer_that_has_begun_does_not_think() -> None:
    assert choices(life('start: "a" "b"', A, thinking=thinking())) == [B]
    assert choices(life('start: "a" "b"', prefix=(A,), thinking=thinking())) == [B]


def test_a_forced_close_passes_the_grammar_by() -> None:
    progress = life(
        'start: "a" "b"',
        THINK,
        thinking=thinking(budget_tokens=2, closing_token_ids=(C, END_THINK)),
    )
    observe(progress, G)
    for forced in (C, END_THINK):
        assert choices(progress) == [forced]
        observe(progress, forced)
    assert progress.thinking is not None
    assert progress.thinking.ended_by == "budget"
    assert choices(progress) == [A]


def test_a_budget_of_nothing_leaves_only_the_answer() -> None:
    assert choices(life('start: "a"', thinking=thinking(budget_tokens=0))) == [A]


def test_thinking_that_the_prompt_left_open_comes_first() -> None:
    progress = life('start: "a"', thinking=thinking(starts_open=True))
    assert choices(progress) == [t for t in range(12) if t != EOS]
    observe(progress, END_THINK)
    assert choices(progress) == [A]


def test_an_answer_may_stop_where_it_is_whole_but_not_before_min_tokens() -> None:
    assert choices(life("start: /a+/", A)) == [EOS, A]
    assert choices(life("start: /a+/", A, min_tokens=2)) == [A]
    assert choices(life("start: /a+/", A, ignore_eos=True)) == [A]


def test_a_whole_answer_that_must_not_stop_is_complete_where_nothing_else_can_come() -> None:
    progress = life('start: "a" "b"?', A, min_tokens=9)
    assert progress.grammar is not None
    assert choices(progress) == [B]
    observe(progress, B)
    assert progress.grammar.is_complete


def test_an_answer_whose_only_way_on_is_banned_says_so() -> None:
    progress = life('start: "a" "e" "b"', A, min_tokens=9, stop_token_ids=(E,))
    assert choices(progress) == [EOS]  # so that the step has a token; nobody is told of it
    assert progress.grammar is not None
    assert "no token" in str(progress.grammar.error)


def test_output_that_was_there_already_is_followed_in_order() -> None:
    output = (THINK, G, B, END_THINK, A, B)
    progress = life('start: "a" "b" "c" "d"', *output, thinking=thinking())
    assert choices(progress) == [C]


@pytest.mark.parametrize(
    ("prefix", "why"), [((B,), "no beginning"), ((A, B), "whole answer"), ((A, B, C), "no beg")]
)
def test_a_prefix_must_be_the_beginning_of_an_answer(prefix: tuple[int, ...], why: str) -> None:
    with pytest.raises(GrammarError, match=why):
        life('start: "a" "b"', prefix=prefix)


def test_masks_of_a_step_are_those_of_its_requests(tokenizer: Any) -> None:
    maker = MaskMaker(12)
    held = [life('start: "a"'), life('start: "b" "c"', B), life("start: /[c-f]/")]
    free = make_progress(make_request())
    pensive = life('start: "a"', THINK, thinking=thinking())
    for _ in range(2):  # the second time there is nothing left to do
        maker.start([held[0], free, held[1], pensive, held[2]])
        maker.wait()
        assert [progress.grammar.needs_mask for progress in held] == [False] * 3  # type: ignore[union-attr]
    assert [choices(progress) for progress in held] == [[A], [C], [C, D, E, F]]
    assert pensive.grammar is not None
    assert pensive.grammar.needs_mask


def test_masks_that_an_epoch_left_behind_do_not_fail_the_next(tokenizer: Any) -> None:
    maker = MaskMaker(12)
    maker._running = Future()
    maker._running.set_exception(RuntimeError("nobody waited"))
    held = life('start: "a"')
    for progress in (make_progress(make_request()), held):
        maker.start([progress])
        maker.wait()
    assert choices(held) == [A]
