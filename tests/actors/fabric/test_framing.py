"""Frames in any pieces; handshakes that only the secret opens; addresses."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostro.actors.fabric import framing
from ostro.actors.fabric.addresses import TcpAddress, UnixAddress, listen, parse_address, unlisten
from ostro.actors.fabric.framing import (
    ChannelError,
    ChannelRefusedError,
    FrameReader,
    Handshake,
    client_handshake,
    server_handshake,
    to_frame,
)
from ostro.actors.fabric.messages import AskState, IngressHello, StepPlan

SECRET = b"s" * 32
MESSAGES = [AskState(1), IngressHello("a" * 300), StepPlan(1, 2, True, [[1, 2], [3, 4]], 0)]


@given(st.lists(st.integers(1, 400)))
def test_frames_come_out_whole_however_they_are_cut(cuts):
    data = b"".join(to_frame(message) for message in MESSAGES)
    reader, received = FrameReader(), []
    for size in [*cuts, len(data)]:
        reader.feed(data[:size])
        data = data[size:]
        while (message := reader.next_message()) is not None:
            received.append(message)
    assert received == MESSAGES


def test_reader_refuses_a_frame_beyond_the_bound():
    reader = FrameReader()
    reader.feed(struct.pack(">I", framing.MAX_FRAME_BYTES + 1))
    with pytest.raises(ChannelError, match="announced a frame of 134217729 bytes"):
        reader.next_message()


def test_sender_refuses_a_frame_beyond_the_bound(monkeypatch):
    monkeypatch.setattr(framing, "MAX_FRAME_BYTES", 100)
    with pytest.raises(ChannelError, match="IngressHello has"):
        to_frame(IngressHello("a" * 200))


def test_reader_refuses_what_is_no_message():
    reader = FrameReader()
    reader.feed(struct.pack(">I", 3) + b"abc")
    with pytest.raises(ChannelError, match="no message of this version"):
        reader.next_message()


def shake(client: Handshake, server: Handshake) -> None:
    """Run two handshakes against each other, the client first."""
    to_server, to_client = b"", b""
    turns = [[client, next(client)], [server, next(server)]]
    done = [False, False]
    while not all(done):
        for side, turn in enumerate(turns):
            try:
                while not done[side]:
                    handshake, request = turn
                    if isinstance(request, bytes):
                        if side == 0:
                            to_server += request
                        else:
                            to_client += request
                        turn[1] = next(handshake)
                        continue
                    inbox = to_client if side == 0 else to_server
                    if len(inbox) < request:
                        break
                    if side == 0:
                        to_client = to_client[request:]
                    else:
                        to_server = to_server[request:]
                    turn[1] = handshake.send(inbox[:request])
            except StopIteration:
                done[side] = True


def test_handshake_opens_for_the_secret():
    shake(client_handshake(SECRET), server_handshake(SECRET))


def test_server_refuses_a_client_without_the_secret():
    with pytest.raises(ChannelRefusedError, match="does not know the deployment's secret"):
        shake(client_handshake(b"other"), server_handshake(SECRET))


def test_client_refuses_a_server_that_sends_its_own_proof_back():
    client = client_handshake(SECRET)
    hello = next(client)
    next(client)
    proof = client.send(hello)  # an echo as the server's hello
    next(client)
    with pytest.raises(ChannelRefusedError):
        client.send(proof)


def test_server_reveals_no_proof_before_it_saw_one():
    server = server_handshake(SECRET)
    next(server)
    answer = server.send(b"OSTRO/1" + b"n" * 32)
    assert answer.startswith(b"OSTRO/1")
    next(server)
    with pytest.raises(ChannelRefusedError):
        server.send(b"p" * 32)


def test_other_protocol_is_refused():
    server = server_handshake(SECRET)
    with pytest.raises(ChannelRefusedError, match="does not speak this version"):
        server.send(b"GET / HTTP/1.1".ljust(next(server)))


def test_empty_secret_is_refused():
    client = client_handshake(b"")
    next(client)
    next(client)
    with pytest.raises(ValueError, match="secret is empty"):
        client.send(b"OSTRO/1" + b"n" * 32)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/a", UnixAddress("/run/a")),
        ("unix:", UnixAddress("")),
        ("tcp:127.0.0.1:80", TcpAddress("127.0.0.1", 80)),
        ("tcp:[::1]:0", TcpAddress("::1", 0)),
        ("tcp:node-1:7000", TcpAddress("node-1", 7000)),
    ],
)
def test_address_reads_and_writes(text, address):
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize("text", ["", "http://a", "tcp:a", "tcp:a:b", "tcp::1", "tcp:a:70000"])
def test_address_names_what_is_wrong(text):
    with pytest.raises(ValueError, match="must be 'unix:/path' or 'tcp:host:port'"):
        parse_address(text)


def test_address_refuses_a_path_that_no_socket_takes():
    with pytest.raises(ValueError, match="107 bytes"):
        parse_address("unix:/" + "a" * 107)


def test_own_unix_path_is_private_and_is_removed():
    listener, address = listen(UnixAddress(""))
    assert isinstance(address, UnixAddress)
    assert os.stat(address.path).st_mode & 0o777 == 0o600
    listener.close()
    unlisten(address)
    assert not os.path.exists(os.path.dirname(address.path))


def test_listen_says_which_address_is_taken(tmp_path):
    taken = UnixAddress(str(tmp_path / "a"))
    listener, _ = listen(taken)
    with pytest.raises(ChannelError, match=f"cannot listen on {taken}"):
        listen(taken)
    listener.close()
