"""Grammars of answers: compiled, checked and bounded, by llguidance.

llguidance is Rust with no torch, numpy or ray below it, and a matcher is state of a request like
its thinking budget; so grammars live in the engine, and the sampler is only handed bits. Ingresses
compile with the same code and the same tokenizer, so that what they let through compiles on a
shard.
"""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from ostro.actors.engine.vocabulary import FILE_NAME, Vocabulary, read_vocabulary
from ostro.actors.errors import InvalidRequestError
from ostro.configs.errors import ConfigError

MAX_GRAMMAR_BYTES = 2**18  # compiles in some 350 ms at worst
_MAX_SHOWN_CHARS = 500
_MAX_CACHED = 64
# What one grammar may cost. A mask takes 20 us as a rule; an ambiguous grammar (a: a a | "x") gets
# to 30 ms before it is given up, where llguidance's own limits let it take 3 s.
_LIMITS = LLParserLimits(
    max_items_in_row=500,
    step_max_items=10_000,
    max_lexer_states=50_000,  # 2 KB each
    verbose_errors=False,  # else an error may quote the answer
)


class GrammarError(InvalidRequestError):
    """A grammar that is malformed, too large, or that no answer can satisfy."""

    code = "bad_grammar"


class GrammarCompiler:
    """Compiles grammars for one tokenizer, one at a time in a thread of its own. Thread-safe.

    Compiling lets go of the interpreter, so that steps go on meanwhile. The last 64 grammars stay
    compiled.

    Args:
        model_dir: Holds the tokenizer's file, which is read for the first grammar or by `warm_up`.
        vocab_size: Tokens of the model; those that the tokenizer lacks are never allowed.
    """

    def __init__(self, model_dir: Path, vocab_size: int) -> None:
        self._path = model_dir / FILE_NAME
        self._vocab_size = vocab_size
        self._tokenizer: LLTokenizer | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ostro-grammars")
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def warm_up(self) -> None:
        """Begin to read the tokenizer (a second, 90 MB); failures show when it is needed."""
        self._thread.submit(self._load)

    def compile(self, text: str) -> Future[LLMatcher]:
        """A matcher of one's own for a grammar in llguidance's form: Lark, or its JSON.

        Raises (in the future):
            GrammarError: No answer can be made by it; the message says why.
            ConfigError: The checkpoint has no tokenizer that can be read.
        """
        return self._thread.submit(self._compile, text)

    def _compile(self, text: str) -> LLMatcher:
        matcher = self._compiled.get(text)
        if matcher is None:
            matcher = _checked(self._load(), text)
            self._compiled[text] = matcher
            if len(self._compiled) > _MAX_CACHED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(text)
        return matcher.deep_copy()

    def _load(self) -> LLTokenizer:
        if self._tokenizer is None:
            vocabulary = read_vocabulary(self._path)
            try:
                self._tokenizer = make_tokenizer(vocabulary, self._vocab_size)
            except ValueError as error:
                raise ConfigError(
                    f"{self._path}: no grammar can be held to its tokens ({error}); "
                    "give the checkpoint the tokenizer it was trained with"
                ) from error
        return self._tokenizer


def make_tokenizer(vocabulary: Vocabulary, vocab_size: int) -> LLTokenizer:
    """A vocabulary as llguidance takes it, padded to the model's size.

    It tokenizes too, as the model was trained: where a grammar leaves one text to go on with, only
    that text's own tokens are allowed.

    Raises:
        ValueError: The model has fewer tokens, or the pattern is none.
    """
    num_special = vocabulary.num_special
    pieces = enumerate(vocabulary.pieces)
    special = {piece.decode(): token_id for token_id, piece in islice(pieces, num_special)}
    # The stub leaves this constructor out; `llguidance.tiktoken` is a thin cover of it.
    tokenizer: LLTokenizer = LLTokenizer.from_tiktoken(  # type: ignore[attr-defined]
        encoder={piece: token_id for token_id, piece in pieces},
        special_tokens=special,
        pattern=vocabulary.pattern,
        eos_token=vocabulary.eos_token_id,
        n_vocab=vocab_size,
        slices=None,
    )
    return tokenizer


def _checked(tokenizer: LLTokenizer, text: str) -> LLMatcher:
    if len(text.encode()) > MAX_GRAMMAR_BYTES:
        raise GrammarError(f"takes at most {MAX_GRAMMAR_BYTES} bytes")
    matcher = LLMatcher(tokenizer, text, log_level=0, limits=_LIMITS)
    if matcher.is_error():
        raise GrammarError(error_text(matcher))
    first = matcher.deep_copy()
    mask = bytearray(first.compute_bitmask())
    if first.is_error():
        raise GrammarError(error_text(first))
    for token_id in tokenizer.eos_tokens:
        mask[token_id >> 3] &= ~(1 << (token_id & 7))
    if mask.count(0) == len(mask):
        raise GrammarError("no answer but an empty one satisfies it")
    return matcher


def error_text(matcher: LLMatcher) -> str:
    """What is wrong with a matcher, for its caller."""
    text = matcher.get_error().replace("<non-verbose/>", "").strip()
    return "no text can satisfy it" if text == "NoExtensionBias" else text[:_MAX_SHOWN_CHARS]
