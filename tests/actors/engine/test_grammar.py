"""Compiling grammars: what is taken, what is refused, what it may cost, and for whom it is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tokenizer_files import write_tokenizer

from ostro.actors.engine.grammar import (
    MAX_GRAMMAR_BYTES,
    GrammarCompiler,
    GrammarError,
    make_tokenizer,
)
from ostro.actors.engine.vocabulary import FILE_NAME, read_vocabulary
from ostro.configs.errors import ConfigError

VOCABULARY = 1024
TIMEOUT_S = 20


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("model"), VOCABULARY)


@pytest.fixture(scope="module")
def compiler(model_dir: Path) -> GrammarCompiler:
    return GrammarCompiler(model_dir, VOCABULARY)


def test_the_vocabulary_is_that_of_the_tokenizer(model_dir: Path) -> None:
    tekken = MistralTokenizer.from_file(model_dir / FILE_NAME).instruct_tokenizer.tokenizer
    found = read_vocabulary(model_dir / FILE_NAME)
    num_special = tekken.num_special_tokens
    assert (found.num_special, found.eos_token_id) == (num_special, tekken.eos_id)
    assert found.pieces[num_special:] == [
        tekken.id_to_byte_piece(token_id, SpecialTokenPolicy.RAISE)
        for token_id in range(num_special, tekken.n_words)
    ]
    assert found.pieces[34] == b"<THINK>"


@pytest.mark.parametrize("text", ['{"name": "Zo\u00eb", "n": [1, 2.5]}', "get_weather", "a\n\n  b"])
def test_texts_get_the_tokens_that_the_model_was_trained_on(model_dir: Path, text: str) -> None:
    tekken = MistralTokenizer.from_file(model_dir / FILE_NAME).instruct_tokenizer.tokenizer
    tokenizer = make_tokenizer(read_vocabulary(model_dir / FILE_NAME), VOCABULARY)
    assert tokenizer.tokenize_str(text) == tekken.encode(text, bos=False, eos=False)


@pytest.mark.parametrize("content", [None, "", "{}", '{"config": 1, "vocab": []}'])
def test_a_tokenizer_that_cannot_be_read_fails_the_grammar(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / FILE_NAME).write_text(content)
    compiler = GrammarCompiler(tmp_path, VOCABULARY)
    compiler.warm_up()
    with pytest.raises(ConfigError, match=FILE_NAME):
        compiler.compile('start: "a"').result(TIMEOUT_S)


def test_a_tokenizer_of_another_model_fails_the_grammar(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="too small"):
        GrammarCompiler(model_dir, 8).compile('start: "a"').result(TIMEOUT_S)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("start: b", "unknown name"),
        ("", "Empty"),
        ('{"grammars": [', "EOF"),
        ("start: /(a/", "unclosed group"),
        ("start: a\na: a", "no text"),
        ('start: ""', "empty"),
        ('start: "' + "a" * MAX_GRAMMAR_BYTES + '"', "at most"),
        (json.dumps({"grammars": [{"json_schema": {"type": "objekt"}}]}), "objekt"),
        (json.dumps({"grammars": [{"json_schema": {"not": {}}}]}), "not"),
    ],
)
def test_what_no_answer_can_satisfy_is_refused(
    compiler: GrammarCompiler, text: str, why: str
) -> None:
    with pytest.raises(GrammarError, match=why):
        compiler.compile(text).result(TIMEOUT_S)


def test_an_ambiguous_grammar_is_given_up_before_it_takes_seconds(
    model_dir: Path, compiler: GrammarCompiler
) -> None:
    vocabulary = read_vocabulary(model_dir / FILE_NAME)
    matcher = compiler.compile('start: a\na: a a | "x"').result(TIMEOUT_S)
    (token_id,) = make_tokenizer(vocabulary, VOCABULARY).tokenize_str("x")
    for _ in range(2000):
        matcher.compute_bitmask()
        if not matcher.consume_token(token_id):
            break
    assert matcher.is_error()


def test_a_kept_grammar_is_not_touched_by_those_that_use_it(compiler: GrammarCompiler) -> None:
    first, second = (compiler.compile('start: "ab" | "b"').result(TIMEOUT_S) for _ in range(2))
    mask = second.compute_bitmask()
    allowed = next(i for i in range(3, VOCABULARY) if mask[i // 8] >> i % 8 & 1)
    assert first.consume_token(allowed)
    assert second.compute_bitmask() == mask


def test_only_the_latest_grammars_are_kept(model_dir: Path) -> None:
    compiler = GrammarCompiler(model_dir, VOCABULARY)
    for number in range(70):
        compiler.compile(f'start: "{number}"').result(TIMEOUT_S)
    assert len(compiler._compiled) == 64
    assert 'start: "69"' in compiler._compiled
