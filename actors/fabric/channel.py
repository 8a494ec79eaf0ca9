"""Channels: authenticated streams of messages over Unix or TCP sockets, in three faces.

    SyncConnection   a shard dials the router; threads
    SyncServer       an attention shard offers its token stream to ingress replicas; threads
    AsyncServer      the router listens; `AsyncConnection` is one peer, and what `connect` gives

The threads' faces live in `sync_channel`, the event loop's in `async_channel`.
"""

from ostro.actors.fabric.async_channel import AsyncConnection, AsyncServer, connect
from ostro.actors.fabric.framing import ChannelClosedError, ChannelError, ChannelRefusedError
from ostro.actors.fabric.sync_channel import SyncConnection, SyncServer

__all__ = [
    "AsyncConnection",
    "AsyncServer",
    "ChannelClosedError",
    "ChannelError",
    "ChannelRefusedError",
    "SyncConnection",
    "SyncServer",
    "connect",
]
