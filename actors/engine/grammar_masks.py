"""Masks of a step's answers, computed while the model runs.

All tokens before a step's are known when it starts, and its masks are needed when its logits are
there: in between, a thread of llguidance has time for them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from llguidance import LLExecutor

from ostro.actors.engine.answer_grammar import AnswerGrammar
from ostro.actors.engine.request import RequestProgress

_MAX_THREADS = 4
_TIMEOUT_S = 30.0  # masks are bounded: at worst some 50 ms each


class MaskMaker:
    """Computes the masks of one step at a time; a step without grammars costs nothing.

    Args:
        vocab_size: Tokens of the model.
    """

    def __init__(self, vocab_size: int) -> None:
        self._mask_bytes = (vocab_size + 31) // 32 * 4
        num_cores = len(os.sched_getaffinity(0))  # a pinned rank has few of the machine's
        self._executor = LLExecutor(max(1, min(_MAX_THREADS, num_cores // 2)))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ostro-masks")
        self._running: Future[None] | None = None

    def start(self, requests: Iterable[RequestProgress]) -> None:
        """Begin with the masks of these requests' next tokens. `wait` comes before the next step.

        A request that thinks may begin to answer only with the token after this one: none for it.
        """
        grammars = [
            progress.grammar
            for progress in requests
            if progress.grammar is not None
            and progress.grammar.needs_mask
            and not (progress.thinking is not None and progress.thinking.is_open)
        ]
        # One that is left over is of an epoch that failed between `start` and `wait`.
        self._running = self._thread.submit(self._compute, grammars) if grammars else None

    def wait(self) -> None:
        """Return once the masks are there."""
        running, self._running = self._running, None
        if running is not None:
            running.result(_TIMEOUT_S)

    def _compute(self, grammars: list[AnswerGrammar]) -> None:
        size = self._mask_bytes
        masks = bytearray(len(grammars) * size)
        self._executor.unsafe_compute_mask_ptr(
            [(grammar.matcher, index) for index, grammar in enumerate(grammars)],
            ctypes.addressof(ctypes.c_char.from_buffer(masks)),
            size,
            len(grammars),
        )
        for index, grammar in enumerate(grammars):
            grammar.set_mask(memoryview(masks)[index * size : (index + 1) * size])
