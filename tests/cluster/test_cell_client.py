"""CellClient: images go out one by one; what waits is joined; choices; what is lost goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

import msgspec
import pytest

from ostro.actors.engine.request import (
    FinishReason,
    GenerationRequest,
    ImageInput,
    SamplingParams,
    StopParams,
    TokenEvent,
)
from ostro.actors.errors import (
    InvalidRequestError,
    NotReadyError,
    OstroError,
    OverloadedError,
    ShardLostError,
)
from ostro.actors.fabric.messages import (
    Accepted,
    Cancel,
    CancelGeneration,
    ControlDone,
    Members,
    Rejected,
    Submit,
)
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


def client_of(
    router: FakeRouter, *, submit_timeout_s: float = 10.0, recovery_timeout_s: float = 0.0
) -> CellClient:
    async def nowhere() -> str:
        raise AssertionError

    client = CellClient(
        nowhere,
        b"secret",
        ingress_id="test",
        submit_timeout_s=submit_timeout_s,
        recovery_timeout_s=recovery_timeout_s,
    )
    client._router = router  # type: ignore[assignment]
    client._members = Members(0, True, {0: "unix:nowhere"})
    client._streaming = {0}
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
        with pytest.raises(NotReadyError, match="takes nothing as large"):
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


def tokens(
    first_index: int, *token_ids: int, finish: FinishReason | None = None, choice: int = 0
) -> TokenEvent:
    return TokenEvent("", first_index, list(token_ids), finish_reason=finish, choice=choice)


def choices_of(*num_choices: int) -> list[GenerationRequest]:
    """One request per number, with so many choices of one prompt."""
    asked, first = [], 0
    for number in num_choices:
        asked.append(
            msgspec.structs.replace(request(num_images=0), choice=first, num_choices=number)
        )
        first += number
    return asked


async def read_all(
    *waiting: TokenEvent, asked: Sequence[GenerationRequest] = ()
) -> list[TokenEvent]:
    """What a reader gets of events that all came before it looked."""
    client = client_of(FakeRouter(unsent_bytes=0))
    async with aclosing(client.submit(*(asked or choices_of(1)))) as events:
        reading = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        name_of = {int(name.rpartition(".")[2]): name for name in client._inboxes}
        client._hand_out(
            [msgspec.structs.replace(event, request_id=name_of[event.choice]) for event in waiting]
        )
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


STOP = FinishReason.STOP


def test_choices_that_wait_together_are_joined_each_with_its_own() -> None:
    read = asyncio.run(
        read_all(
            tokens(0, 5),
            tokens(0, 8, choice=1),
            tokens(1, 6),
            tokens(1, 9, finish=STOP, choice=1),
            tokens(2, 7, finish=STOP),
            asked=choices_of(2),
        )
    )
    assert [(event.choice, event.token_ids) for event in read] == [(0, [5, 6, 7]), (1, [8, 9])]


async def submitted(router: FakeRouter, client: CellClient, *asked: GenerationRequest):
    """A submission of which everything has been sent, its reader waiting."""
    events = client.submit(*asked)
    reading = asyncio.ensure_future(anext(events))
    await router.was_sent.wait()
    await asyncio.sleep(0)
    return events, reading, [m.request for m in router.sent if isinstance(m, Submit)]


def test_several_prompts_are_one_submission_that_ends_with_its_last_choice() -> None:
    async def run() -> None:
        router = FakeRouter(unsent_bytes=0)
        client = client_of(router)
        events, reading, sent = await submitted(router, client, *choices_of(2, 1))
        first, second = (request.request_id for request in sent)
        assert [first[-2:], second[-2:]] == [".0", ".2"]
        for name in (first, second):
            client._take(Accepted(name, 0))
        other = first[:-1] + "1"
        for name in (second, other, first):
            client._hand_out([TokenEvent(name, 0, [2], finish_reason=STOP)])
        read = [await reading] + [event async for event in events]
        assert [event.request_id for event in read] == [second, other, first]
        assert not client._inboxes
        assert not [m for m in router.sent if isinstance(m, CancelGeneration)]

    asyncio.run(run())


def test_one_refused_prompt_ends_the_submission_and_cancels_the_others() -> None:
    async def run() -> None:
        router = FakeRouter(unsent_bytes=0)
        client = client_of(router)
        _, reading, sent = await submitted(router, client, *choices_of(2, 1))
        client._take(Accepted(sent[0].request_id, 0))
        client._take(
            Rejected(sent[1].request_id, "OverloadedError", "queue_full", "full", None, 2.0)
        )
        with pytest.raises(OverloadedError, match="full"):
            await reading
        (cancel,) = (m for m in router.sent if isinstance(m, CancelGeneration))
        assert cancel.request_id == sent[0].request_id.removesuffix(".0")
        assert not client._inboxes

    asyncio.run(run())


def test_leaving_cancels_all_choices_and_dropping_one() -> None:
    async def run() -> None:
        router = FakeRouter(unsent_bytes=0)
        client = client_of(router)
        events, reading, (sent,) = await submitted(router, client, *choices_of(3))
        name = sent.request_id
        client._hand_out([TokenEvent(name, 0, [5])])
        await reading
        client.drop(name)
        client.drop("somebody else's")
        await events.aclose()
        client.drop(name)  # over: nothing to stop
        cancels = [m.request_id for m in router.sent if isinstance(m, CancelGeneration)]
        assert cancels == [name, name.removesuffix(".0")]

    asyncio.run(run())


def test_a_request_id_is_used_once_at_a_time() -> None:
    async def run() -> None:
        router = FakeRouter(unsent_bytes=0)
        client = client_of(router)
        events, reading, _ = await submitted(router, client, *choices_of(2))
        with pytest.raises(InvalidRequestError, match="running already"):
            await anext(client.submit(*choices_of(1)))
        reading.cancel()
        await asyncio.wait([reading])
        await events.aclose()
        retry = asyncio.ensure_future(anext(client.submit(*choices_of(1))))
        await asyncio.sleep(0)
        retry.cancel()
        assert len([m for m in router.sent if isinstance(m, Submit)]) == 2

    asyncio.run(run())


class MendingCell:
    """A client and its router, which loses what it serves and takes it again."""

    def __init__(self, *, recovery_timeout_s: float = 30.0) -> None:
        self.router = FakeRouter(unsent_bytes=0)
        self.client = client_of(self.router, recovery_timeout_s=recovery_timeout_s)
        self.read: list[TokenEvent] = []

    async def reads(self, *asked: GenerationRequest) -> None:
        async for event in self.client.submit(*asked):
            self.read.append(event)

    async def submitted(self, count: int) -> list[Submit]:
        """All that was submitted, once it is so much."""
        async with asyncio.timeout(20):
            while len(sent := [m for m in self.router.sent if isinstance(m, Submit)]) < count:
                self.router.was_sent.clear()
                await self.router.was_sent.wait()
        for submit in sent:
            self.client._take(Accepted(submit.request.request_id, 0))
        return sent

    def brings(self, submit: Submit, *token_ids: int, finish: FinishReason | None = None) -> None:
        choice = submit.request.choice
        event = TokenEvent(submit.request.request_id, 0, list(token_ids), choice=choice)
        self.client._hand_out([msgspec.structs.replace(event, finish_reason=finish)])

    def loses(self, submit: Submit, error: OstroError | None = None) -> None:
        lost = error or ShardLostError("lost expert-1", retry_after_s=5)
        self.client._take(Rejected.by(submit.request.request_id, lost))


def test_what_was_lost_goes_on_with_what_the_reader_has() -> None:
    async def run() -> None:
        cell = MendingCell()
        reading = asyncio.create_task(cell.reads(*choices_of(2)))
        (first,) = await cell.submitted(1)
        cell.brings(first, 5, 6)
        cell.loses(first)
        _, again, other = await cell.submitted(3)
        assert (again.output_token_ids, other.output_token_ids) == ([5, 6], [])
        assert again.request.request_id != first.request.request_id
        cell.brings(first, 99)  # late, of the life before
        cell.brings(again, 7, finish=STOP)
        cell.brings(other, 8, finish=STOP)
        await asyncio.wait_for(reading, 20)
        assert [(e.choice, e.token_ids) for e in cell.read] == [(0, [5, 6]), (0, [7]), (1, [8])]
        assert not cell.client._inboxes

    asyncio.run(run())


def test_a_cell_that_is_not_mended_yet_is_asked_again() -> None:
    async def run() -> None:
        cell = MendingCell()
        reading = asyncio.create_task(cell.reads(*choices_of(1)))
        (first,) = await cell.submitted(1)
        cell.client._members = Members(0, False, {0: "unix:nowhere"})
        cell.loses(first)
        await asyncio.sleep(0.2)
        assert len(await cell.submitted(1)) == 1
        cell.client._members = Members(1, True, {0: "unix:nowhere"})
        _, again = await cell.submitted(2)
        cell.loses(again, NotReadyError("the server is recovering", retry_after_s=5))
        *_, third = await cell.submitted(3)
        cell.brings(third, 7, finish=STOP)
        await asyncio.wait_for(reading, 20)
        assert [event.token_ids for event in cell.read] == [[7]]

    asyncio.run(run())


def test_what_is_lost_again_and_again_is_given_up() -> None:
    async def run() -> None:
        cell = MendingCell()
        reading = asyncio.create_task(cell.reads(*choices_of(1)))
        for life in range(1, 4):
            *_, submit = await cell.submitted(life)
            cell.brings(submit, life)
            cell.loses(submit)
        with pytest.raises(ShardLostError, match="expert-1"):
            await asyncio.wait_for(reading, 20)
        assert [event.token_ids for event in cell.read] == [[1], [2], [3]]
        assert not cell.client._running

    asyncio.run(run())


@pytest.mark.parametrize("recovery_timeout_s", [0.0, 0.2])
def test_a_cell_that_is_not_mended_in_time_ends_the_wait_with_the_loss(
    recovery_timeout_s: float,
) -> None:
    async def run() -> None:
        cell = MendingCell(recovery_timeout_s=recovery_timeout_s)
        reading = asyncio.create_task(cell.reads(*choices_of(1)))
        (first,) = await cell.submitted(1)
        cell.client._members = Members(0, False, {})
        cell.loses(first)
        with pytest.raises(ShardLostError, match="expert-1"):
            await asyncio.wait_for(reading, 20)
        assert not cell.client._inboxes

    asyncio.run(run())


def test_closing_ends_the_wait_for_a_mended_cell() -> None:
    async def run() -> None:
        cell = MendingCell()
        reading = asyncio.create_task(cell.reads(*choices_of(1)))
        (first,) = await cell.submitted(1)
        cell.client._members = Members(0, False, {})
        cell.loses(first)
        await asyncio.sleep(0.1)
        cell.client._router = None
        await cell.client.close()
        with pytest.raises(ShardLostError):
            await asyncio.wait_for(reading, 20)

    asyncio.run(run())


def test_a_choice_that_was_dropped_does_not_go_on() -> None:
    async def run() -> None:
        cell = MendingCell()
        reading = asyncio.create_task(cell.reads(*choices_of(2)))
        (first,) = await cell.submitted(1)
        cell.client.drop(first.request.request_id)
        cell.loses(first)
        _, again = await cell.submitted(2)
        assert again.request.choice == 1
        cell.brings(again, 8, finish=STOP)
        await asyncio.wait_for(reading, 20)

    asyncio.run(run())


def test_a_part_that_is_refused_while_another_goes_on_waits_for_the_next_chance() -> None:
    async def run() -> None:
        cell = MendingCell()
        reading = asyncio.create_task(cell.reads(*choices_of(2)))
        (first,) = await cell.submitted(1)
        cell.loses(first)
        _, again, other = await cell.submitted(3)
        cell.brings(again, 7)
        cell.loses(other, NotReadyError("the server is recovering", retry_after_s=5))
        *_, third, fourth = await cell.submitted(5)
        assert (third.output_token_ids, fourth.output_token_ids) == ([7], [])
        cell.brings(third, 8, finish=STOP)
        cell.brings(fourth, 9, finish=STOP)
        await asyncio.wait_for(reading, 20)
        assert [(e.choice, e.token_ids) for e in cell.read] == [(0, [7]), (0, [8]), (1, [9])]

    asyncio.run(run())


def test_what_the_router_never_let_in_begins_anew_after_a_loss() -> None:
    async def run() -> None:
        cell = MendingCell()
        reading = asyncio.create_task(cell.reads(*choices_of(2)))
        await cell.router.was_sent.wait()
        (first,) = cell.router.sent
        assert isinstance(first, Submit)
        cell.loses(first)
        _, again = await cell.submitted(2)
        assert (again.request.num_choices, again.output_token_ids) == (2, None)
        reading.cancel()

    asyncio.run(run())


def test_tokens_that_come_before_the_routers_word_are_told_once() -> None:
    async def run() -> None:
        cell = MendingCell()
        reading = asyncio.create_task(cell.reads(*choices_of(1)))
        await cell.router.was_sent.wait()
        (first,) = cell.router.sent
        assert isinstance(first, Submit)
        cell.brings(first, 5)
        cell.loses(first)
        _, again = await cell.submitted(2)
        assert again.output_token_ids == [5]
        reading.cancel()

    asyncio.run(run())


def test_a_request_placed_where_tokens_have_no_way_from_goes_on() -> None:
    async def run() -> None:
        cell = MendingCell()
        reading = asyncio.create_task(cell.reads(*choices_of(1)))
        await cell.router.was_sent.wait()
        cell.client._streaming.clear()
        await cell.submitted(1)
        await asyncio.sleep(0)
        cell.client._streaming.add(0)
        _, again = await cell.submitted(2)
        assert again.output_token_ids == []
        cell.brings(again, 7, finish=STOP)
        await asyncio.wait_for(reading, 20)

    asyncio.run(run())


def test_what_goes_on_waits_until_the_channel_is_clear() -> None:
    async def run() -> None:
        cell = MendingCell()
        reading = asyncio.create_task(cell.reads(*choices_of(1)))
        (first,) = await cell.submitted(1)
        cell.router.unsent_bytes = 10 * 2**20
        cell.loses(first)
        await asyncio.sleep(0.2)
        assert len(await cell.submitted(1)) == 1
        cell.router.unsent_bytes = 0
        await cell.submitted(2)
        reading.cancel()

    asyncio.run(run())


def test_a_control_that_finds_nothing_is_to_be_tried_again_while_the_cell_is_mended() -> None:
    async def run() -> None:
        cell = MendingCell()

        async def controlled() -> bool:
            control = asyncio.create_task(cell.client.cancel("r"))
            await cell.router.was_sent.wait()
            cell.router.was_sent.clear()
            cell.client._take(ControlDone(cell.router.sent[-1].tag, applied=False))
            return await control

        assert not await controlled()
        cell.client._members = Members(0, False, {})
        with pytest.raises(NotReadyError, match="recovering"):
            await controlled()

    asyncio.run(run())


def test_the_streams_of_an_epoch_are_dialled_though_their_addresses_are_the_last_ones() -> None:
    async def run() -> None:
        client = MendingCell().client
        client._members = Members(0, False, {})
        client._follow(Members(0, True, {0: "unix:nowhere"}))
        last = client._streams[0]
        client._follow(Members(1, True, {0: "unix:nowhere"}))
        assert client._streams[0] is not last
        client._streams[0].cancel()

    asyncio.run(run())


def test_what_is_lost_while_it_is_being_cancelled_ends_without_a_mended_cell() -> None:
    async def run() -> None:
        cell = MendingCell()
        reading = asyncio.create_task(cell.reads(*choices_of(1)))
        (first,) = await cell.submitted(1)
        cell.client._members = Members(0, False, {})
        cell.client._take(Cancel(0, first.request.request_id))
        cell.loses(first)
        await asyncio.wait_for(reading, 20)
        assert [event.finish_reason for event in cell.read] == [FinishReason.CANCELLED]

    asyncio.run(run())
