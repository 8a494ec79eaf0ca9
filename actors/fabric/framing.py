"""The bytes of a channel: frames and the handshake, with no socket in sight.

Before any message both sides prove that they know the deployment's secret:

    client -> server   "OSTRO/1" + 32 random bytes
    server -> client   "OSTRO/1" + 32 random bytes
    client -> server   HMAC-SHA256(secret, "client" + both)
    server -> client   HMAC-SHA256(secret, "server" + both)

The side names keep a proof from being sent back as one's own. Lengths are fixed, so nothing that
an unknown peer sent is parsed. Afterwards every message is a frame: its length in 4 bytes, big
end first, then msgpack. Frames are neither encrypted nor signed.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from collections.abc import Generator

import msgspec

from ostro.actors.engine.images import MAX_REQUEST_IMAGE_BYTES
from ostro.actors.errors import OstroError
from ostro.actors.fabric.messages import Message, decode, encode

# The images of one request, and whatever else it says.
MAX_FRAME_BYTES = MAX_REQUEST_IMAGE_BYTES + 8 * 2**20
HANDSHAKE_TIMEOUT_S = 5.0
# Peers of one server that have not proven themselves yet; more are turned away at once.
MAX_STRANGERS = 64

_LENGTH = struct.Struct(">I")
_MAGIC = b"OSTRO/1"
_NONCE_BYTES = 32
_HELLO_BYTES = len(_MAGIC) + _NONCE_BYTES
_PROOF_BYTES = 32


class ChannelError(OstroError, ConnectionError):
    """A channel cannot be used: unreachable, closed, or its peer broke the protocol."""

    code = "channel_failed"


class ChannelClosedError(ChannelError):
    """The peer is gone, or this side closed the channel."""

    code = "channel_closed"


class ChannelRefusedError(ChannelError):
    """The peer does not know the deployment's secret."""

    code = "channel_refused"


# A handshake yields bytes to send, or how many bytes it must read and be sent.
Handshake = Generator[bytes | int, bytes, None]


def client_handshake(secret: bytes) -> Handshake:
    """The dialling side; raises ChannelRefusedError."""
    hello = _new_hello()
    yield hello
    answer = _checked_hello((yield _HELLO_BYTES))
    yield _proof(secret, b"client", hello, answer)
    _check_proof((yield _PROOF_BYTES), _proof(secret, b"server", hello, answer))


def server_handshake(secret: bytes) -> Handshake:
    """The listening side, which proves itself only to a proven client; raises the same."""
    hello = _checked_hello((yield _HELLO_BYTES))
    answer = _new_hello()
    yield answer
    _check_proof((yield _PROOF_BYTES), _proof(secret, b"client", hello, answer))
    yield _proof(secret, b"server", hello, answer)


def _new_hello() -> bytes:
    return _MAGIC + secrets.token_bytes(_NONCE_BYTES)


def _checked_hello(hello: bytes) -> bytes:
    if not hello.startswith(_MAGIC):
        raise ChannelRefusedError("the peer does not speak this version of the channel")
    return hello


def _proof(secret: bytes, side: bytes, hello: bytes, answer: bytes) -> bytes:
    if not secret:
        raise ValueError("the secret is empty: a channel needs the deployment's secret")
    return hmac.digest(secret, side + hello + answer, "sha256")


def _check_proof(proof: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(proof, expected):
        raise ChannelRefusedError("the peer does not know the deployment's secret")


def to_frame(message: Message) -> bytes:
    """A message as it travels.

    Raises:
        ChannelError: It is larger than MAX_FRAME_BYTES.
    """
    payload = encode(message)
    if len(payload) > MAX_FRAME_BYTES:
        raise ChannelError(
            f"{type(message).__name__} has {len(payload)} bytes; a frame takes {MAX_FRAME_BYTES}"
        )
    return _LENGTH.pack(len(payload)) + payload


class FrameReader:
    """Turns bytes, in whatever pieces they come, into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Take what a socket gave."""
        self._buffer += data

    def next_message(self) -> Message | None:
        """The next whole message, None until more bytes come.

        Raises:
            ChannelError: A frame is too large or holds no message.
        """
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > MAX_FRAME_BYTES:
            raise ChannelError(
                f"the peer announced a frame of {length} bytes; at most {MAX_FRAME_BYTES}"
            )
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        try:
            with memoryview(self._buffer)[_LENGTH.size : end] as payload:
                message = decode(payload)
        except msgspec.DecodeError as error:
            raise ChannelError(f"the peer sent no message of this version: {error}") from error
        del self._buffer[:end]
        return message
