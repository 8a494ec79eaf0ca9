"""`ostro metrics`: what is served under /metrics, and a dashboard of it."""

from __future__ import annotations

import json

import typer

app = typer.Typer(
    name="metrics", help="What /metrics serves, and a dashboard of it.", no_args_is_help=True
)


@app.command("list")
def list_() -> None:
    """Print every metric with its type, labels and unit, as a table in Markdown."""
    from ostro.cluster.metrics_list import table

    typer.echo(table(), nl=False)


@app.command()
def dashboard() -> None:
    """Print a dashboard for Grafana 11 and later, to be imported or provisioned.

    For example: ostro metrics dashboard > ostro.json
    """
    from ostro.cluster.metrics_dashboard import dashboard as make

    typer.echo(json.dumps(make(), indent=2))
