"""`ostro chat` against a grpc.aio server of the test: real channel, scripted answers."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_thread import serve_in_thread
from rich.console import Console
from typer.testing import CliRunner

from ostro.actors.errors import InvalidRequestError, NotReadyError, OstroError
from ostro.cluster.cli import app
from ostro.cluster.cli_chat import Screen, converse
from ostro.cluster.cli_connection import open_client
from ostro.cluster.conversation import ChatOptions, Conversation
from ostro.protos import cluster_pb2, cluster_pb2_grpc, generation_pb2, generation_pb2_grpc

THINKING, ANSWER = generation_pb2.CHANNEL_THINKING, generation_pb2.CHANNEL_ANSWER
Event = generation_pb2.StreamChatResponse


def delta(channel: int, text: str) -> Event:
    return Event(delta=generation_pb2.Delta(channel=channel, text=text))


def script(*deltas: Event, reason: int = generation_pb2.FINISH_REASON_STOP) -> list[Event]:
    report = generation_pb2.ReasoningReport(
        thinking_tokens=2, ended_by=generation_pb2.ReasoningReport.ENDED_BY_BUDGET
    )
    reasoning = generation_pb2.ReasoningOptions(effort=generation_pb2.REASONING_EFFORT_LOW)
    usage = generation_pb2.Usage(prompt_tokens=7, completion_tokens=5, thinking_tokens=2)
    timing = generation_pb2.Timing(
        first_token=Duration(nanos=250_000_000), total=Duration(seconds=2, nanos=250_000_000)
    )
    return [
        Event(started=generation_pb2.Started(model="fake", reasoning=reasoning)),
        *deltas,
        Event(finish=generation_pb2.Finish(reason=reason, report=report)),
        Event(ended=generation_pb2.Ended(usage=usage, timing=timing)),
    ]


THOUGHTFUL = script(
    delta(THINKING, "Let me "),
    delta(THINKING, "see."),
    delta(ANSWER, "It "),
    delta(ANSWER, "is 4."),
)


class FakeCluster(
    generation_pb2_grpc.GenerationServiceServicer, cluster_pb2_grpc.ClusterServiceServicer
):
    """Answers every chat with the next script; keeps what it was asked."""

    url: str

    def __init__(self) -> None:
        self.scripts: list[list[Event]] = []
        self.requests: list[generation_pb2.StreamChatRequest] = []
        self.failure: tuple[grpc.StatusCode, str] | None = None
        self.hangs = False
        self.was_cancelled = threading.Event()

    async def StreamChat(self, request, context):  # noqa: N802
        self.requests.append(request)
        if self.failure:
            await context.abort(*self.failure)
        for event in self.scripts.pop(0):
            yield event
        if self.hangs:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.was_cancelled.set()
                raise

    async def GetModel(self, request, context):  # noqa: N802
        return cluster_pb2.GetModelResponse(id="fake")


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    fake = FakeCluster()
    with serve_in_thread(
        lambda server: generation_pb2_grpc.add_GenerationServiceServicer_to_server(fake, server),
        lambda server: cluster_pb2_grpc.add_ClusterServiceServicer_to_server(fake, server),
    ) as fake.url:
        yield fake


@pytest.fixture
def conversation(cluster) -> Iterator[Conversation]:
    with open_client(cluster.url) as client:
        yield Conversation(client, ChatOptions())


def ignore(_text: str, _is_thinking: bool) -> None:
    return


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, highlight=False)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def shown(part: generation_pb2.Part) -> str:
    if part.WhichOneof("part") == "image":
        return f"[{part.image.data.decode()}]"
    return part.text or f"<{part.thinking.text}>"


def roles_and_parts(request: generation_pb2.StreamChatRequest) -> list[tuple[str, list[str]]]:
    return [
        (
            generation_pb2.Role.Name(message.role),
            [shown(part) for part in message.parts],
        )
        for message in request.conversation.messages
    ]


# ---- one question


def test_chat_writes_the_answer_alone_into_a_pipe(cluster):
    cluster.scripts.append(THOUGHTFUL)
    result = CliRunner().invoke(app, ["chat", "--url", cluster.url, "two", "and two?"])
    assert (result.exit_code, result.stdout, result.stderr) == (0, "It is 4.\n", "")
    assert roles_and_parts(cluster.requests[0]) == [("ROLE_USER", ["two and two?"])]


def test_chat_writes_thinking_to_stderr_when_asked_to(cluster):
    cluster.scripts.append(THOUGHTFUL)
    arguments = ["chat", "--url", cluster.url, "--show-thinking", "two and two?"]
    result = CliRunner().invoke(app, arguments)
    assert (result.stdout, result.stderr) == ("It is 4.\n", "Let me see.\n\n")


def test_chat_reads_the_question_from_a_pipe(cluster):
    cluster.scripts.append(THOUGHTFUL)
    CliRunner().invoke(app, ["chat", "--url", cluster.url], input="two and\ntwo?\n")
    assert roles_and_parts(cluster.requests[0]) == [("ROLE_USER", ["two and\ntwo?"])]


def test_chat_sends_what_the_options_say(cluster):
    cluster.scripts.append(THOUGHTFUL)
    options = ["--effort", "high", "--max-tokens", "9", "--system", "Be brief."]
    CliRunner().invoke(app, ["chat", "--url", cluster.url, *options, "Hi"])
    request = cluster.requests[0]
    assert request.options.reasoning.effort == generation_pb2.REASONING_EFFORT_HIGH
    assert request.options.stopping.max_tokens == 9
    assert roles_and_parts(request) == [("ROLE_SYSTEM", ["Be brief."]), ("ROLE_USER", ["Hi"])]


def test_chat_leaves_to_the_server_what_no_option_says(cluster):
    cluster.scripts.append(THOUGHTFUL)
    CliRunner().invoke(app, ["chat", "--url", cluster.url, "Hi"])
    options = cluster.requests[0].options
    assert options.reasoning.effort == generation_pb2.REASONING_EFFORT_UNSPECIFIED
    assert not options.stopping.HasField("max_tokens")


def test_chat_shows_the_images_of_its_options_before_the_question(cluster, tmp_path):
    cluster.scripts.append(THOUGHTFUL)
    (tmp_path / "a.png").write_bytes(b"one")
    (tmp_path / "b.png").write_bytes(b"two")
    images = ["--image", str(tmp_path / "a.png"), "--image", str(tmp_path / "b.png")]
    CliRunner().invoke(app, ["chat", "--url", cluster.url, *images, "What is", "this?"])
    assert roles_and_parts(cluster.requests[0]) == [
        ("ROLE_USER", ["[one]", "[two]", "What is this?"])
    ]


# ---- what goes wrong


def test_chat_without_a_key_says_where_it_takes_one_from(cluster):
    cluster.failure = (grpc.StatusCode.UNAUTHENTICATED, "no API key")
    result = CliRunner().invoke(app, ["chat", "--url", cluster.url, "Hi"])
    assert result.exit_code == 1
    assert result.stderr == "error: no API key; commands show the key in OSTRO_API_KEY\n"


def test_chat_says_in_one_line_that_nothing_answers(free_port):
    result = CliRunner().invoke(app, ["chat", "--url", f"127.0.0.1:{free_port()}", "Hi"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: nothing answers at 127.0.0.1:")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--effort", "ultra", "Hi"], "effort 'ultra': must be one of none, minimal"),
        (["--url", "http://x/y", "Hi"], "must be HOST:PORT"),
        ([], "no question"),
    ],
)
def test_chat_refuses_options_without_sense(arguments, told):
    result = CliRunner().invoke(app, ["chat", *arguments], input="")
    assert result.exit_code == 2
    assert told in result.stderr


def test_chat_names_an_image_that_cannot_be_read(cluster, tmp_path):
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(11 * 2**20)
    for path, why in (
        (tmp_path / "no.png", "no such file"),
        (tmp_path, "not a file"),
        (large, "larger than 10485760 bytes"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        result = CliRunner().invoke(app, ["chat", "--url", cluster.url, "--image", str(path), "Hi"])
        assert result.exit_code == 2
        assert why in result.stderr.replace("\n", " ")
    assert not cluster.requests


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError),
        (grpc.StatusCode.UNAVAILABLE, NotReadyError),
        (grpc.StatusCode.INTERNAL, OstroError),
    ],
)
def test_conversation_raises_the_servers_refusal(cluster, conversation, code, error):
    cluster.failure = (code, "the reason")
    with pytest.raises(error, match="the reason"):
        conversation.ask("Hi", ignore)


def test_conversation_raises_a_failure_within_the_stream(cluster, conversation):
    failure = generation_pb2.Failure(reason="KV_EXHAUSTED", message="no pages")
    cluster.scripts.append([delta(ANSWER, "It "), Event(failure=failure)])
    with pytest.raises(OstroError, match="no pages"):
        conversation.ask("Hi", ignore)


def test_conversation_cancels_the_call_when_interrupted(cluster, conversation):
    cluster.scripts.append([delta(ANSWER, "It ")])
    cluster.hangs = True

    def interrupt(_text: str, _is_thinking: bool) -> None:
        raise KeyboardInterrupt

    turn = conversation.ask("Hi", interrupt)
    assert turn.is_cancelled
    assert turn.answer == "It "
    assert cluster.was_cancelled.wait(10)


# ---- many turns


def test_conversation_replays_thinking_in_the_next_turn(cluster, conversation):
    cluster.scripts += [THOUGHTFUL, THOUGHTFUL]
    conversation.ask("two and two?", ignore)
    conversation.ask("Sure?", ignore)
    assert roles_and_parts(cluster.requests[1]) == [
        ("ROLE_USER", ["two and two?"]),
        ("ROLE_ASSISTANT", ["<Let me see.>", "It is 4."]),
        ("ROLE_USER", ["Sure?"]),
    ]
    assert cluster.requests[1].conversation.messages[1].parts[0].thinking.closed


def test_conversation_does_not_keep_a_turn_without_an_answer(cluster, conversation):
    cut = script(delta(THINKING, "Hm"), reason=generation_pb2.FINISH_REASON_LENGTH)
    cluster.scripts += [cut, THOUGHTFUL]
    turn = conversation.ask("two and two?", ignore)
    conversation.ask("Once more?", ignore)
    assert roles_and_parts(cluster.requests[1]) == [("ROLE_USER", ["Once more?"])]
    assert "max tokens reached" in turn.summary()


def test_turn_summary_tells_tokens_thinking_and_effort(cluster, conversation):
    cluster.scripts.append(THOUGHTFUL)
    summary = conversation.ask("Hi", ignore).summary()
    assert summary == (
        "7 prompt + 5 tokens, 2 thinking, cut by its budget, effort low, "
        "2.0 tok/s, first after 0.25 s"
    )


def test_converse_obeys_commands_and_outlives_errors(cluster, conversation):
    cluster.scripts += [THOUGHTFUL, THOUGHTFUL]
    lines = iter(["Hi", "", "/effort high", "/effort ultra", "/nonsense", "/reset", "Ho", "/quit"])
    console = terminal()
    converse(conversation, Screen(console, console, is_terminal=True), lambda: next(lines))
    efforts = [request.options.reasoning.effort for request in cluster.requests]
    assert efforts == [0, generation_pb2.REASONING_EFFORT_HIGH]
    assert len(cluster.requests[1].conversation.messages) == 1
    assert "/effort NAME" in written(console)


def test_converse_shows_an_image_with_the_next_question_and_in_later_turns(
    cluster, conversation, tmp_path, capsys
):
    cluster.scripts += [THOUGHTFUL, THOUGHTFUL, THOUGHTFUL]
    (tmp_path / "my cat.png").write_bytes(b"cat")
    lines = iter(
        [
            f"/image '{tmp_path}/my cat.png'",
            "What is this?",
            "Sure?",
            f"/image {tmp_path}/no.png",
            f"/image {tmp_path}/my cat.png",
            "/reset",
            "Hi",
            None,
        ]
    )
    console = terminal()
    converse(conversation, Screen(console, console, is_terminal=True), lambda: next(lines))
    sent = [roles_and_parts(request) for request in cluster.requests]
    assert sent[0] == [("ROLE_USER", ["[cat]", "What is this?"])]
    assert [sent[1][0], sent[1][2]] == [sent[0][0], ("ROLE_USER", ["Sure?"])]
    assert sent[2] == [("ROLE_USER", ["Hi"])]
    assert "my cat.png goes with the next question" in written(console)
    assert capsys.readouterr().err == f"error: image {tmp_path}/no.png: no such file\n"


def test_converse_names_a_home_that_is_not_there(conversation, capsys):
    lines = iter(["/image ~nobody-at-all/cat.png", None])
    console = terminal()
    converse(conversation, Screen(console, console, is_terminal=True), lambda: next(lines))
    assert capsys.readouterr().err == "error: image ~nobody-at-all/cat.png: no such user\n"


def test_converse_does_not_show_a_refused_image_again(cluster, conversation, tmp_path):
    cluster.failure = (grpc.StatusCode.INVALID_ARGUMENT, "broken")
    (tmp_path / "a.png").write_bytes(b"cat")
    lines = iter([f"/image {tmp_path}/a.png", "What is this?", "Hi", None])
    console = terminal()
    converse(conversation, Screen(console, console, is_terminal=True), lambda: next(lines))
    assert roles_and_parts(cluster.requests[1]) == [("ROLE_USER", ["Hi"])]


def test_converse_goes_on_after_a_refused_turn(cluster, conversation, capsys):
    cluster.failure = (grpc.StatusCode.INVALID_ARGUMENT, "too long")
    lines = iter(["Hi", "Ho", None])
    console = terminal()
    converse(conversation, Screen(console, console, is_terminal=True), lambda: next(lines))
    assert len(cluster.requests) == 2
    assert capsys.readouterr().err == "error: too long\nerror: too long\n"


# ---- the screen


def test_screen_dims_thinking_and_sets_the_answer_apart():
    console = terminal()
    screen = Screen(console, console, is_terminal=True)
    screen.show("Hm.", True)
    screen.show("Yes.", False)
    assert written(console) == "\x1b[2mHm.\x1b[0m\n\nYes."


def test_screen_keeps_a_models_control_characters_from_the_terminal():
    console = terminal()
    Screen(console, console, is_terminal=True).show("\x1b]0;title\x07a\x9bb\tc\n\r", False)
    assert written(console) == "]0;titleab\tc\n"


def test_screen_hides_thinking_without_a_console_for_it():
    console = terminal()
    Screen(console, None, is_terminal=True).show("Hm.", True)
    assert written(console) == ""
