"""Requests that wait for their grammars: in, out, given up, told to stop thinking."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from engine_fakes import make_request
from tokenizer_files import write_tokenizer

from ostro.actors.engine.grammar import GrammarCompiler, GrammarError
from ostro.actors.engine.grammar_queue import GrammarQueue, Ready
from ostro.actors.engine.request import GrammarParams, RequestProgress
from ostro.actors.errors import OverloadedError


class PausedCompiler(GrammarCompiler):
    """Compiles when it is let go on."""

    def __init__(self, model_dir: Path) -> None:
        super().__init__(model_dir, 1024)
        self.go_on = threading.Event()
        self._thread.submit(self.go_on.wait, 30)

    def compiled(self) -> None:
        """Return once all that was asked for is compiled."""
        self.go_on.set()
        self._thread.submit(lambda: None).result(30)


@pytest.fixture
def compiler(tmp_path: Path) -> PausedCompiler:
    return PausedCompiler(write_tokenizer(tmp_path, 1024))


def add(
    queue: GrammarQueue, *request_ids: str, text: str = 'start: "a"', prefix: tuple[int, ...] = ()
) -> None:
    params = GrammarParams(text=text, prefix_token_ids=prefix)
    requests = [make_request(request_id, grammar=params) for request_id in request_ids]
    queue.add([RequestProgress(request, arrived_s=0.0) for request in requests], params)


def ids(ready: list[Ready]) -> list[list[str]]:
    return [[progress.request_id for progress in entry.choices] for entry in ready]


def test_requests_come_out_with_their_grammars_once_these_are_compiled(
    compiler: PausedCompiler,
) -> None:
    queue = GrammarQueue(compiler, 8)
    add(queue, "a")
    add(queue, "b", "c")
    assert (queue.take_ready(), len(queue)) == ([], 3)
    compiler.compiled()
    ready = queue.take_ready()
    assert ids(ready) == [["a"], ["b", "c"]]
    assert (queue.take_ready(), len(queue)) == ([], 0)
    grammars = [progress.grammar for entry in ready for progress in entry.choices]
    assert None not in grammars
    assert len({id(grammar.matcher) for grammar in grammars if grammar}) == 3


def test_a_grammar_that_does_not_compile_fails_its_request_alone(compiler: PausedCompiler) -> None:
    queue = GrammarQueue(compiler, 8)
    add(queue, "bad", text="start: b")
    add(queue, "bad prefix", prefix=(300,))
    add(queue, "good")
    compiler.compiled()
    errors = [entry.error for entry in queue.take_ready()]
    assert [isinstance(error, GrammarError) for error in errors] == [True, True, False]
    assert errors[2] is None


def test_without_a_tokenizer_the_request_fails_and_not_the_shard(tmp_path: Path) -> None:
    compiler = PausedCompiler(tmp_path)
    queue = GrammarQueue(compiler, 8)
    add(queue, "a")
    compiler.compiled()
    (ready,) = queue.take_ready()
    assert "tekken.json" in str(ready.error)


def test_what_is_cancelled_does_not_come_out(compiler: PausedCompiler) -> None:
    queue = GrammarQueue(compiler, 8)
    add(queue, "a")
    add(queue, "b", "c")
    cancelled = [queue.cancel(request_id) for request_id in ("a", "b", "b")]
    assert [progress and progress.request_id for progress in cancelled] == ["a", "b", None]
    compiler.compiled()
    assert ids(queue.take_ready()) == [["c"]]


def test_grammars_that_nobody_waits_for_are_not_compiled(compiler: PausedCompiler) -> None:
    queue = GrammarQueue(compiler, 2)
    for number in range(100):
        add(queue, "a", "b", text=f'start: "{number}"')
        queue.cancel("a")
        queue.cancel("b")
    compiler.compiled()
    assert queue.take_ready() == []
    assert not compiler._compiled


def test_the_end_of_thinking_is_remembered(compiler: PausedCompiler) -> None:
    queue = GrammarQueue(compiler, 8)
    add(queue, "a")
    add(queue, "b", "c")
    assert queue.end_thinking("c")
    assert not queue.end_thinking("d")
    compiler.compiled()
    assert [entry.unthinking for entry in queue.take_ready()] == [set(), {"c"}]


def test_no_more_wait_than_may(compiler: PausedCompiler) -> None:
    queue = GrammarQueue(compiler, 2)
    add(queue, "a", "b")
    with pytest.raises(OverloadedError):
        add(queue, "c")
    resumed = RequestProgress(make_request("lost", [5]), arrived_s=0.0, output_token_ids=[])
    queue.add([resumed], GrammarParams(text='start: "a"'))
    compiler.compiled()
