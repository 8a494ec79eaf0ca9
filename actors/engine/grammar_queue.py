"""Requests whose grammars are being compiled: they are not scheduled before they are ready."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from llguidance import LLMatcher

from ostro.actors.engine.answer_grammar import AnswerGrammar
from ostro.actors.engine.grammar import GrammarCompiler
from ostro.actors.engine.request import GrammarParams, RequestProgress
from ostro.actors.errors import OstroError, OverloadedError
from ostro.configs.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    choices: list[RequestProgress]
    params: GrammarParams
    matcher: Future[LLMatcher]
    unthinking: set[str] = field(default_factory=set)

    def holds(self, request_id: str) -> bool:
        return any(progress.request_id == request_id for progress in self.choices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The choices of a prompt that are done waiting.

    Attributes:
        unthinking: Ids of those whose callers ended their thinking meanwhile.
        error: Why they cannot be served; None if their grammars are set.
    """

    choices: list[RequestProgress]
    unthinking: set[str]
    error: OstroError | None = None


class GrammarQueue:
    """Those of one epoch. One thread calls everything.

    Args:
        compiler: Compiles the grammars; outlives the epoch.
        max_waiting: How many choices may wait.
    """

    def __init__(self, compiler: GrammarCompiler, max_waiting: int) -> None:
        self._compiler = compiler
        self._max_waiting = max_waiting
        self._waiting: list[_Waiting] = []

    def __len__(self) -> int:
        return sum(len(waiting.choices) for waiting in self._waiting)

    def add(self, choices: Sequence[RequestProgress], params: GrammarParams) -> None:
        """Begin to compile the grammar that the choices of a prompt have in common.

        Raises:
            OverloadedError: Too many wait already; never of one that goes on after a loss.
        """
        num_waiting = len(self)
        if num_waiting >= self._max_waiting and not choices[0].is_resumed:
            raise OverloadedError(
                f"{num_waiting} requests wait for their grammars already", retry_after_s=1.0
            )
        self._waiting.append(_Waiting(list(choices), params, self._compiler.compile(params.text)))

    def cancel(self, request_id: str) -> RequestProgress | None:
        """Forget a request and give it back; None if it is not here (any more).

        A grammar that nobody waits for any more is not compiled, if that has not begun.
        """
        for waiting in self._waiting:
            for progress in waiting.choices:
                if progress.request_id == request_id:
                    waiting.choices.remove(progress)
                    if not waiting.choices:
                        waiting.matcher.cancel()
                        self._waiting.remove(waiting)
                    return progress
        return None

    def end_thinking(self, request_id: str) -> bool:
        """Note that a request shall not think; False if it is not here (any more)."""
        for waiting in self._waiting:
            if waiting.holds(request_id):
                waiting.unthinking.add(request_id)
                return True
        return False

    def take_ready(self) -> list[Ready]:
        """Those whose grammars were compiled since last asked, in the order of their arrival."""
        ready = [waiting for waiting in self._waiting if waiting.matcher.done()]
        self._waiting = [waiting for waiting in self._waiting if waiting not in ready]
        return [_ready(waiting) for waiting in ready]


def _ready(waiting: _Waiting) -> Ready:
    ready = Ready(choices=waiting.choices, unthinking=waiting.unthinking)
    try:
        compiled = waiting.matcher.result()
        for progress in waiting.choices:
            progress.grammar = AnswerGrammar(compiled.deep_copy(), waiting.params)
    except OstroError as error:
        return replace(ready, error=error)
    except ConfigError as error:
        return replace(ready, error=OstroError(str(error)))
    return ready
