"""The command line as a whole: its words, and how little it takes to start."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest
import typer
from rich.text import Text
from typer.testing import CliRunner

from ostro.cluster.bench import app as bench_app
from ostro.cluster.cli import app
from ostro.cluster.cli_console import make_console


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_ostro_tells_its_version():
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"ostro {version('ostro')}\n")


def test_ostro_lists_its_commands():
    output = invoke("--help").stdout
    for command in ("serve", "chat", "status", "check", "weights", "bench"):
        assert f" {command} " in output


@pytest.mark.parametrize("command", ["serve", "chat", "check"])
def test_help_gives_examples(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f" ostro {command} " in result.stdout.split("For example:")[1]


def help_texts():
    """(where it stands, text) of every command and every parameter."""
    open_ends = [
        ("ostro", typer.main.get_command(app)),
        ("bench", typer.main.get_command(bench_app)),
    ]
    while open_ends:
        path, command = open_ends.pop()
        yield path, command.help
        for parameter in command.params:
            yield f"{path} {parameter.name}", parameter.help
        for name, child in getattr(command, "commands", {}).items():
            open_ends.append((f"{path} {name}", child))


def test_every_command_and_parameter_has_a_help_text():
    texts = dict(help_texts())
    assert "bench engine layout" in texts
    assert [path for path, text in texts.items() if not text] == []


def test_no_help_text_holds_what_rich_takes_for_markup_or_an_emoji():
    # Typer's panels parse both, and nothing turns that off but to do without panels.
    texts = dict(help_texts())
    assert [path for path, text in texts.items() if Text.from_markup(text).plain != text] == []


def test_the_console_shows_a_layout_and_not_an_emoji(capsys):
    make_console().print("split:A:E")
    assert capsys.readouterr().out == "split:A:E\n"


def test_ostro_refuses_an_unknown_command():
    result = invoke("sevre")
    assert result.exit_code == 2
    assert "sevre" in result.stderr


def test_command_line_starts_without_torch_and_ray():
    code = "import sys, ostro.cluster.cli; print({'torch', 'ray'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert result.stdout == "set()\n", result.stderr
