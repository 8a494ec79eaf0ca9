"""Asks the lines of a batch of a server, so many at a time, and writes what comes back.

Lines are read when there is room to ask them, and answers are written when they come: memory holds
what is being asked, however long the batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import IO, Any
from urllib.parse import urlsplit

import aiohttp
import msgspec

from ostro.actors.errors import NotReadyError, OstroError, UnauthenticatedError
from ostro.cluster.batch_lines import UNREADABLE, BatchLine, LineFault
from ostro.cluster.batch_output import BatchIndex, Record, Response
from ostro.cluster.retries import Retries

_CONNECT_TIMEOUT_S = 10.0
_KNOCK_TIMEOUT_S = 30.0
_RETRIED = frozenset({429, 502, 503})  # nothing was done yet, or not by the server itself
_LONGEST_ASKED_DELAY_S = 600.0
_NOT_LET_IN = frozenset({401, 403})
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_MAX_TEXT_CHARS = 500  # of an answer that is no JSON


@dataclass(slots=True)
class BatchProgress:
    """What became of a batch so far, in this run.

    Attributes:
        num_done: Lines that were answered.
        num_failed: Lines that were not.
        num_skipped: Lines that the output has already.
        num_failed_before: Of the output's lines, those that hold no answer.
        num_tokens: Output tokens of the answers.
        read_bytes: Of the batch, up to the last line that was read.
        skipped_bytes: Of these, those of lines that were skipped.
        began_s: By `time.monotonic`.
    """

    num_done: int = 0
    num_failed: int = 0
    num_skipped: int = 0
    num_failed_before: int = 0
    num_tokens: int = 0
    read_bytes: int = 0
    skipped_bytes: int = 0
    began_s: float = field(default_factory=time.monotonic)

    def tokens_per_second(self) -> float:
        """Output tokens per second since it began."""
        return self.num_tokens / max(self.elapsed_s(), 1e-3)

    def elapsed_s(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began_s

    def time_left_s(self, num_bytes: int) -> float | None:
        """Seconds that are left of so many bytes at the speed so far; None while nobody knows."""
        asked_bytes = self.read_bytes - self.skipped_bytes
        if not num_bytes or asked_bytes <= 0 or not self.num_done + self.num_failed:
            return None
        return self.elapsed_s() * max(num_bytes - self.read_bytes, 0) / asked_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchServer:
    """Where a batch is asked, and how patiently.

    Attributes:
        url: Base URL of the HTTP face, without `/v1`.
        api_key: Sent with every request, if there is one.
        concurrency: Requests at a time.
        retries: Of a request that the server could not take or whose connection broke.
        timeout_s: Of one request.
        trust: For a URL with https; None trusts whom the system trusts.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    concurrency: int = 32
    retries: Retries = field(default_factory=Retries)
    timeout_s: float = 3600.0
    trust: ssl.SSLContext | None = None

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[aiohttp.ClientSession]:
        """Connections to it."""
        timeout = aiohttp.ClientTimeout(total=self.timeout_s, sock_connect=_CONNECT_TIMEOUT_S)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self.concurrency, ssl=self.trust or True),
            timeout=timeout,
            headers={"authorization": f"Bearer {self.api_key}"} if self.api_key else {},
            # A proxy of the environment is not asked for this machine's own addresses.
            trust_env=urlsplit(self.url).hostname not in _LOOPBACK,
        ) as session:
            yield session

    async def knock(self, session: aiohttp.ClientSession) -> None:
        """Find out whether anybody is there and takes our key.

        Raises:
            OstroError: Nobody is, or not with this key.
        """
        timeout = aiohttp.ClientTimeout(_KNOCK_TIMEOUT_S)
        try:
            async with session.get(f"{self.url}/v1/models", timeout=timeout) as answer:
                status, data = answer.status, await answer.read()
        except aiohttp.ClientConnectorCertificateError as error:
            why = getattr(error.certificate_error, "verify_message", error.certificate_error)
            raise OstroError(
                f"no TLS connection to {self.url}: {why}; name whom to trust, with --ca"
            ) from None
        except aiohttp.ClientSSLError as error:
            raise OstroError(f"no TLS connection to {self.url}: {error}") from None
        except (aiohttp.ClientConnectorError, TimeoutError):
            raise self.unreachable() from None
        except aiohttp.ClientError as error:
            raise OstroError(
                f"what answers at {self.url} speaks no HTTP ({type(error).__name__}); is it "
                f"the port of the HTTP face, and should the URL begin with https://?"
            ) from None
        if status in _NOT_LET_IN:
            raise self.not_let_in(status, data)

    def not_let_in(self, status: int, data: bytes) -> UnauthenticatedError:
        """An answer that says so."""
        return UnauthenticatedError(f"{self.url} answers {status}: {_message(data)}")

    def unreachable(self) -> NotReadyError:
        """Nothing answers there."""
        return NotReadyError(
            f"nothing answers at {self.url}; start a cluster with `ostro serve`",
            code="unreachable",
        )


class BatchRun:
    """One run over a batch.

    Args:
        server: Where to ask.
        session: Connections to it.
        index: Of what was read and written.
        answers: Gets a record of each line.
        failures: Gets those of lines without an answer; it may be the same file.
        progress: Kept up to date.
    """

    def __init__(
        self,
        server: BatchServer,
        session: aiohttp.ClientSession,
        index: BatchIndex,
        answers: IO[bytes],
        failures: IO[bytes],
        progress: BatchProgress,
    ) -> None:
        self._server = server
        self._session = session
        self._index = index
        self._answers = answers
        self._failures = failures
        self._progress = progress

    async def run(self, lines: Iterator[BatchLine | LineFault]) -> None:
        """Ask every line that is not answered yet; when cancelled, running requests are given up.

        Raises:
            OstroError: The server is gone or does not let us in, or a file cannot be written.
            OSError: The batch cannot be read.
        """
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(self._server.concurrency):
                    workers.create_task(self._work(lines))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _work(self, lines: Iterator[BatchLine | LineFault]) -> None:
        for read in lines:
            num_bytes = read.end - self._progress.read_bytes
            self._progress.read_bytes = read.end
            line = self._index.to_do(read)
            if line is None:
                self._progress.num_skipped += 1
                self._progress.skipped_bytes += num_bytes
                await asyncio.sleep(0)  # a million of them must not hold up the others
            elif isinstance(line, LineFault):
                error = {"code": line.code, "message": line.message, "line": line.number}
                self._write(Record(custom_id=line.custom_id, error=error))
                await asyncio.sleep(0)
            else:
                self._write(await self._ask(line))

    def _write(self, record: Record) -> None:
        file = self._failures if record.has_failed else self._answers
        try:
            file.write(msgspec.json.encode(record) + b"\n")
            file.flush()
        except OSError as error:
            raise OstroError(f"{file.name}: {error.strerror}", code="unwritable") from error
        if record.has_failed:
            self._progress.num_failed += 1
        else:
            self._progress.num_done += 1

    async def _ask(self, line: BatchLine) -> Record:
        """Ask until there is an answer that is worth writing.

        Raises:
            NotReadyError: Nothing answers, however often it was tried.
            UnauthenticatedError: Our key is not taken, or not for this.
        """
        most = self._server.retries.most
        num_failures = 0
        while True:
            asked_delay_s = None
            try:
                status, headers, data = await self._post(line)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
                if num_failures >= most:
                    raise self._server.unreachable() from None
            except TimeoutError:
                why = f"no answer within {self._server.timeout_s:g} s"
                return _unanswered(line, "timeout", why)
            except aiohttp.ClientError as error:
                if num_failures >= most:
                    return _unanswered(line, "connection_lost", f"{type(error).__name__}: {error}")
            else:
                if status in _NOT_LET_IN:
                    raise self._server.not_let_in(status, data)
                if status not in _RETRIED or num_failures >= most:
                    return self._record(line, status, headers, data)
                asked_delay_s = asked_delay(headers)
            num_failures += 1
            await asyncio.sleep(self._server.retries.delay_s(num_failures, asked_delay_s))

    async def _post(self, line: BatchLine) -> tuple[int, Mapping[str, str], bytes]:
        async with self._session.post(
            self._server.url + line.url,
            data=msgspec.json.encode(line.body),
            headers={"content-type": "application/json"},
            allow_redirects=False,
        ) as answer:
            return answer.status, answer.headers, await answer.read()

    def _record(
        self, line: BatchLine, status: int, headers: Mapping[str, str], data: bytes
    ) -> Record:
        response = Response(status_code=status, request_id=headers.get("x-request-id"))
        try:
            body: Any = msgspec.json.decode(data)
        except UNREADABLE:
            text = data[:_MAX_TEXT_CHARS].decode(errors="replace")
            error = {"code": "no_json", "message": f"the answer is no JSON: {text}"}
            return Record(custom_id=line.custom_id, response=response, error=error)
        response.body = msgspec.Raw(data)
        self._progress.num_tokens += _num_output_tokens(body)
        return Record(custom_id=line.custom_id, response=response)


def asked_delay(headers: Mapping[str, str]) -> float | None:
    """Seconds that `Retry-After` asks for, at most ten minutes; None where it asks for none."""
    text = headers.get("retry-after", "")
    try:
        delay_s = float(text)
    except ValueError:
        try:
            delay_s = parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return None
    if not delay_s > 0:  # NaN is not
        return None
    return min(delay_s, _LONGEST_ASKED_DELAY_S)


def _message(data: bytes) -> str:
    """What an answer that is an error says, in any of the dialects."""
    try:
        return str(msgspec.json.decode(data)["error"]["message"])
    except (*UNREADABLE, KeyError, TypeError):
        return data[:_MAX_TEXT_CHARS].decode(errors="replace")


def _unanswered(line: BatchLine, code: str, why: str) -> Record:
    return Record(custom_id=line.custom_id, error={"code": code, "message": why})


def _num_output_tokens(body: object) -> int:
    """Of an answer in any of the dialects; 0 where it does not tell."""
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return 0
    tokens = usage.get("completion_tokens", usage.get("output_tokens"))
    return tokens if isinstance(tokens, int) else 0
