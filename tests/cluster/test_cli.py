"""The command line as a whole: its words, and how little it takes to start."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from ostro.cluster.cli import app


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


def test_ostro_refuses_an_unknown_command():
    result = invoke("sevre")
    assert result.exit_code == 2
    assert "sevre" in result.stderr


def test_command_line_starts_without_torch_and_ray():
    code = "import sys, ostro.cluster.cli; print({'torch', 'ray'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert result.stdout == "set()\n", result.stderr
