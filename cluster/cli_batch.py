"""`ostro run-batch`: a file of requests asked of a running cluster, and a file of answers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ostro.actors.errors import OstroError
from ostro.cluster.cli_connection import DEFAULT_HTTP_URL, api_key, base_url
from ostro.cluster.cli_console import make_console, plain_errors
from ostro.cluster.cli_tls import Ca, Cert, Key, https_context, read_tls
from ostro.cluster.human_numbers import format_seconds
from ostro.cluster.retries import Retries
from ostro.configs.errors import ConfigError
from ostro.configs.reasoning import EFFORTS

if TYPE_CHECKING:
    from ostro.cluster.batch import Batch
    from ostro.cluster.batch_run import BatchServer

_GO_ON = "; the same command with --resume goes on"
_EXIT_FAILED = 1
_EXIT_INTERRUPTED = 130


@plain_errors()
def run_batch(  # noqa: PLR0913  each is an option
    source: Annotated[Path, typer.Argument(metavar="IN", help="Requests, one JSON object a line.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Where the answers go.")],
    url: Annotated[
        str, typer.Option(metavar="URL", help="The HTTP face of the cluster.")
    ] = DEFAULT_HTTP_URL,
    concurrency: Annotated[int, typer.Option(min=1, max=4096, help="Requests at a time.")] = 32,
    errors: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where failed lines go; without it, into OUT."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on: what OUT has is not asked again.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Go on, and ask again what had failed.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew.")] = False,
    effort: Annotated[
        str | None,
        typer.Option(
            metavar="EFFORT", help=f"For lines that name none: one of {', '.join(EFFORTS)}."
        ),
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="Of a request that meets 429, 503 or a lost connection.")
    ] = 20,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=1.0, metavar="SECONDS", help="Of one request.")
    ] = 3600.0,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
) -> None:
    """Ask a file of requests, in the format of OpenAI's Batch API.

    A line of IN is {"custom_id": "1", "url": "/v1/chat/completions", "body": {...}};
    other URLs are /v1/completions, /v1/responses and /v1/messages.
    OUT gets a line for each as it is answered.

    The key is taken from OSTRO_API_KEY.
    Exit code 0 if every line was answered, 1 if any was not, 130 after Ctrl-C.

    For example:

    ostro run-batch questions.jsonl answers.jsonl --effort high

    ostro run-batch questions.jsonl answers.jsonl --resume
    """
    goes_on = resume or retry_failed
    if goes_on and overwrite:
        raise ConfigError("--overwrite begins anew and --resume goes on: give one of them")
    if effort is not None and effort not in EFFORTS:
        raise ConfigError(f"effort {effort!r}: must be one of {', '.join(EFFORTS)}")
    _check_source(source, target, errors)
    for path in (target, errors):
        _check_output(path, may_be_there=goes_on or overwrite)
    from ostro.cluster.batch import Batch
    from ostro.cluster.batch_run import BatchServer

    batch = Batch(
        source=source,
        answers=target,
        failures=errors,
        effort=effort,
        goes_on=goes_on,
        drops_failed=retry_failed,
    )
    server = BatchServer(
        url=base_url(url),
        api_key=api_key(),
        concurrency=concurrency,
        retries=Retries(most=retries),
        timeout_s=timeout_s,
        trust=https_context(read_tls(ca, cert, key)),
    )
    raise typer.Exit(_ask(batch, server))


def _ask(batch: Batch, server: BatchServer) -> int:
    """Run it and tell what became of it; gives the exit code."""
    from ostro.cluster.batch import run_batch as run
    from ostro.cluster.batch_run import BatchProgress
    from ostro.cluster.batch_view import told

    console, progress = make_console(stderr=True), BatchProgress()
    try:
        is_complete = asyncio.run(run(batch, server, progress, console))
    except OstroError as error:
        has_begun = progress.num_done + progress.num_failed
        raise type(error)(f"{error.message}{_GO_ON if has_begun else ''}") from None
    except OSError as error:
        raise OstroError(f"{batch.source}: {error.strerror or error}{_GO_ON}") from None
    summary, code = f"{told(progress)}, {format_seconds(progress.elapsed_s())}", 0
    if not is_complete:
        summary, code = f"interrupted: {told(progress)}{_GO_ON}", _EXIT_INTERRUPTED
    elif progress.num_failed + progress.num_failed_before:
        summary, code = f"{summary}; --retry-failed asks again what failed", _EXIT_FAILED
    console.print(summary, soft_wrap=True, markup=False)
    return code


def _check_source(source: Path, *outputs: Path | None) -> None:
    if source.is_dir() or not source.exists():
        raise ConfigError(f"{source}: {'not a file' if source.is_dir() else 'no such file'}")
    paths = [path.resolve() for path in (source, *outputs) if path is not None]
    if len(set(paths)) < len(paths):
        raise ConfigError("IN, OUT and --errors must be different files")


def _check_output(path: Path | None, *, may_be_there: bool) -> None:
    if path is None or not path.exists():
        return
    if not path.is_file():
        raise ConfigError(f"{path}: not a file")
    if not may_be_there:
        raise ConfigError(f"{path} is there: --resume goes on with it, --overwrite begins anew")
