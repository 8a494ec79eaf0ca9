"""The three faces of a channel against each other, and against peers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest

from ostro.actors.fabric.addresses import dial, parse_address
from ostro.actors.fabric.channel import (
    AsyncConnection,
    AsyncServer,
    ChannelClosedError,
    ChannelError,
    ChannelRefusedError,
    SyncConnection,
    SyncServer,
    connect,
)
from ostro.actors.fabric.messages import (
    AskState,
    ControlDone,
    EndThinking,
    IngressHello,
    Message,
    StepEvents,
)

SECRET = b"deployment secret"
ADDRESSES = ["unix:", "tcp:127.0.0.1:0"]
WAIT_S = 10.0


async def echo(connection: AsyncConnection) -> None:
    """Answer everything with itself."""
    while (message := await connection.receive()) is not None:
        connection.send(message)


def with_server(
    on_connection: Callable[[AsyncConnection], Awaitable[None]],
    use: Callable[[str], Awaitable[None]],
    address: str = "unix:",
    **options: float,
) -> None:
    """Run `use` beside a server on one event loop."""

    async def run() -> None:
        server = AsyncServer(address, SECRET, on_connection, **options)
        try:
            await asyncio.wait_for(use(await server.start()), WAIT_S)
        finally:
            await server.close()

    asyncio.run(run())


# ---- asyncio on both sides


@pytest.mark.parametrize("address", [*ADDRESSES, "tcp:[::1]:0"])
def test_async_peers_exchange_messages(address):
    async def use(real: str) -> None:
        connection = await connect(real, SECRET, WAIT_S)
        for tag in range(5):
            assert connection.send(AskState(tag))
        assert [await connection.receive() for _ in range(5)] == [AskState(t) for t in range(5)]
        connection.close()

    with_server(echo, use, address)


def test_async_server_fills_in_the_port():
    async def use(real: str) -> None:
        assert real.startswith("tcp:127.0.0.1:")
        assert not real.endswith(":0")

    with_server(echo, use, "tcp:127.0.0.1:0")


def test_async_receive_is_none_after_the_peer_closed():
    async def greet(connection: AsyncConnection) -> None:
        connection.send(AskState(1))

    async def use(real: str) -> None:
        connection = await connect(real, SECRET, WAIT_S)
        assert await connection.receive() == AskState(1)
        assert await connection.receive() is None
        connection.close()

    with_server(greet, use)


def test_async_receive_can_be_cancelled_without_losing_bytes():
    async def use(real: str) -> None:
        connection = await connect(real, SECRET, WAIT_S)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(connection.receive(), 0.01)
        connection.send(AskState(3))
        assert await connection.receive() == AskState(3)
        connection.close()

    with_server(echo, use)


def test_async_send_tells_that_the_channel_is_closed():
    async def use(real: str) -> None:
        connection = await connect(real, SECRET, WAIT_S)
        connection.close()
        assert not connection.send(AskState(1))

    with_server(echo, use)


def test_async_client_with_another_secret_is_refused():
    reached: list[AsyncConnection] = []

    async def note(connection: AsyncConnection) -> None:
        reached.append(connection)

    async def use(real: str) -> None:
        with pytest.raises(ChannelError):
            await connect(real, b"another", WAIT_S)

    with_server(note, use)
    assert not reached


def test_async_server_drops_a_silent_peer():
    async def use(real: str) -> None:
        reader, writer = await asyncio.open_unix_connection(real.removeprefix("unix:"))
        assert await reader.read() == b""  # nothing is said to a stranger
        writer.close()

    with_server(echo, use, handshake_timeout_s=0.05)


def test_async_server_drops_a_peer_that_reads_nothing(caplog):
    outcome = asyncio.Queue()

    async def flood(connection: AsyncConnection) -> None:
        for _ in range(10_000):
            if not connection.send(IngressHello("x" * 10_000)):
                outcome.put_nowait("dropped")
            await asyncio.sleep(0)

    async def use(real: str) -> None:
        connection = await connect(real, SECRET, WAIT_S)
        connection._reader._transport.pause_reading()
        assert await outcome.get() == "dropped"
        connection.close()

    with_server(flood, use, max_unsent_bytes=100_000)
    assert "bytes unread" in caplog.text


def test_async_server_drops_a_peer_that_sends_no_message():
    async def use(real: str) -> None:
        connection = await connect(real, SECRET, WAIT_S)
        connection._writer.write(b"\0\0\0\3abc")
        assert await connection.receive() is None
        connection.close()

    with_server(echo, use)


def test_async_connect_names_an_address_where_nobody_is(tmp_path):
    with pytest.raises(ChannelError, match=f"cannot reach unix:{tmp_path}/none"):
        asyncio.run(connect(f"unix:{tmp_path}/none", SECRET, 1.0))


def test_async_connect_gives_up_on_a_silent_server(tmp_path):
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent"))
        silent.listen()
        with pytest.raises(ChannelError, match="did not authenticate in time"):
            asyncio.run(connect(f"unix:{tmp_path}/silent", SECRET, 0.05))


# ---- a shard's thread against the router's event loop


@contextlib.contextmanager
def router(
    on_connection: Callable[[AsyncConnection], Awaitable[None]], address: str = "unix:"
) -> Iterator[str]:
    """A server on the event loop of another thread; gives its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = AsyncServer(address, SECRET, on_connection)
    try:
        yield asyncio.run_coroutine_threadsafe(server.start(), loop).result(WAIT_S)
    finally:
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(WAIT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT_S)
        loop.close()


@contextlib.contextmanager
def dialled(address: str) -> Iterator[SyncConnection]:
    connection = SyncConnection.connect(address, SECRET, WAIT_S)
    try:
        yield connection
    finally:
        connection.close()


@pytest.mark.parametrize("address", ADDRESSES)
def test_sync_connection_exchanges_messages(address):
    with router(echo, address) as real, dialled(real) as connection:
        connection.send(EndThinking(1, "a"))
        connection.send(IngressHello("y" * 2_000_000))
        assert connection.receive(WAIT_S) == EndThinking(1, "a")
        assert connection.receive(WAIT_S) == IngressHello("y" * 2_000_000)


def test_sync_receive_is_none_when_nothing_came_in_time():
    with router(echo) as address, dialled(address) as connection:
        assert connection.receive(0.0) is None
        assert connection.receive(0.01) is None


def test_sync_threads_may_send_at_once():
    with router(echo) as address, dialled(address) as connection:

        def send(first: int) -> None:
            for tag in range(first, first + 50):
                connection.send(ControlDone(tag, True))

        threads = [threading.Thread(target=send, args=(first,)) for first in (0, 50, 100)]
        for thread in threads:
            thread.start()
        received = {connection.receive(WAIT_S).tag for _ in range(150)}
        for thread in threads:
            thread.join(WAIT_S)
        assert received == set(range(150))


def test_sync_receive_raises_after_the_peer_closed():
    async def leave(connection: AsyncConnection) -> None:
        connection.close()

    with router(leave) as address, dialled(address) as connection:
        with pytest.raises(ChannelClosedError):
            connection.receive(WAIT_S)
        assert issubclass(ChannelClosedError, ConnectionError)


def test_sync_close_wakes_a_thread_that_receives():
    with router(echo) as address, dialled(address) as connection:
        caught: list[BaseException] = []

        def receive() -> None:
            try:
                connection.receive(WAIT_S)
            except ChannelClosedError as error:
                caught.append(error)

        thread = threading.Thread(target=receive)
        thread.start()
        connection.close()
        thread.join(WAIT_S)
        assert len(caught) == 1
        with pytest.raises(ChannelClosedError):
            connection.send(AskState(1))


def test_sync_send_gives_up_on_a_peer_that_reads_nothing():
    ours, theirs = socket.socketpair()
    with theirs:
        connection = SyncConnection(ours, "the router")
        with pytest.raises(ChannelError, match="the router does not read"):
            connection.send(IngressHello("z" * 5_000_000), timeout_s=0.05)


def test_sync_connect_is_refused_with_another_secret():
    with router(echo) as address, pytest.raises(ChannelError):
        SyncConnection.connect(address, b"another", WAIT_S)


def test_sync_connect_refuses_a_server_without_the_secret():
    server = SyncServer("unix:", b"another")
    try:
        with pytest.raises(ChannelError):
            SyncConnection.connect(server.start(), SECRET, WAIT_S)
    finally:
        server.close()


# ---- a shard's token stream


@pytest.fixture
def tokens(request: pytest.FixtureRequest) -> Iterator[tuple[SyncServer, str]]:
    """A token stream and its address; its options by indirect parameters."""
    server = SyncServer("unix:", SECRET, **getattr(request, "param", {}))
    yield server, server.start()
    server.close()


def events(first: int) -> StepEvents:
    return StepEvents(first, 0, [])


def wait_for_peers(server: SyncServer, wanted: list[str]) -> None:
    deadline = time.monotonic() + WAIT_S
    while server.peers() != wanted:
        assert time.monotonic() < deadline, f"{server.peers()} is not {wanted}"
        time.sleep(0.005)


def listen_as(address: str, ingress_id: str) -> contextlib.AbstractContextManager[SyncConnection]:
    @contextlib.contextmanager
    def listening() -> Iterator[SyncConnection]:
        with dialled(address) as connection:
            connection.send(IngressHello(ingress_id))
            yield connection

    return listening()


def test_token_stream_goes_to_the_ingress_it_is_for(tokens):
    server, address = tokens
    with listen_as(address, "a") as first, listen_as(address, "b") as second:
        wait_for_peers(server, ["a", "b"])
        assert server.send("a", events(1))
        assert server.send("b", events(2))
        assert server.send("a", events(3))
        assert [first.receive(WAIT_S) for _ in range(2)] == [events(1), events(3)]
        assert second.receive(WAIT_S) == events(2)


def test_token_stream_serves_an_event_loop():
    server = SyncServer("tcp:127.0.0.1:0", SECRET, greeting=events(0))

    async def use(address: str) -> list[Message | None]:
        connection = await connect(address, SECRET, WAIT_S)
        connection.send(IngressHello("a"))
        received = [await connection.receive()]  # the greeting: we are subscribed
        server.send("a", events(5))
        received.append(await connection.receive())
        connection.close()
        return received

    try:
        assert asyncio.run(use(server.start())) == [events(0), events(5)]
    finally:
        server.close()


def test_token_stream_knows_no_other_ingress(tokens):
    server, _ = tokens
    assert not server.send("nobody", events(1))


def test_token_stream_forgets_an_ingress_that_left(tokens):
    server, address = tokens
    with listen_as(address, "a"):
        wait_for_peers(server, ["a"])
    wait_for_peers(server, [])


def test_token_stream_follows_an_ingress_that_dials_again(tokens):
    server, address = tokens
    with listen_as(address, "a") as first:
        wait_for_peers(server, ["a"])
        with listen_as(address, "a") as second:
            with pytest.raises(ChannelClosedError):
                first.receive(WAIT_S)
            assert server.send("a", events(1))
            assert second.receive(WAIT_S) == events(1)


@pytest.mark.parametrize("tokens", [{"max_outbox_bytes": 100_000}], indirect=True)
def test_token_stream_drops_an_ingress_that_does_not_read(tokens, caplog):
    server, address = tokens
    with listen_as(address, "slow"), listen_as(address, "quick") as quick:
        wait_for_peers(server, ["quick", "slow"])
        big = IngressHello("t" * 50_000)
        for _ in range(1000):  # far more than socket buffers and outbox hold
            if not server.send("slow", big):
                break
        assert server.peers() == ["quick"]
        assert server.send("quick", events(1))
        assert quick.receive(WAIT_S) == events(1)
    assert "dropped ingress slow" in caplog.text


@pytest.mark.parametrize("tokens", [{"handshake_timeout_s": 0.05}], indirect=True)
def test_token_stream_drops_a_silent_peer(tokens):
    _, address = tokens
    with dial(parse_address(address), WAIT_S) as silent:
        silent.settimeout(WAIT_S)
        assert silent.recv(1) == b""


def test_token_stream_drops_a_peer_that_says_something_else_first(tokens):
    server, address = tokens
    with dialled(address) as connection:
        connection.send(AskState(1))
        with pytest.raises(ChannelClosedError):
            connection.receive(WAIT_S)
    assert server.peers() == []


def test_token_stream_refuses_another_secret(tokens):
    _, address = tokens
    with pytest.raises((ChannelRefusedError, ChannelClosedError)):
        SyncConnection.connect(address, b"another", WAIT_S)


def test_token_stream_can_be_closed_twice(tokens):
    server, address = tokens
    with listen_as(address, "a") as listener:
        wait_for_peers(server, ["a"])
        server.close()
        server.close()
        with pytest.raises(ChannelClosedError):
            listener.receive(WAIT_S)
