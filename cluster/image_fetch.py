"""Images that requests name by URL -> their files, fetched where the deployment allows it.

A URL is a caller's way to make this server speak to a host of the caller's choice. So a host is
looked up once, every address of it must be public, and no socket is made for any other: what a
name server answers a second later changes nothing. Each redirect is a new URL and judged as one.
What is refused is an InvalidRequestError at the image's place that tells nothing of the target,
and neither URL nor host is ever logged: they are part of the prompt.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from ostro.actors.errors import InvalidRequestError, OverloadedError
from ostro.cluster.fetch_outcome import (
    FetchOutcome,
    ObserveFetch,
    RefusedImageError,
    observe_nothing,
)
from ostro.cluster.generation import ChatMessage, ImageFile, ImageUrl
from ostro.cluster.images import not_fetched
from ostro.cluster.public_address import is_public_address
from ostro.configs.deployment import ServingConfig
from ostro.configs.image_fetch import ImageFetchConfig

_MAX_WAITING = 64  # requests whose images are being fetched or wait for it
_MAX_URL_CHARS = 8192
_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = {
    "User-Agent": "ostro",
    "Accept": "image/png, image/jpeg, image/webp, image/gif",
    "Accept-Encoding": "identity",  # what unpacks could be larger than any limit
}
_NO_ADDRESS = "the URL's host has no address on the public internet"


class _NotPublicError(OSError):
    """An address that must not be reached; an OSError, as aiohttp expects them of its parts."""


def system_addresses(host: str) -> list[str]:
    """The addresses that the machine's resolver knows a host by; takes as long as it takes.

    Raises:
        OSError, UnicodeError: It knows none, or the name cannot be one.
    """
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class ImageFetcher:
    """Fetches for one event loop; nothing is kept from one request to the next.

    A cache would tell one caller what another has fetched, by the time that an image takes. What is
    dear comes after the fetch and is kept under the pixels' digest: prefix and embeddings.

    Args:
        serving: Limits of images; without its `image_fetch`, nothing is fetched.
        look_up: Host -> addresses; blocks.
        may_reach: Whether an address may be connected to.
        trust: Whose certificates count; None for the machine's.
        observe: Told of every fetch that was begun or waited for.
    """

    def __init__(
        self,
        serving: ServingConfig,
        *,
        look_up: Callable[[str], list[str]] = system_addresses,
        may_reach: Callable[[str], bool] = is_public_address,
        trust: ssl.SSLContext | None = None,
        observe: ObserveFetch = observe_nothing,
    ) -> None:
        self._config = serving.image_fetch
        self._observe = observe
        self._max_image_bytes = serving.max_image_bytes
        self._max_request_bytes = serving.max_body_bytes
        self._may_reach = may_reach
        self._trust = trust
        self._num_waiting = 0
        if self._config is not None:
            self._free = asyncio.Semaphore(self._config.max_concurrent)
            self._resolver = _CheckedResolver(look_up, may_reach, self._config.max_concurrent)

    async def with_files(self, messages: Sequence[ChatMessage]) -> Sequence[ChatMessage]:
        """The messages, with the file itself wherever an image was a URL.

        The images of one request come side by side; together they may be as large as a body.

        Raises:
            InvalidRequestError: An image cannot be had; `param` is its place.
            OverloadedError: Too much is fetched already.
        """
        remote = [file for m in messages for file in m.images if isinstance(file.data, ImageUrl)]
        if not remote:
            return messages
        if self._config is None:
            raise not_fetched(remote[0])
        if self._num_waiting >= _MAX_WAITING:
            raise _overloaded()
        self._num_waiting += 1
        try:
            fetched = await self._fetch_all(remote, self._config)
        finally:
            self._num_waiting -= 1
        files = iter(fetched)
        return [_with_files(message, files) for message in messages]

    async def _fetch_all(
        self, remote: Sequence[ImageFile], config: ImageFetchConfig
    ) -> list[ImageFile]:
        room = _Room(self._max_request_bytes)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._in_turn(file, config, room)) for file in remote]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None  # the one that ended the others
        return [task.result() for task in tasks]

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[aiohttp.ClientSession]:
        """For one hop; nothing of it serves another, and its connections end with it.

        They are cut off: a peer that is told goodbye could go on talking, for aiohttp to keep.
        """
        sockets: list[socket.socket] = []

        def make_socket(info: aiohttp.AddrInfoType) -> socket.socket:
            # The last word: also on addresses that stood in the URL and were not looked up.
            family, kind, protocol, _, address = info
            if not self._may_reach(str(address[0])):
                raise _NotPublicError
            sockets.append(socket.socket(family, kind, protocol))
            return sockets[-1]

        connector = aiohttp.TCPConnector(
            resolver=self._resolver,
            use_dns_cache=False,
            socket_factory=make_socket,
            ssl=True if self._trust is None else self._trust,
        )
        try:
            async with aiohttp.ClientSession(
                connector=connector,
                headers=_HEADERS,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
                auto_decompress=False,
                trust_env=False,
            ) as session:
                yield session
        finally:
            for made in sockets:
                with suppress(OSError):  # closed already
                    made.shutdown(socket.SHUT_RDWR)

    async def _in_turn(self, file: ImageFile, config: ImageFetchConfig, room: _Room) -> ImageFile:
        outcome, began_s, num_bytes = FetchOutcome.CANCELLED, time.monotonic(), 0
        try:
            await self._take_turn(config)
            began_s = time.monotonic()
            try:
                data = await self._fetch(file, config, room)
            finally:
                self._free.release()
            outcome, num_bytes = FetchOutcome.OK, len(data)
            return replace(file, data=data)
        except OverloadedError:
            outcome = FetchOutcome.OVERLOADED
            raise
        except RefusedImageError as refused:
            outcome = refused.outcome
            raise InvalidRequestError(
                f"{file.where}: {refused.why}", code=refused.code, param=file.where
            ) from None
        finally:
            self._observe(outcome, time.monotonic() - began_s, num_bytes)

    async def _take_turn(self, config: ImageFetchConfig) -> None:
        try:
            async with asyncio.timeout(config.timeout_s):
                await self._free.acquire()
        except TimeoutError:
            raise _overloaded() from None

    async def _fetch(self, file: ImageFile, config: ImageFetchConfig, room: _Room) -> bytes:
        """What goes wrong by way of the network, in words."""
        assert isinstance(file.data, ImageUrl)  # noqa: S101  # chosen by `with_files`
        try:
            async with asyncio.timeout(config.timeout_s):
                return await self._follow(_parsed(file.data.text), config, room)
        except TimeoutError:
            raise RefusedImageError(
                f"the image did not arrive within {config.timeout_s:g} s: send the file as a data "
                f"URI",
                FetchOutcome.TIMEOUT,
            ) from None
        except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError):
            raise RefusedImageError(
                "the URL's host shows no certificate that holds for it", FetchOutcome.UNREACHABLE
            ) from None
        except aiohttp.ClientConnectorDNSError:
            raise RefusedImageError(_NO_ADDRESS, FetchOutcome.NOT_ALLOWED) from None
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, _NotPublicError):
                raise RefusedImageError(_NO_ADDRESS, FetchOutcome.NOT_ALLOWED) from None
            raise RefusedImageError(
                "the URL's host cannot be reached", FetchOutcome.UNREACHABLE
            ) from None
        except (aiohttp.ClientError, OSError, ValueError):
            raise RefusedImageError("the image cannot be fetched from this URL") from None

    async def _follow(self, url: URL, config: ImageFetchConfig, room: _Room) -> bytes:
        for _ in range(config.max_redirects + 1):
            _check_url(url, config)
            async with (
                self._session() as session,
                session.get(url, allow_redirects=False) as answer,
            ):
                if answer.status not in _REDIRECTS:
                    return await self._body(answer, room)
                url = url.join(_parsed(answer.headers.get("Location", "")))
        raise RefusedImageError(f"the URL redirects more than {config.max_redirects} times")

    async def _body(self, answer: aiohttp.ClientResponse, room: _Room) -> bytes:
        if answer.status != 200:
            raise RefusedImageError(f"the URL's host answers with status {answer.status}, not 200")
        if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise RefusedImageError(
                "the URL's host sends the image packed, which was not asked for"
            )
        if (answer.content_length or 0) > self._max_image_bytes:
            raise self._too_large()
        data = bytearray()
        async for chunk in answer.content.iter_any():
            data += chunk
            if len(data) > self._max_image_bytes:
                raise self._too_large()
            room.take(len(chunk))
        return bytes(data)

    def _too_large(self) -> RefusedImageError:
        return RefusedImageError(
            f"the image file is larger than {self._max_image_bytes} bytes, the most that is "
            f"taken: scale the image down or save it as JPEG",
            FetchOutcome.TOO_LARGE,
            "image_too_large",
        )


class _CheckedResolver(AbstractResolver):
    """Gives a host's addresses if all of them may be reached.

    It has threads of its own: look-ups that hang must not take those that tokenize.
    """

    def __init__(
        self,
        look_up: Callable[[str], list[str]],
        may_reach: Callable[[str], bool],
        num_threads: int,
    ) -> None:
        self._look_up = look_up
        self._may_reach = may_reach
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="ostro-names")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Called by aiohttp, once per connection; either family is welcome."""
        loop = asyncio.get_running_loop()
        addresses = await loop.run_in_executor(self._threads, self._look_up, host)
        if not addresses or not all(map(self._may_reach, addresses)):
            raise _NotPublicError
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=_family(address),
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        """Called by aiohttp; it outlives the sessions, so there is nothing to do."""


class _Room:
    """Bytes that the fetched images of one request may still take."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._left_bytes = max_bytes

    def take(self, num_bytes: int) -> None:
        self._left_bytes -= num_bytes
        if self._left_bytes < 0:
            raise RefusedImageError(
                f"the images of this request are larger than {self._max_bytes} bytes together: "
                f"send fewer or smaller ones",
                FetchOutcome.TOO_LARGE,
                "image_too_large",
            )


def _with_files(message: ChatMessage, files: Iterator[ImageFile]) -> ChatMessage:
    if not message.images:
        return message
    images = (next(files) if isinstance(f.data, ImageUrl) else f for f in message.images)
    return replace(message, images=tuple(images))


def _parsed(text: str) -> URL:
    """As it was written where that is well-formed: signatures may cover every character."""
    if len(text) > _MAX_URL_CHARS:
        raise RefusedImageError(
            f"a URL may have {_MAX_URL_CHARS} characters: send a data URI", FetchOutcome.NOT_ALLOWED
        )
    is_encoded = text.isascii() and text.isprintable() and " " not in text
    return URL(text, encoded=is_encoded)


def _check_url(url: URL, config: ImageFetchConfig) -> None:
    """Refuse what may not be asked for, before anything is looked up."""
    host = (url.raw_host or "").lower().removesuffix(".")
    if url.scheme.lower() != "https" or not host:
        raise RefusedImageError(
            "images are fetched over https alone, also after a redirect", FetchOutcome.NOT_ALLOWED
        )
    if url.raw_user is not None or url.raw_password is not None:
        raise RefusedImageError(
            "a URL with a user name or a password is not fetched: leave them out",
            FetchOutcome.NOT_ALLOWED,
        )
    if not config.allows_host(host) or url.port not in config.allowed_ports:
        raise RefusedImageError(
            "this server fetches no images from the URL's host and port: send the file as a data "
            "URI, or ask whoever runs it to name them in serving.image_fetch",
            FetchOutcome.NOT_ALLOWED,
        )


def _family(address: str) -> socket.AddressFamily:
    is_v4 = ipaddress.ip_address(address).version == 4
    return socket.AF_INET if is_v4 else socket.AF_INET6


def _overloaded() -> OverloadedError:
    return OverloadedError("too many images are being fetched", retry_after_s=1.0)
