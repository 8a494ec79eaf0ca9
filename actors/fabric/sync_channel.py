"""Channels for threads: a shard dials the router, and offers its token stream to ingresses.

Every wait has a deadline and every queue a bound: a peer that does not read is dropped, never
waited for. What is said is `messages`; how bytes look is `framing`.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from collections import deque

from ostro.actors.fabric.addresses import Address, dial, listen, parse_address, tune, unlisten
from ostro.actors.fabric.framing import (
    HANDSHAKE_TIMEOUT_S,
    MAX_STRANGERS,
    ChannelClosedError,
    ChannelError,
    FrameReader,
    Handshake,
    client_handshake,
    server_handshake,
    to_frame,
)
from ostro.actors.fabric.messages import IngressHello, Message

logger = logging.getLogger(__name__)

_READ_BYTES = 256 * 1024
_SEND_TIMEOUT_S = 30.0
_ACCEPT_PAUSE_S = 0.1
_MAX_OUTBOX_BYTES = 16 * 2**20
_LOOK_FOR_END_EVERY_S = 1.0


class SyncConnection:
    """A channel for threads: any may send, one at a time receives."""

    def __init__(self, peer: socket.socket, name: str) -> None:
        peer.setblocking(False)
        tune(peer)
        self._socket = peer
        self._name = name
        self._frames = FrameReader()
        self._send_lock = threading.Lock()
        self._receive_lock = threading.Lock()
        self._closed = False

    @classmethod
    def connect(cls, address: str, secret: bytes, timeout_s: float) -> SyncConnection:
        """Dial and authenticate.

        Raises:
            ChannelError: Nobody answers in time, or the peer does not know the secret.
        """
        deadline = time.monotonic() + timeout_s
        connection = cls(dial(parse_address(address), timeout_s), address)
        try:
            connection.authenticate(client_handshake(secret), deadline)
        except BaseException:
            connection.close()
            raise
        return connection

    def authenticate(self, handshake: Handshake, deadline: float) -> None:
        """Run one side of the handshake until `deadline` (monotonic seconds)."""
        request = next(handshake)
        with contextlib.suppress(StopIteration):
            while True:
                if isinstance(request, int):
                    request = handshake.send(self._read_exactly(request, deadline))
                else:
                    self._write(request, deadline)
                    request = next(handshake)

    def send(self, message: Message, timeout_s: float = _SEND_TIMEOUT_S) -> None:
        """Send; blocks only while the socket's own buffer is full.

        Raises:
            ChannelError: The peer is gone or took nothing for `timeout_s`; the channel is closed.
        """
        self.send_bytes(to_frame(message), timeout_s)

    def send_bytes(self, frames: bytes, timeout_s: float = _SEND_TIMEOUT_S) -> None:
        """Send frames that `to_frame` made; raises as `send` does."""
        try:
            with self._send_lock:
                self._write(frames, time.monotonic() + timeout_s)
        except ChannelError:
            self.close()
            raise

    def receive(self, timeout_s: float) -> Message | None:
        """The next message, None if none came in time.

        Raises:
            ChannelError: The peer is gone or broke the protocol.
        """
        deadline = time.monotonic() + timeout_s
        with self._receive_lock:
            while (message := self._frames.next_message()) is None:
                data = self._read(_READ_BYTES, deadline)
                if data is None:
                    return None
                self._frames.feed(data)
            return message

    def close(self) -> None:
        """Close; wakes threads that send or receive. Harmless to call twice."""
        self.hang_up()
        with self._send_lock, self._receive_lock:
            self._socket.close()

    def hang_up(self) -> None:
        """Make every use of the channel fail from now on, without waiting for its users."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _read_exactly(self, count: int, deadline: float) -> bytes:
        data = b""
        while len(data) < count:
            piece = self._read(count - len(data), deadline)
            if piece is None:
                raise ChannelError(f"{self._name} did not authenticate in time")
            data += piece
        return data

    def _read(self, count: int, deadline: float) -> bytes | None:
        while True:
            try:
                data = self._socket.recv(count)
            except BlockingIOError:
                if not self._wait(select.POLLIN, deadline):
                    return None
                continue
            except OSError as error:
                raise ChannelClosedError(f"{self._name} is gone: {error}") from error
            if not data:
                raise ChannelClosedError(f"{self._name} closed the channel")
            return data

    def _write(self, data: bytes, deadline: float) -> None:
        unsent = memoryview(data)
        while unsent:
            try:
                unsent = unsent[self._socket.send(unsent) :]
            except BlockingIOError:
                if not self._wait(select.POLLOUT, deadline):
                    raise ChannelError(f"{self._name} does not read what it is sent") from None
            except OSError as error:
                raise ChannelClosedError(f"{self._name} is gone: {error}") from error

    def _wait(self, event: int, deadline: float) -> bool:
        if self._closed:
            raise ChannelClosedError(f"the channel to {self._name} was closed")
        poll = select.poll()
        poll.register(self._socket, event)
        return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))


class _Outbox:
    """Frames that wait for one peer's writer thread."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._frames: deque[bytes] = deque()
        self._num_bytes = 0
        self._changed = threading.Condition()
        self._closed = False

    def put(self, frame: bytes) -> bool:
        """Whether there was room; a frame larger than the bound goes into an empty outbox."""
        with self._changed:
            if self._closed or self._num_bytes > self._max_bytes:
                return False
            self._frames.append(frame)
            self._num_bytes += len(frame)
            self._changed.notify()
            return True

    def take(self, timeout_s: float) -> bytes | None:
        """Everything that waits, b"" if nothing came in time, None once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._frames or self._closed, timeout_s)
            if self._closed:
                return None
            taken = b"".join(self._frames)
            self._frames.clear()
            self._num_bytes = 0
            return taken

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()


class _Subscriber:
    """An ingress that listens to the stream."""

    def __init__(self, connection: SyncConnection, outbox: _Outbox) -> None:
        self.connection = connection
        self.outbox = outbox

    def write_until_closed(self) -> None:
        """What its thread does; raises ChannelError when the peer is gone."""
        while (frames := self.outbox.take(_LOOK_FOR_END_EVERY_S)) is not None:
            if frames:
                self.connection.send_bytes(frames)
            else:
                self.connection.receive(timeout_s=0.0)  # raises if the peer closed

    def drop(self) -> None:
        """Never waits."""
        self.outbox.close()
        self.connection.hang_up()


class SyncServer:
    """The token stream of an attention shard: one-way messages to every ingress that asks.

    A peer says IngressHello first. `send` never blocks: each peer has a bounded outbox and a
    thread of its own, and one whose outbox is full is dropped.
    """

    def __init__(
        self,
        address: str,
        secret: bytes,
        *,
        greeting: Message | None = None,
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
        max_outbox_bytes: int = _MAX_OUTBOX_BYTES,
    ) -> None:
        """`greeting`, if given, is the first message to every peer."""
        self._wanted = parse_address(address)
        self._secret = secret
        self._greeting = greeting
        self._handshake_timeout_s = handshake_timeout_s
        self._max_outbox_bytes = max_outbox_bytes
        self._lock = threading.Lock()
        self._subscribers: dict[str, _Subscriber] = {}
        self._strangers: set[SyncConnection] = set()
        self._listener: socket.socket | None = None
        self._address: Address | None = None

    def start(self) -> str:
        """Listen; returns the address to dial, its port or path filled in."""
        self._listener, self._address = listen(self._wanted)
        threading.Thread(target=self._accept, name="ostro-tokens", daemon=True).start()
        return str(self._address)

    def send(self, ingress_id: str, message: Message) -> bool:
        """Queue a message; False if that ingress is not here or had to be dropped."""
        with self._lock:
            subscriber = self._subscribers.get(ingress_id)
        if subscriber is None:
            return False
        if subscriber.outbox.put(to_frame(message)):
            return True
        logger.warning("dropped ingress %s: it does not read its tokens", ingress_id)
        self._forget(ingress_id, subscriber)
        return False

    def peers(self) -> list[str]:
        """Ids of the ingresses that listen."""
        with self._lock:
            return sorted(self._subscribers)

    def close(self) -> None:
        """Stop listening and drop every peer; harmless to call twice."""
        listener, self._listener = self._listener, None
        if listener is None or self._address is None:
            return
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes the accepting thread
        listener.close()
        unlisten(self._address)
        with self._lock:
            subscribers, strangers = dict(self._subscribers), set(self._strangers)
        for stranger in strangers:
            stranger.hang_up()
        for ingress_id, subscriber in subscribers.items():
            self._forget(ingress_id, subscriber)

    def _accept(self) -> None:
        while (listener := self._listener) is not None:
            try:
                peer, _ = listener.accept()
                connection = SyncConnection(peer, f"a peer of {self._address}")
            except OSError as error:
                if self._listener is None:
                    return
                logger.warning("%s cannot take a peer: %s", self._address, error)
                time.sleep(_ACCEPT_PAUSE_S)
                continue
            with self._lock:
                crowded = len(self._strangers) >= MAX_STRANGERS or self._listener is None
                if not crowded:
                    self._strangers.add(connection)
            if crowded:
                connection.close()
                continue
            threading.Thread(
                target=self._serve, args=(connection,), name="ostro-tokens-peer", daemon=True
            ).start()

    def _serve(self, connection: SyncConnection) -> None:
        try:
            ingress_id = self._meet(connection)
            subscriber = self._subscribe(ingress_id, connection)
            try:
                subscriber.write_until_closed()
            finally:
                self._forget(ingress_id, subscriber)
        except ChannelError as error:
            logger.info("token stream ended: %s", error)
        finally:
            with self._lock:
                self._strangers.discard(connection)
            connection.close()

    def _meet(self, connection: SyncConnection) -> str:
        deadline = time.monotonic() + self._handshake_timeout_s
        connection.authenticate(server_handshake(self._secret), deadline)
        hello = connection.receive(self._handshake_timeout_s)
        if not isinstance(hello, IngressHello):
            raise ChannelError(f"a peer of {self._address} did not say IngressHello first")
        return hello.ingress_id

    def _subscribe(self, ingress_id: str, connection: SyncConnection) -> _Subscriber:
        subscriber = _Subscriber(connection, _Outbox(self._max_outbox_bytes))
        if self._greeting is not None:
            subscriber.outbox.put(to_frame(self._greeting))
        with self._lock:
            self._strangers.discard(connection)
            if self._listener is None:
                raise ChannelClosedError("the token stream was closed")
            replaced = self._subscribers.get(ingress_id)
            self._subscribers[ingress_id] = subscriber
        if replaced is not None:
            replaced.drop()
        return subscriber

    def _forget(self, ingress_id: str, subscriber: _Subscriber) -> None:
        with self._lock:
            if self._subscribers.get(ingress_id) is subscriber:
                del self._subscribers[ingress_id]
        subscriber.drop()
