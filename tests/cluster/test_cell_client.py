"""CellClient with images to send: one request after the other, and not for ever."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from ostro.actors.engine.request import (
    FinishReason,
    GenerationRequest,
    ImageInput,
    SamplingParams,
    StopParams,
    TokenEvent,
)
from ostro.actors.errors import NotReadyError
from ostro.actors.fabric.messages import Members, Submit
from ostro.cluster.cell_client import CellClient


class FakeRouter:
    """A channel with a queue of its own making."""

    def __init__(self, unsent_bytes: int) -> None:
        self.unsent_bytes = unsent_bytes
        self.sent: list[object] = []
        self.was_sent = asyncio.Event()

    def send(self, message: object) -> bool:
        self.sent.append(message)
        self.was_sent.set()
        return True


def client_of(router: FakeRouter, *, submit_timeout_s: float = 10.0) -> CellClient:
    async def nowhere() -> str:
        raise AssertionError

    client = CellClient(nowhere, b"secret", ingress_id="test", submit_timeout_s=submit_timeout_s)
    client._router = router  # type: ignore[assignment]
    client._members = Members(0, True, {})
    return client


def request(*, num_images: int = 1) -> GenerationRequest:
    image = ImageInput(start=1, num_tokens=2, height=28, width=28, pixels=b"", digest=b"")
    return GenerationRequest(
        request_id="r",
        prompt_token_ids=[1, 10, 13],
        sampling=SamplingParams(),
        stop=StopParams(max_tokens=1),
        images=(image,) * num_images,
    )


async def first_event(client: CellClient, asked: GenerationRequest) -> TokenEvent:
    async with aclosing(client.submit(asked)) as events:
        return await anext(events)


def test_images_wait_until_the_channel_is_clear() -> None:
    async def run() -> None:
        router = FakeRouter(unsent_bytes=10 * 2**20)
        client = client_of(router)
        waiting = asyncio.create_task(first_event(client, request()))
        await asyncio.sleep(0.02)
        assert not router.sent
        router.unsent_bytes = 0
        await router.was_sent.wait()
        (sent,) = router.sent
        assert isinstance(sent, Submit)
        assert len(sent.request.images) == 1
        done = TokenEvent(sent.request.request_id, 0, [2], finish_reason=FinishReason.STOP)
        client._hand_out([done])
        assert await waiting == done

    asyncio.run(run())


def test_images_do_not_wait_for_ever() -> None:
    async def run() -> None:
        router = FakeRouter(unsent_bytes=10 * 2**20)
        with pytest.raises(NotReadyError, match="takes no images"):
            await first_event(client_of(router, submit_timeout_s=0.01), request())
        assert not any(isinstance(message, Submit) for message in router.sent)

    asyncio.run(run())


def test_text_does_not_wait() -> None:
    async def run() -> None:
        router = FakeRouter(unsent_bytes=10 * 2**20)
        waiting = asyncio.create_task(first_event(client_of(router), request(num_images=0)))
        await router.was_sent.wait()
        waiting.cancel()

    asyncio.run(run())


def tokens(first_index: int, *token_ids: int, finish: FinishReason | None = None) -> TokenEvent:
    return TokenEvent("r", first_index, list(token_ids), finish_reason=finish)


async def read_all(*waiting: TokenEvent) -> list[TokenEvent]:
    """What a reader gets of events that all came before it looked."""
    client = client_of(FakeRouter(unsent_bytes=0))
    asked = request(num_images=0)
    async with aclosing(client.submit(asked)) as events:
        reading = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        (inbox,) = client._inboxes.values()
        for event in waiting:
            inbox.put(event)
        return [await reading] + [event async for event in events]


def test_a_reader_that_is_behind_gets_what_waits_as_one_event() -> None:
    read = asyncio.run(
        read_all(tokens(0, 5), tokens(1, 6), tokens(2, 7, finish=FinishReason.LENGTH))
    )
    assert [(event.first_index, event.token_ids) for event in read] == [(0, [5, 6, 7])]
    assert read[-1].finish_reason is FinishReason.LENGTH


def test_an_error_stays_behind_the_tokens_before_it() -> None:
    read = asyncio.run(read_all(tokens(0, 5), tokens(1, 6), tokens(2, finish=FinishReason.ERROR)))
    assert [event.token_ids for event in read] == [[5, 6], []]
    assert read[-1].finish_reason is FinishReason.ERROR


def test_events_that_do_not_follow_on_each_other_stay_apart() -> None:
    last = tokens(4, 9, finish=FinishReason.STOP)
    read = asyncio.run(read_all(tokens(0, 5), tokens(0, 5), last))
    assert [event.first_index for event in read] == [0, 0, 4]
