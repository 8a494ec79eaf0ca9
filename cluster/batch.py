"""A batch from its file of requests to its file of answers."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ostro.cluster.batch_lines import read_batch
from ostro.cluster.batch_output import BatchIndex, open_output
from ostro.cluster.batch_run import BatchProgress, BatchRun, BatchServer
from ostro.cluster.batch_view import shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What is asked, and where the answers go.

    Attributes:
        failures: Gets the lines without an answer; None puts them among the answers.
        effort: For lines that name none.
        goes_on: Do not ask again what the output has.
        drops_failed: But ask again what had failed.
    """

    source: Path
    answers: Path
    failures: Path | None = None
    effort: str | None = None
    goes_on: bool = False
    drops_failed: bool = False


async def run_batch(
    batch: Batch, server: BatchServer, progress: BatchProgress, console: Console
) -> bool:
    """Ask a batch; False if SIGINT or SIGTERM ended it before its end.

    Raises:
        ConfigError: A file of output cannot be written or taken up.
        OstroError: The server does not let us in or is gone, or an output cannot be written.
        OSError: The batch cannot be read.
    """
    return await _until_signal(_run(batch, server, progress, console))


async def _run(
    batch: Batch, server: BatchServer, progress: BatchProgress, console: Console
) -> None:
    async with server.session() as session:
        await server.knock(session)  # before a file is made or emptied
        with closing(BatchIndex()) as index, ExitStack() as files:
            opened = [
                files.enter_context(
                    open_output(path, index, goes_on=batch.goes_on, drops_failed=batch.drops_failed)
                )
                for path in (batch.answers, batch.failures)
                if path is not None
            ]
            progress.num_failed_before = index.num_failed
            run = BatchRun(server, session, index, opened[0], opened[-1], progress)
            num_bytes = batch.source.stat().st_size
            async with shown(progress, num_bytes, console):
                await run.run(read_batch(batch.source, batch.effort))


async def _until_signal(work: Coroutine[Any, Any, None]) -> bool:
    task, loop = asyncio.ensure_future(work), asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        return False
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
    return True
