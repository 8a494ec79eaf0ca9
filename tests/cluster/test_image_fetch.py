"""Images by URL: fetched where they may be, and nothing reached, kept or told that may not be."""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from image_host import NAME, OTHER_NAME, WAIT_S, ImageHost

from ostro.actors.errors import InvalidRequestError, OverloadedError
from ostro.cluster import image_fetch
from ostro.cluster.fetch_outcome import FetchOutcome, ObserveFetch, observe_nothing
from ostro.cluster.generation import ChatMessage, ImageFile, ImageUrl
from ostro.cluster.image_fetch import ImageFetcher
from ostro.cluster.public_address import is_public_address
from ostro.configs.deployment import ServingConfig
from ostro.configs.image_fetch import ImageFetchConfig

FILE = b"stands for a picture"


def here_or_public(address: str) -> bool:
    """The product's check, and the one address that the test's host has."""
    return address == "127.0.0.1" or is_public_address(address)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageHost]:
    with ImageHost(tmp_path_factory.mktemp("host")) as host:
        host.files = {f"/{name}.png": FILE + name.encode() for name in "abc"}
        yield host


@pytest.fixture
def host(running: ImageHost) -> ImageHost:
    running.asked.clear()
    running.begun.clear()
    running.left.clear()
    running.num_endless_bytes = 0
    return running


def fetcher(
    host: ImageHost,
    *,
    look_up: Callable[[str], list[str]] | None = None,
    may_reach: Callable[[str], bool] = here_or_public,
    trust: ssl.SSLContext | None = None,
    serving: dict[str, int] | None = None,
    observe: ObserveFetch = observe_nothing,
    **fields: object,
) -> ImageFetcher:
    allowed = {"allowed_hosts": ("*",), "allowed_ports": (443, host.port), "timeout_s": WAIT_S}
    config = ImageFetchConfig(**{**allowed, **fields})
    return ImageFetcher(
        ServingConfig(image_fetch=config, **(serving or {})),
        look_up=look_up or host.look_up,
        may_reach=may_reach,
        trust=trust or host.trust,
        observe=observe,
    )


def asking(*urls: str) -> list[ChatMessage]:
    images = [ImageFile(data=ImageUrl(url), where=f"[{i}]") for i, url in enumerate(urls)]
    return [ChatMessage(role="user", images=tuple(images))]


def fetch(source: ImageFetcher, *urls: str) -> list[bytes]:
    (message,) = asyncio.run(source.with_files(asking(*urls)))
    return [image.data for image in message.images]


def refusal(source: ImageFetcher, *urls: str) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        fetch(source, *urls)
    assert caught.value.message.startswith(f"{caught.value.param}: ")
    return caught.value


# ---- what is fetched


def test_an_image_is_fetched_and_keeps_its_place(host: ImageHost) -> None:
    before = ChatMessage(role="system", text="Look.")
    given = ImageFile(data=b"given", where="[0]")
    asked = ImageFile(data=ImageUrl(host.url("/a.png")), where="[1]", at=3)
    message = ChatMessage(role="user", text="See", images=(given, asked))
    first, second = asyncio.run(fetcher(host).with_files([before, message]))
    assert first is before
    assert second.images[0] is given
    assert second.images[1] == ImageFile(data=FILE + b"a", where="[1]", at=3)


def test_several_images_come_in_their_order(host: ImageHost) -> None:
    urls = [host.url(f"/{name}.png") for name in "cabca"]
    assert fetch(fetcher(host), *urls) == [FILE + name.encode() for name in "cabca"]


def test_a_request_tells_nothing_of_the_caller_or_the_server(host: ImageHost) -> None:
    fetch(fetcher(host), host.url("/a.png?x=%2F%41#part"))
    ((path, headers),) = host.asked
    assert path == "/a.png?x=%2F%41"  # a signature would hold
    assert headers == {
        "Host": f"{NAME}:{host.port}",
        "User-Agent": "ostro",
        "Accept": "image/png, image/jpeg, image/webp, image/gif",
        "Accept-Encoding": "identity",
    }


def test_no_proxy_of_the_environment_is_used(
    host: ImageHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetch(fetcher(host), host.url("/a.png")) == [FILE + b"a"]


def test_what_needs_no_fetching_is_left_as_it_is() -> None:
    messages = [ChatMessage(role="user", images=(ImageFile(data=b"x", where=""),))]
    assert asyncio.run(ImageFetcher(ServingConfig()).with_files(messages)) is messages


def test_nothing_is_fetched_without_leave(host: ImageHost) -> None:
    refused = refusal(ImageFetcher(ServingConfig()), host.url("/a.png"))
    assert "serving.image_fetch" in refused.message
    assert "data URI" in refused.message
    assert not host.asked


# ---- redirects


def to(host: ImageHost, url: str, name: str = NAME) -> str:
    return host.url(f"/to?url={quote(url, safe='')}", name)


def test_redirects_are_followed_without_cookies(host: ImageHost) -> None:
    inner = to(host, "/a.png", OTHER_NAME)
    assert fetch(fetcher(host), to(host, inner)) == [FILE + b"a"]
    assert len(host.asked) == 3
    assert not any("Cookie" in headers for _, headers in host.asked)


def test_redirects_are_counted(host: ImageHost) -> None:
    twice = to(host, to(host, "/a.png"))
    assert fetch(fetcher(host, max_redirects=2), twice) == [FILE + b"a"]
    assert "more than 1 times" in refusal(fetcher(host, max_redirects=1), twice).message
    endless = fetcher(host, max_redirects=0)
    assert "more than 0 times" in refusal(endless, to(host, "/a.png")).message


@pytest.mark.parametrize(
    "target",
    [
        "https://127.0.0.2:{port}/a.png",
        "https://127.0.0.2/a.png",
        "https://169.254.169.254/latest",
        "https://10.0.0.1/",
        "https://[::1]:{port}/a.png",
        "https://[::ffff:127.0.0.1]:{port}/a.png",
        "https://[64:ff9b::7f00:1]:{port}/",
        "https://localhost:{port}/a.png",
        "https://inside.example.com:{port}/a.png",
        "https://mixed.example.com:{port}/a.png",
        "https://unknown.example.com:{port}/a.png",
    ],
)
@pytest.mark.parametrize("redirected", [False, True])
def test_private_addresses_are_not_reached_and_look_like_unknown_names(
    host: ImageHost, target: str, redirected: bool
) -> None:
    inside = {
        "localhost": ["127.0.0.2"],
        "inside.example.com": ["192.168.0.9"],
        "mixed.example.com": ["127.0.0.1", "10.0.0.1"],
    }

    def look_up(name: str) -> list[str]:
        return inside[name] if name in inside else host.look_up(name)

    url = target.format(port=host.port)
    refused = refusal(fetcher(host, look_up=look_up), to(host, url) if redirected else url)
    assert refused.message == "[0]: the URL's host has no address on the public internet"
    assert refused.code == "invalid_image_url"
    assert len(host.asked) == redirected


@pytest.mark.parametrize("written", ["2130706433", "127.1", "0", "0x7f.1", "0177.0.0.1", "127.1."])
def test_other_ways_to_write_an_address_lead_nowhere(host: ImageHost, written: str) -> None:
    source = fetcher(host, look_up=image_fetch.system_addresses, may_reach=is_public_address)
    assert refusal(source, host.url("/a.png", written)).code == "invalid_image_url"
    assert not host.asked


def test_an_address_that_may_be_reached_needs_no_name(host: ImageHost) -> None:
    assert fetch(fetcher(host), host.url("/a.png", "127.0.0.1")) == [FILE + b"a"]


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://pictures.example.com/a.png", "https alone"),
        ("ftp://pictures.example.com/a.png", "https alone"),
        ("file:///etc/passwd", "https alone"),
        ("https://user:word@pictures.example.com/", "user name or a password"),
        ("https://user@pictures.example.com/", "user name or a password"),
        ("https://:word@pictures.example.com/", "user name or a password"),
        ("https://pictures.example.com:22/", "no images from the URL's host and port"),
        ("https://pictures.example.com.:444/", "no images from the URL's host and port"),
        ("https://example.net/", "no images from the URL's host and port"),
    ],
)
@pytest.mark.parametrize("redirected", [False, True])
def test_urls_are_judged_before_anything_is_looked_up(
    host: ImageHost, url: str, why: str, redirected: bool
) -> None:
    names = []

    def look_up(name: str) -> list[str]:
        names.append(name)
        return host.look_up(name)

    source = fetcher(host, look_up=look_up, allowed_hosts=("*.example.com",))
    assert why in refusal(source, to(host, url) if redirected else url).message
    assert names == [NAME] * redirected


@pytest.mark.parametrize(
    "url",
    [
        "https://",
        "https:///a.png",
        "https://[",
        "https://[::1",
        "https://a:b/",
        "https://a:99999/",
        "https://exa mple.com/",
        "https://ex\u2603ample.com/\r\nHost: x",
        "https://" + "a" * 70 + ".example.com/",
        "https://a..b/",
        "https://\ud800.com/",
        "https://a\0b/",
        "https://%00/",
        "https://" + "a" * 9000,
        "https://\\@127.0.0.2/",
    ],
)
def test_urls_that_are_none_are_refused(host: ImageHost, url: str) -> None:
    assert refusal(fetcher(host, look_up=image_fetch.system_addresses), url).param == "[0]"


@pytest.mark.parametrize("location", ["", "//", "https://[", "\u00e9:", "a" * 9000])
def test_redirects_to_nowhere_are_refused(host: ImageHost, location: str) -> None:
    refused = refusal(fetcher(host), host.url(f"/to?url={quote(location)}"))
    assert refused.code == "invalid_image_url"


def test_hosts_compare_in_lower_case_and_without_a_last_dot(host: ImageHost) -> None:
    source = fetcher(host, allowed_hosts=(NAME,))
    assert fetch(source, host.url("/a.png", NAME.upper())) == [FILE + b"a"]
    assert "no images from" in refusal(source, host.url("/a.png", OTHER_NAME)).message
    assert "no images from" in refusal(source, host.url("/a.png", f"x.{NAME}")).message


# ---- rebinding


def test_a_name_is_looked_up_once_and_what_it_answers_later_is_not_reached(
    host: ImageHost,
) -> None:
    answers = [["127.0.0.1"], ["127.0.0.2"]]
    look_up = lambda _: answers.pop(0)  # noqa: E731  # a name server that changes its mind
    assert fetch(fetcher(host, look_up=look_up), host.url("/a.png")) == [FILE + b"a"]
    assert answers == [["127.0.0.2"]]


def test_a_redirect_to_the_same_host_is_looked_up_and_judged_anew(host: ImageHost) -> None:
    answers = [["127.0.0.1"], ["127.0.0.2"]]
    look_up = lambda _: answers.pop(0)  # noqa: E731
    refused = refusal(fetcher(host, look_up=look_up), to(host, "/a.png"))
    assert "no address on the public internet" in refused.message
    assert len(host.asked) == 1


def test_the_products_own_check_reaches_nothing_on_this_machine(host: ImageHost) -> None:
    source = fetcher(host, may_reach=is_public_address)
    assert "no address" in refusal(source, host.url("/a.png")).message
    assert "no address" in refusal(source, host.url("/a.png", "127.0.0.1")).message
    assert not host.asked


# ---- certificates


def test_a_certificate_of_an_unknown_authority_is_refused(host: ImageHost) -> None:
    source = fetcher(host, trust=ssl.create_default_context())
    assert "no certificate that holds" in refusal(source, host.url("/a.png")).message
    assert not host.asked


def test_a_certificate_for_another_name_is_refused(host: ImageHost) -> None:
    source = fetcher(host, look_up=lambda _: ["127.0.0.1"])
    refused = refusal(source, host.url("/a.png", "elsewhere.example.com"))
    assert "no certificate that holds" in refused.message
    assert not host.asked


# ---- sizes and times


@pytest.mark.parametrize("path", ["/announced", "/endless"])
def test_a_large_file_is_given_up_at_the_limit(host: ImageHost, path: str) -> None:
    source = fetcher(host, serving={"max_image_bytes": 100_000})
    refused = refusal(source, host.url(path))
    assert (refused.code, refused.param) == ("image_too_large", "[0]")
    assert host.left.wait(WAIT_S)
    assert host.num_endless_bytes < 20_000_000  # what sockets hold, not what it would have sent


def test_a_file_as_large_as_allowed_passes(host: ImageHost) -> None:
    size = len(FILE) + 1
    source = fetcher(host, serving={"max_image_bytes": size})
    assert fetch(source, host.url("/a.png")) == [FILE + b"a"]
    source = fetcher(host, serving={"max_image_bytes": size - 1})
    assert refusal(source, host.url("/a.png")).code == "image_too_large"


def test_the_images_of_a_request_have_a_limit_together(host: ImageHost) -> None:
    urls = [host.url(f"/{name}.png") for name in "abc"]
    size = 3 * (len(FILE) + 1)
    assert len(fetch(fetcher(host, serving={"max_body_bytes": size}), *urls)) == 3
    refused = refusal(fetcher(host, serving={"max_body_bytes": size - 1}), *urls)
    assert refused.code == "image_too_large"
    assert "together" in refused.message


def test_a_slow_body_is_given_up_in_time(host: ImageHost) -> None:
    refused = refusal(fetcher(host, timeout_s=0.5), host.url("/slow"))
    assert "did not arrive within 0.5 s" in refused.message
    assert host.left.wait(WAIT_S)


def test_a_slow_look_up_is_given_up_in_time(host: ImageHost) -> None:
    go = threading.Event()

    def look_up(name: str) -> list[str]:
        go.wait(WAIT_S)
        return host.look_up(name)

    async def ask() -> None:
        # Within the loop: its end would wait for the thread.
        try:
            await fetcher(host, look_up=look_up, timeout_s=0.2).with_files(asking(host.url("/")))
        finally:
            go.set()

    with pytest.raises(InvalidRequestError, match=r"did not arrive within 0\.2 s"):
        asyncio.run(ask())
    assert not host.asked


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/nothing", "status 404, not 200"),
        ("/packed", "packed"),
        ("/cut", "cannot be fetched"),
    ],
)
def test_what_is_no_whole_file_is_refused(host: ImageHost, path: str, why: str) -> None:
    assert why in refusal(fetcher(host), host.url(path)).message


def test_a_closed_port_is_refused(host: ImageHost) -> None:
    with ImageHost(Path(host.folder) / "other") as gone:
        port = gone.port
    source = fetcher(host, allowed_ports=(port,))
    refused = refusal(source, f"https://{NAME}:{port}/a.png")
    assert refused.message == "[0]: the URL's host cannot be reached"


def test_the_first_failure_ends_the_others(host: ImageHost) -> None:
    refused = refusal(fetcher(host), host.url("/slow"), host.url("/nothing"))
    assert refused.param == "[1]"


# ---- many


def test_so_many_at_a_time_and_the_rest_in_turn(host: ImageHost) -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def look_up(name: str) -> list[str]:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        threading.Event().wait(0.02)
        with lock:
            now[0] -= 1
        return host.look_up(name)

    urls = [host.url("/a.png")] * 8
    assert len(fetch(fetcher(host, look_up=look_up, max_concurrent=2), *urls)) == 8
    assert most[0] <= 2


def test_who_waits_too_long_for_a_turn_is_told_to_come_again(host: ImageHost) -> None:
    async def ask() -> None:
        source = fetcher(host, max_concurrent=1)
        slow = asyncio.create_task(source.with_files(asking(host.url("/slow"))))
        await asyncio.to_thread(host.begun.wait, WAIT_S)
        seen = Observed()
        hasty = fetcher(host, max_concurrent=1, timeout_s=0.2, observe=seen)
        hasty._free = source._free
        try:
            with pytest.raises(OverloadedError) as caught:
                await hasty.with_files(asking(host.url("/a.png")))
            assert caught.value.retry_after_s == 1.0
            assert seen.outcomes() == ["overloaded"]
        finally:
            slow.cancel()
            await asyncio.wait([slow])

    asyncio.run(ask())


def test_requests_that_wait_are_bounded(host: ImageHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_fetch, "_MAX_WAITING", 1)

    async def ask() -> None:
        source = fetcher(host)
        slow = asyncio.create_task(source.with_files(asking(host.url("/slow"))))
        await asyncio.to_thread(host.begun.wait, WAIT_S)
        with pytest.raises(OverloadedError):
            await source.with_files(asking(host.url("/a.png")))
        slow.cancel()
        await asyncio.wait([slow])
        assert slow.cancelled()
        await source.with_files(asking(host.url("/a.png")))

    asyncio.run(ask())
    assert host.left.wait(WAIT_S)  # the caller who left is no longer fetched for


# ---- what is counted


class Observed:
    """Notes what it is told of."""

    def __init__(self) -> None:
        self.seen: list[tuple[FetchOutcome, float, int]] = []

    def __call__(self, outcome: FetchOutcome, seconds: float, num_bytes: int) -> None:
        self.seen.append((outcome, seconds, num_bytes))

    def outcomes(self) -> list[str]:
        return sorted(outcome.value for outcome, *_ in self.seen)


def test_a_fetch_is_counted_with_its_time_and_its_bytes(host: ImageHost) -> None:
    seen = Observed()
    fetch(fetcher(host, observe=seen), to(host, "/a.png"), host.url("/b.png"))
    assert seen.outcomes() == ["ok", "ok"]
    for _, seconds, num_bytes in seen.seen:
        assert 0 < seconds < WAIT_S
        assert num_bytes == len(FILE) + 1


@pytest.mark.parametrize(
    ("path", "outcome"),
    [
        ("/nothing", "bad_answer"),
        ("/packed", "bad_answer"),
        ("/cut", "bad_answer"),
        ("/announced", "too_large"),
        ("/slow", "timeout"),
        ("/to?url=https%3A%2F%2F10.0.0.1%2F", "not_allowed"),
        ("/to?url=https%3A%2F%2Funknown.example.com%2F", "not_allowed"),
        ("/to?url=http%3A%2F%2Fexample.com%2F", "not_allowed"),
    ],
)
def test_a_refusal_is_counted_by_its_kind(host: ImageHost, path: str, outcome: str) -> None:
    seen = Observed()
    refusal(fetcher(host, observe=seen, timeout_s=1.0), host.url(path))
    assert seen.outcomes() == [outcome]
    assert seen.seen[0][2] == 0


def test_hosts_that_cannot_be_spoken_to_are_counted(host: ImageHost) -> None:
    seen = Observed()
    refusal(fetcher(host, observe=seen, trust=ssl.create_default_context()), host.url("/a.png"))
    assert seen.outcomes() == ["unreachable"]


def test_images_that_another_ended_are_counted_as_cancelled(host: ImageHost) -> None:
    seen = Observed()
    refusal(fetcher(host, observe=seen), host.url("/slow"), host.url("/nothing"))
    assert seen.outcomes() == ["bad_answer", "cancelled"]


# ---- what is told


def test_urls_and_hosts_are_not_logged_nor_told(
    host: ImageHost, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    urls = [host.url("/secret"), "https://secret.invalid/", host.url("/cut?secret")]
    urls.append(to(host, "https://user:secret@example.com/"))
    for url in urls:
        refused = refusal(fetcher(host), url)
        assert "secret" not in refused.message
        assert NAME not in refused.message
    fetch(fetcher(host), host.url("/a.png?secret"))
    ours = [r.getMessage() for r in caplog.records if not r.name.startswith("aiohttp.access")]
    assert not [line for line in ours if "secret" in line or NAME in line]
    assert "secret" not in repr(asking("https://secret.example.com/"))
