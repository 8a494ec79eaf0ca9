"""What a client asks to go on after a break, and how it reads the errors of others."""

from __future__ import annotations

import grpc
import pytest

from ostro.actors.errors import NotReadyError, OstroError, OverloadedError, TooLargeError
from ostro.cluster.client_errors import ConnectionLostError, error_of_call, error_of_failure
from ostro.cluster.client_resume import Received, continued_chat, continued_text
from ostro.cluster.client_streams import TokenStream
from ostro.cluster.error_table import answer_for
from ostro.protos import generation_pb2 as pb

Event = pb.StreamChatResponse


def chat(*messages: pb.Message, **options) -> pb.StreamChatRequest:
    hello = pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="Say hello.")])
    return pb.StreamChatRequest(
        conversation=pb.Conversation(messages=[hello, *messages]),
        options=pb.GenerationOptions(**options),
    )


def received(*deltas: tuple[int, str, int]) -> Received:
    gathered = Received()
    for channel, text, num_ids in deltas:
        gathered.add(pb.Delta(channel=channel, text=text, token_ids=[9] * num_ids))
    return gathered


def thought(text: str, num_ids: int) -> tuple[int, str, int]:
    return (pb.CHANNEL_THINKING, text, num_ids)


def said(text: str, num_ids: int = 1) -> tuple[int, str, int]:
    return (pb.CHANNEL_ANSWER, text, num_ids)


def last_of(request: pb.StreamChatRequest | None) -> tuple[str, str, bool]:
    assert request is not None
    message = request.conversation.messages[-1]
    assert message.prefix
    return (
        "".join(part.thinking.text for part in message.parts),
        "".join(part.text for part in message.parts),
        any(part.thinking.closed for part in message.parts),
    )


def test_thinking_goes_on_open_and_an_answer_closes_it():
    assert last_of(continued_chat(chat(), received(thought("Hm", 2)))) == ("Hm", "", False)
    both = received(thought("Hm", 3), said("So"))
    assert last_of(continued_chat(chat(), both)) == ("Hm", "So", True)


def test_the_callers_own_prefix_is_lengthened():
    own = pb.Message(role=pb.ROLE_ASSISTANT, parts=[pb.Part(text="Once ")], prefix=True)
    asked = chat(own)
    request = continued_chat(asked, received(said("upon")))
    assert last_of(request)[1] == "Once upon"
    assert len(request.conversation.messages) == 2
    assert last_of(asked)[1] == "Once "


def test_blanks_at_the_seam_are_shown_once():
    gathered = received(said("one  "))
    assert last_of(continued_chat(chat(), gathered))[1] == "one"
    deltas = [pb.Delta(channel=pb.CHANNEL_ANSWER, text=text) for text in (" ", "  two", " three")]
    for delta in deltas:
        gathered.add(delta)
    assert [delta.text for delta in deltas] == ["", " two", " three"]
    assert gathered.answer == "one   two three"


def test_an_answer_of_blanks_alone_begins_anew():
    request = continued_chat(chat(), received(said(" ")))
    assert request is not None
    assert len(request.conversation.messages) == 1


def test_limits_shrink_by_what_came():
    stopping = pb.StoppingOptions(max_tokens=20, min_tokens=4)
    gathered = received(thought("Hm", 5), said("So", 2))
    gathered.budget_tokens = 10
    request = continued_chat(chat(stopping=stopping), gathered)
    assert request is not None
    assert (request.options.stopping.max_tokens, request.options.stopping.min_tokens) == (13, 0)
    # of the five, two are the marks
    assert request.options.reasoning.max_thinking_tokens == 7


def test_a_spent_thinking_budget_still_closes_the_thinking():
    gathered = received(thought("Hm", 30))
    gathered.budget_tokens = 10
    request = continued_chat(chat(), gathered)
    assert request is not None
    assert request.options.reasoning.max_thinking_tokens == 1


def test_a_budget_that_is_not_told_stays_unset():
    request = continued_chat(chat(), received(thought("Hm", 30)))
    assert request is not None
    assert not request.options.reasoning.HasField("max_thinking_tokens")


def test_an_answer_of_a_format_is_continued_only_before_it_begins():
    asked = chat(output_format=pb.OutputFormat(json_object=True))
    assert continued_chat(asked, received(thought("Hm", 2))) is not None
    assert continued_chat(asked, received(said("{"))) is None


def test_raw_text_goes_on_as_text():
    asked = pb.StreamGenerateRequest(text="Once ")
    request = continued_text(asked, received(said("upon ")))
    assert request is not None
    assert request.text == "Once upon "


def test_raw_token_ids_with_stop_strings_are_not_continued():
    asked = pb.StreamGenerateRequest(tokens=pb.Tokens(ids=[1]))
    asked.options.stopping.stop.append("END")
    assert continued_text(asked, received(said("", 1))) is None


def test_a_stream_that_ends_without_its_last_message_is_broken():
    stream = TokenStream(chat(), continued_chat, resumes=True)
    stream.take(Event(started=pb.Started()))
    with pytest.raises(ConnectionLostError):
        stream.goes_on()


def test_a_failure_told_in_the_stream_is_raised_where_the_status_is_lost():
    stream = TokenStream(chat(), continued_chat, resumes=True)
    failure = pb.Failure(code=14, reason="SHARD_LOST", message="rank 1 is gone", retryable=True)
    assert stream.take(Event(failure=failure)) == []
    with pytest.raises(OstroError, match="rank 1 is gone") as raised:
        stream.goes_on()
    assert raised.value.code == "shard_lost"


# ---- errors without our details


class Failed(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, text: str, packed: bytes = b"") -> None:
        self.code = lambda: code
        self.details = lambda: text
        self.trailing_metadata = lambda: (("grpc-status-details-bin", packed),) if packed else ()


@pytest.mark.parametrize(
    ("text", "way_out"),
    [
        ("failed to connect to all addresses; last error: UNKNOWN: ipv4:10.0.0.1:9000: Failed to "
         "connect to remote host: Connection refused", "ostro serve"),
        ("errors resolving box:9000: [field:hostname lookup error:address lookup failed for "
         "box:9000: Domain name not found]", "spelt right"),
        ("DNS resolution failed for box", "spelt right"),
        ("failed to connect to all addresses; last error: UNAVAILABLE: ipv4:10.0.0.1:9000: "
         "Handshake read failed (Socket closed)", "it may speak plain text"),
        ("failed to connect to all addresses; last error: UNAVAILABLE: ipv4:10.0.0.1:9000: "
         "Socket closed", "write https://"),
    ],
)  # fmt: skip
def test_what_cannot_be_reached_is_told_with_a_way_out(text, way_out):
    error = error_of_call(Failed(grpc.StatusCode.UNAVAILABLE, text), "box:9000")
    assert error.code == "unreachable"
    assert way_out in error.message


@pytest.mark.parametrize(
    ("code", "text", "cls", "retryable"),
    [
        ("UNAVAILABLE", "Failed to connect to remote host", ConnectionLostError, True),
        ("UNAVAILABLE", "Socket closed", ConnectionLostError, True),
        ("INTERNAL", "Received RST_STREAM with error code 2", ConnectionLostError, True),
        ("UNKNOWN", "Stream removed", ConnectionLostError, True),
        ("INTERNAL", "serialization failed", OstroError, False),
        ("RESOURCE_EXHAUSTED", "Received message larger than max", TooLargeError, False),
        ("UNIMPLEMENTED", "Method not found", OstroError, False),
        ("UNAUTHENTICATED", "no key", OstroError, False),
    ],
)
def test_errors_of_proxies_and_connections_are_named(code, text, cls, retryable):
    error = error_of_call(Failed(grpc.StatusCode[code], text), "box:9000")
    assert isinstance(error, cls)
    assert answer_for(error).retryable is retryable
    assert text in error.message or "ostro serve" in error.message


def test_details_that_are_no_details_are_done_without():
    error = error_of_call(Failed(grpc.StatusCode.NOT_FOUND, "no", b"\xff\xff"), "box:9000")
    assert (type(error).__name__, error.message) == ("NotFoundError", "no")


def test_failures_are_told_by_their_code():
    full = pb.Failure(code=8, reason="QUEUE_FULL", message="full", retryable=True)
    assert isinstance(error_of_failure(full), OverloadedError)
    assert isinstance(error_of_failure(pb.Failure(code=14, reason="NEW")), NotReadyError)
    assert error_of_failure(pb.Failure(code=14, reason="NEW")).code == "new"
