"""The command line: `ostro serve`, `chat`, `run-batch`, `status` and the others.

What a command needs beyond its own talking (torch, Ray) is imported when it runs: `ostro chat`
starts in half a second because it never sees either.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from ostro.cluster.cli_batch import run_batch
from ostro.cluster.cli_chat import chat
from ostro.cluster.cli_console import make_console, plain_errors
from ostro.cluster.cli_demo import demo
from ostro.cluster.cli_deployment import (
    GrpcPort,
    HttpPort,
    Model,
    Overrides,
    Source,
    read_deployment,
)
from ostro.cluster.cli_keys import app as keys_app
from ostro.cluster.cli_metrics import app as metrics_app
from ostro.cluster.cli_serve import serve
from ostro.cluster.cli_status import status
from ostro.cluster.cli_weights import app as weights_app

app = typer.Typer(
    name="ostro",
    help="Serve Mistral Small 4 on a laptop or a cluster, talk to it, look at it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(serve)
app.command()(chat)
app.command()(demo)
app.command()(status)
app.command()(run_batch)
app.add_typer(weights_app)
app.add_typer(keys_app)
app.add_typer(metrics_app)


def main() -> None:
    """Entry point of `ostro`."""
    app()


@app.command()
@plain_errors()
def check(
    source: Source = "laptop",
    model: Model = None,
    overrides: Overrides = None,
    http_port: HttpPort = None,
    grpc_port: GrpcPort = None,
) -> None:
    """Tell what would go where and whether it fits; loads nothing and starts nothing.

    Exit code 1 if it would not run on this machine.

    For example:

    ostro check
    ostro check 2xh200 --model /models/Mistral-Small-4-119B-2603
    ostro check laptop --set layout.num_expert_shards=3
    """
    from ostro.cluster.cli_check import run

    run(read_deployment(source, overrides, model=model, http_port=http_port, grpc_port=grpc_port))


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
    add_help_option=False,
)
def bench(context: typer.Context) -> None:
    """Measure servers, the engine and its parts; `ostro bench --help` tells what there is."""
    from ostro.cluster.bench import app as bench_app

    bench_app(args=context.args, prog_name="ostro bench")


@app.callback(invoke_without_command=True)
def _options(
    show_version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if show_version:
        make_console().print(f"ostro {version('ostro')}", markup=False)
        raise typer.Exit
