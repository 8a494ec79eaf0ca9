"""The load of a soak: many clients at once, each doing one thing after another at random."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import httpx
import soak_grpc
import soak_hostile
import soak_http
from soak_outcomes import LostError, Tally, UndocumentedError, Weather
from soak_site import REQUEST_TIMEOUT_S, Site

Kind = Callable[[Site], Awaitable[str]]
ALL_KINDS: dict[Kind, int] = {**soak_http.KINDS, **soak_grpc.KINDS, **soak_hostile.KINDS}
_PAUSE_S = 0.05  # a caller that was refused comes again later, or the test only floods
_BUSY_PAUSE_S = 1.0
_CHANNEL = (
    ("grpc.use_local_subchannel_pool", 1),
    # A channel tells of a refused connection until it tries again, by default up to two minutes.
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class Load:
    """Clients that run until they are told to stop.

    Attributes:
        tally: How their requests ended.
        weather: When failures are excused.
    """

    def __init__(self, sites: list[Site], kinds: dict[Kind, int] | None = None) -> None:
        self.tally = Tally()
        self.weather = Weather()
        self._sites = sites
        self._kinds = kinds or ALL_KINDS
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._live(site)) for site in self._sites]

    async def stop(self) -> None:
        """Let every client finish what it does."""
        self._stopping.set()
        await asyncio.gather(*self._tasks)

    async def _live(self, site: Site) -> None:
        kinds, weights = list(self._kinds), list(self._kinds.values())
        while not self._stopping.is_set():
            kind = site.dice.choices(kinds, weights)[0]
            end = await self._try(kind, site)
            await asyncio.sleep(_PAUSE_S if end == "ok" else site.dice.uniform(0, _BUSY_PAUSE_S))

    async def _try(self, kind: Kind, site: Site) -> str:
        name = f"{kind.__module__.removeprefix('soak_')}.{kind.__name__}"
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                end = await kind(site)
        except (LostError, httpx.TransportError, OSError, EOFError) as error:
            if self.weather.excuses(began_s):
                end = "lost"
            else:
                self.tally.find(name, repr(error))
                return "finding"
        except (UndocumentedError, TimeoutError, grpc.RpcError) as error:
            took_s = time.monotonic() - began_s
            self.tally.find(name, f"{error!r} after {took_s:.0f} s")
            return "finding"
        except Exception as error:  # noqa: BLE001  what a client trips over is a finding too
            self.tally.find(name, f"{type(error).__name__}: {error}")
            return "finding"
        self.tally.count(name, end)
        return end


@contextlib.asynccontextmanager
async def clients(
    http_port: int,
    grpc_port: int,
    count: int,
    *,
    keys: tuple[str, ...],
    poor_key: str,
    pictures: tuple[bytes, ...],
    seed: int,
) -> AsyncIterator[list[Site]]:
    """So many callers, each with dice of its own; they share the connections."""
    limits = httpx.Limits(max_connections=400, max_keepalive_connections=40)
    async with (
        httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{http_port}", timeout=REQUEST_TIMEOUT_S, limits=limits
        ) as http,
        contextlib.AsyncExitStack() as stack,
    ):
        channels = [
            await stack.enter_async_context(
                grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}", options=_CHANNEL)
            )
            for _ in range(3)
        ]
        yield [
            Site(
                http_port=http_port,
                grpc_port=grpc_port,
                http=http,
                channel=channels[index % len(channels)],
                keys=keys,
                poor_key=poor_key,
                pictures=pictures,
                dice=random.Random(f"{seed}-{index}"),
            )
            for index in range(count)
        ]
