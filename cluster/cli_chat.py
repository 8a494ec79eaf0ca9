"""`ostro chat`: a conversation over gRPC, one question from a script or many in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

from ostro.actors.errors import OstroError
from ostro.cluster.cli_connection import DEFAULT_URL, Url, open_client
from ostro.cluster.cli_console import make_console, plain_errors, print_error, printable
from ostro.cluster.cli_tls import Ca, Cert, Key, read_tls
from ostro.cluster.client import Client
from ostro.cluster.client_requests import effort_name
from ostro.cluster.conversation import ChatOptions, Conversation, Turn
from ostro.configs.deployment import ServingConfig
from ostro.configs.errors import ConfigError
from ostro.configs.reasoning import EFFORTS

_HELP = (
    "/effort NAME  think more or less from now on: " + ", ".join(EFFORTS) + "\n"
    "/image FILE   show an image with the next question\n"
    "/reset        forget the conversation\n"
    "/quit         leave, as Ctrl-D does\n"
    "Ctrl-C        cancel the running answer"
)
_DIM = Style(dim=True)
_MAX_IMAGE_BYTES = ServingConfig().max_image_bytes


@plain_errors()
def chat(  # noqa: PLR0913  each is an option
    prompt: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="One question; without it, a conversation."),
    ] = None,
    effort: Annotated[
        str | None, typer.Option(metavar="EFFORT", help=f"One of {', '.join(EFFORTS)}.")
    ] = None,
    url: Url = DEFAULT_URL,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Thinking and answer together.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Shown with the question; may be given several times."),
    ] = None,
    show_thinking: Annotated[
        bool | None,
        typer.Option(
            "--show-thinking/--hide-thinking",
            help="Shown in a terminal unless hidden; into a pipe only if asked for, on stderr.",
        ),
    ] = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
) -> None:
    """Talk to a running cluster.

    In a terminal thinking is dimmed and Ctrl-C cancels an answer.
    Into a pipe only the answer is written; a question may come from a pipe too.

    For example:

    ostro chat
    ostro chat --effort high "Is 2027 a prime?"
    ostro chat --image cat.jpg "What is this?"
    git diff | ostro chat --system "Write a commit message." > message.txt
    """
    screen = _make_screen(show_thinking)
    options = ChatOptions(effort=_check_effort(effort), max_tokens=max_tokens, system=system)
    images = [_read_image(path) for path in image or ()]
    question = " ".join(prompt or ()).strip()
    if not question and not sys.stdin.isatty():
        question = sys.stdin.read().strip()
    # Bytes that are no UTF-8 reach us as surrogates, which no request can carry.
    question = question.encode(errors="replace").decode()
    if not question and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError("no question: give a PROMPT, or write it to stdin")
    with open_client(url, read_tls(ca, cert, key)) as client:
        conversation = Conversation(client, options)
        for data in images:
            conversation.attach(data)
        if not question:
            screen.note(f"{_greeting(client, effort)}; /help tells what else there is")
            converse(conversation, screen, _line_reader(screen))
            return
        try:
            turn = conversation.ask(question, screen.show)
        except OstroError:
            screen.end_line()
            raise
        screen.end(turn)
        if turn.is_cancelled:
            raise typer.Exit(130)


class Screen:
    """Where text goes.

    Args:
        answers: The answer's console.
        thinking: The thinking's console; None hides it.
        is_terminal: Whether a person looks on: colours, notes, the line of figures.
    """

    def __init__(self, answers: Console, thinking: Console | None, *, is_terminal: bool) -> None:
        self._answers = answers
        self._thinking = thinking
        self._is_terminal = is_terminal
        self._is_in_thinking = False
        self._last = "\n"

    def show(self, text: str, is_thinking: bool) -> None:  # noqa: FBT001  a callback
        """Write a piece of an answer or of the thinking before it."""
        if not text or (is_thinking and self._thinking is None):
            return
        if self._is_terminal:
            text = printable(text)
        if self._is_in_thinking and not is_thinking:
            self._end_thinking()
        self._is_in_thinking = is_thinking
        console = self._thinking if is_thinking and self._thinking else self._answers
        _write(console, text, _DIM if is_thinking else None)
        self._last = text[-1:] or self._last

    def end(self, turn: Turn) -> None:
        """Close a turn: what has no newline gets one, and in a terminal the figures follow."""
        if self._is_in_thinking:
            self._end_thinking()
        elif self._last != "\n":
            self._answers.out("")
        self._last = "\n"
        self.note("cancelled" if turn.is_cancelled else turn.summary())

    def note(self, text: str) -> None:
        """A line of ours, for people only."""
        if self._is_terminal:
            self._answers.out(text, style="dim", highlight=False)

    def end_line(self) -> None:
        """Break off what was being written."""
        if self._last != "\n":
            self._answers.out("")
        self._last, self._is_in_thinking = "\n", False

    def error(self, message: str) -> None:
        """A line on stderr; the conversation goes on."""
        self.end_line()
        print_error(message)

    def _end_thinking(self) -> None:
        console = self._thinking or self._answers
        console.out("" if self._last == "\n" else "\n")
        self._is_in_thinking, self._last = False, "\n"


def converse(
    conversation: Conversation, screen: Screen, read_line: Callable[[], str | None]
) -> None:
    """Ask line by line until `read_line` gives None or a line says /quit."""
    for line in _lines(read_line):
        if not line.startswith("/"):
            _ask(conversation, screen, line)
            continue
        command, _, argument = line.partition(" ")
        match command:
            case "/quit" | "/exit":
                return
            case "/reset":
                conversation.reset()
                screen.note("the conversation is forgotten")
            case "/effort":
                _set_effort(conversation, screen, argument.strip())
            case "/image":
                _attach(conversation, screen, argument.strip())
            case _:
                screen.note(_HELP)


def _ask(conversation: Conversation, screen: Screen, question: str) -> None:
    try:
        turn = conversation.ask(question, screen.show)
    except OstroError as error:
        screen.error(error.message)
        return
    screen.end(turn)
    if not turn.answer:
        screen.note("no answer came, so this question is forgotten")


def _lines(read_line: Callable[[], str | None]) -> Iterator[str]:
    while (line := read_line()) is not None:
        if line.strip():
            yield line.strip()


def _set_effort(conversation: Conversation, screen: Screen, effort: str) -> None:
    try:
        checked = _check_effort(effort)
    except ConfigError as error:
        screen.error(str(error))
        return
    conversation.options = replace(conversation.options, effort=checked)
    screen.note(f"effort {checked} from now on")


def _attach(conversation: Conversation, screen: Screen, name: str) -> None:
    # Names come with quotes where a terminal had a file dropped on it.
    path = Path(name[1:-1] if len(name) > 1 and name[0] == name[-1] in "'\"" else name)
    try:
        conversation.attach(_read_image(path))
    except ConfigError as error:
        screen.error(str(error))
        return
    screen.note(f"{path.name} goes with the next question")


def _read_image(path: Path) -> bytes:
    """The file's bytes; the server says whether they are an image."""
    try:
        path = path.expanduser()
        if not path.is_file():
            raise ConfigError(f"image {path}: {'not a file' if path.exists() else 'no such file'}")
        if path.stat().st_size > _MAX_IMAGE_BYTES:
            raise ConfigError(f"image {path}: larger than {_MAX_IMAGE_BYTES} bytes; scale it down")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"image {path}: {error.strerror or error}") from None
    except RuntimeError:  # expanduser's, for "~nobody"
        raise ConfigError(f"image {path}: no such user") from None


def _line_reader(screen: Screen) -> Callable[[], str | None]:
    """Reads lines from the terminal, with history and editing where readline is there."""
    with suppress(ImportError):
        import readline  # noqa: F401  importing it is what switches it on

    def read_line() -> str | None:
        while True:
            try:
                # The markers tell readline which characters take no room.
                return input("\001\033[1;36m\002> \001\033[0m\002")
            except EOFError:
                screen.note("")
                return None
            except KeyboardInterrupt:
                screen.note("\nCtrl-D or /quit leaves")

    return read_line


def _write(console: Console, text: str, style: Style | None) -> None:
    """Text as it is: `Console.print` and `out` would turn tabs into spaces."""
    console.print(Segments([Segment(text, style)]), end="", crop=False)


def _make_screen(show_thinking: bool | None) -> Screen:  # noqa: FBT001  three values
    answers = make_console()
    if answers.is_terminal:
        thinking = None if show_thinking is False else answers
    else:
        thinking = make_console(stderr=True) if show_thinking else None
    return Screen(answers, thinking, is_terminal=answers.is_terminal)


def _greeting(client: Client, effort: str | None) -> str:
    model = client.model()
    return f"{model.id}, effort {effort or effort_name(model.default_effort)}"


def _check_effort(effort: str | None) -> str | None:
    if effort is not None and effort not in EFFORTS:
        raise ConfigError(f"effort {effort!r}: must be one of {', '.join(EFFORTS)}")
    return effort
