"""Channels for an event loop: the router listens, an ingress dials.

Nothing here waits for a peer that does not read: it is dropped. What is said is `messages`; how
bytes look is `framing`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from ostro.actors.fabric.addresses import (
    Address,
    UnixAddress,
    listen,
    parse_address,
    tune,
    unlisten,
)
from ostro.actors.fabric.framing import (
    HANDSHAKE_TIMEOUT_S,
    MAX_FRAME_BYTES,
    MAX_STRANGERS,
    ChannelClosedError,
    ChannelError,
    FrameReader,
    Handshake,
    client_handshake,
    server_handshake,
    to_frame,
)
from ostro.actors.fabric.messages import Message

logger = logging.getLogger(__name__)

_READ_BYTES = 256 * 1024
# A frame of any size, and what else may be said before it has gone out.
_MAX_UNSENT_BYTES = MAX_FRAME_BYTES + 64 * 2**20


class AsyncConnection:
    """A channel for one event loop."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        name: str,
        max_unsent_bytes: int = _MAX_UNSENT_BYTES,
    ) -> None:
        tune(writer.get_extra_info("socket"))
        self._reader = reader
        self._writer = writer
        self._name = name
        self._frames = FrameReader()
        self._max_unsent_bytes = max_unsent_bytes

    async def authenticate(self, handshake: Handshake, timeout_s: float) -> None:
        """Run one side of the handshake; raises ChannelError."""
        try:
            async with asyncio.timeout(timeout_s):
                request = next(handshake)
                with contextlib.suppress(StopIteration):
                    while True:
                        if isinstance(request, int):
                            request = handshake.send(await self._reader.readexactly(request))
                        else:
                            self._writer.write(request)
                            request = next(handshake)
        except ChannelError:
            raise
        except TimeoutError as error:
            raise ChannelError(f"{self._name} did not authenticate in time") from error
        except (asyncio.IncompleteReadError, OSError) as error:
            raise ChannelClosedError(f"{self._name} closed the channel") from error

    @property
    def unsent_bytes(self) -> int:
        """What is queued and has not gone out yet."""
        size: int = self._writer.transport.get_write_buffer_size()
        return size

    async def receive(self) -> Message | None:
        """The next message, None once the peer has closed; safe to cancel.

        Raises:
            ChannelError: The peer vanished or broke the protocol.
        """
        while (message := self._frames.next_message()) is None:
            try:
                data = await self._reader.read(_READ_BYTES)
            except OSError as error:
                raise ChannelClosedError(f"{self._name} is gone: {error}") from error
            if not data:
                return None
            self._frames.feed(data)
        return message

    def send(self, message: Message) -> bool:
        """Queue a message; never blocks.

        A peer that leaves more than the bound unread is dropped.

        Returns:
            Whether the channel is still open; the receiving side learns of the end by an error.
        """
        transport = self._writer.transport
        if transport.is_closing():
            return False
        if transport.get_write_buffer_size() > self._max_unsent_bytes:
            logger.warning(
                "dropped %s: it leaves %d bytes unread",
                self._name,
                transport.get_write_buffer_size(),
            )
            transport.abort()
            return False
        self._writer.write(to_frame(message))
        return True

    def close(self) -> None:
        """Close after what is queued has gone out."""
        self._writer.close()


async def connect(address: str, secret: bytes, timeout_s: float) -> AsyncConnection:
    """Dial and authenticate on the running event loop; raises ChannelError."""
    where = parse_address(address)
    try:
        async with asyncio.timeout(timeout_s):
            if isinstance(where, UnixAddress):
                streams = await asyncio.open_unix_connection(where.path)
            else:
                streams = await asyncio.open_connection(where.host, where.port)
    except (TimeoutError, OSError) as error:
        raise ChannelError(f"cannot reach {address}: {str(error) or 'no answer'}") from error
    connection = AsyncConnection(*streams, address)
    try:
        await connection.authenticate(client_handshake(secret), timeout_s)
    except BaseException:
        connection.close()
        raise
    return connection


class AsyncServer:
    """Listens on one event loop; each proven peer gets a call of `on_connection`.

    The channel closes when that call returns, and a ChannelError out of it is no failure.
    """

    def __init__(
        self,
        address: str,
        secret: bytes,
        on_connection: Callable[[AsyncConnection], Awaitable[None]],
        *,
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
        max_unsent_bytes: int = _MAX_UNSENT_BYTES,
    ) -> None:
        self._wanted = parse_address(address)
        self._max_unsent_bytes = max_unsent_bytes
        self._secret = secret
        self._on_connection = on_connection
        self._handshake_timeout_s = handshake_timeout_s
        self._num_strangers = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._address: Address | None = None

    async def start(self) -> str:
        """Listen; returns the address to dial, its port or path filled in."""
        listener, self._address = listen(self._wanted)
        listener.setblocking(False)
        start = (
            asyncio.start_unix_server
            if isinstance(self._address, UnixAddress)
            else asyncio.start_server
        )
        self._server = await start(self._welcome, sock=listener)
        return str(self._address)

    async def close(self) -> None:
        """Stop listening and drop every peer."""
        if self._server is None or self._address is None:
            return
        self._server.close()
        unlisten(self._address)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (task := asyncio.current_task()) is not None:
            self._tasks.add(task)
        try:
            name = f"a peer of {self._address}"
            await self._serve(AsyncConnection(reader, writer, name, self._max_unsent_bytes))
        except ChannelError as error:
            logger.info("channel ended: %s", error)
        except asyncio.CancelledError:
            logger.debug("channel ended: the server closed")
        finally:
            self._tasks -= {task}
            writer.close()

    async def _serve(self, connection: AsyncConnection) -> None:
        if self._num_strangers >= MAX_STRANGERS:
            raise ChannelError("too many peers that have not authenticated")
        self._num_strangers += 1
        try:
            await connection.authenticate(server_handshake(self._secret), self._handshake_timeout_s)
        finally:
            self._num_strangers -= 1
        await self._on_connection(connection)
