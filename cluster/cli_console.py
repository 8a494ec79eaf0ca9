"""How the command line speaks: a console for answers, one for notes, errors in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

from ostro.actors.errors import OstroError, UnauthenticatedError
from ostro.configs.errors import ConfigError

_PIPE_WIDTH = 120
_EXIT_CONFIG = 2
_EXIT_FAILED = 1
_UNPRINTABLE = {code: None for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


def make_console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr; into a pipe it writes wide, plain lines.

    Text is shown as it is: "split:A:E" is a layout to us and holds an emoji's name to rich.
    """
    console = Console(stderr=stderr, highlight=False, emoji=False)
    if not console.is_terminal:
        console = Console(stderr=stderr, highlight=False, emoji=False, width=_PIPE_WIDTH)
    return console


def printable(text: str) -> str:
    """A model's text without what would steer a terminal: control characters but tab, newline."""
    return text.translate(_UNPRINTABLE)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn errors that Ostro names into one line on stderr and an exit code.

    2 for a config that the caller can fix, 1 for everything else.
    """
    try:
        yield
    except ConfigError as error:
        print_error(str(error))
        raise typer.Exit(_EXIT_CONFIG) from None
    except UnauthenticatedError as error:
        print_error(f"{error.message}; commands show the key in OSTRO_API_KEY")
        raise typer.Exit(_EXIT_FAILED) from None
    except OstroError as error:
        print_error(error.message)
        raise typer.Exit(_EXIT_FAILED) from None


def print_error(message: str) -> None:
    """Write "error: ..." to stderr as one line."""
    line = Text.assemble(("error: ", "bold red"), " ".join(message.split()))
    make_console(stderr=True).print(line, soft_wrap=True)
