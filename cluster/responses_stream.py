"""Generation events to the typed, numbered server-sent events of /v1/responses.

A plain delta is written from a prebuilt prefix: one string is encoded per token, nothing else.
"""

from __future__ import annotations

from ostro.actors.errors import OstroError
from ostro.cluster.generation import (
    Finished,
    GenerationEvent,
    Started,
    TextDelta,
    ToolCallDone,
)
from ostro.cluster.openai_fields import Json, token_logprobs
from ostro.cluster.responses_answer import GrowingItem, ResponseAnswer, encode
from ostro.cluster.responses_fields import status_of


class ResponseWriter:
    """Writes one response; knows what went before."""

    end = b""  # the last event ends the stream: the mistralai client fails on a [DONE]

    def __init__(self, head: Json) -> None:
        self._head = head
        self._answer = ResponseAnswer(head)
        self._next_number = 0
        self._has_begun = False
        self._prefix = b""

    def write(self, event: GenerationEvent) -> bytes:
        """The bytes of an event, ready to send; may hold several events."""
        if isinstance(event, TextDelta):
            return self._delta(event)
        if isinstance(event, ToolCallDone):
            return self._close() + self._call(event)
        if isinstance(event, Started):
            return self._begin(self._answer.begin(event))
        return self._close(status_of(event.reason)) + self._finish(event)

    def failure(self, error: OstroError) -> bytes:
        """The last event of a stream that failed after it was opened."""
        begun = b"" if self._has_begun else self._begin(self._head)
        return begun + self._event("response.failed", response=self._answer.fail(error))

    def _begin(self, response: Json) -> bytes:
        self._has_begun = True
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def _delta(self, event: TextDelta) -> bytes:
        growing = self._answer.growing
        before = b""
        if growing is None or growing.is_thinking is not event.thinking:
            before = self._close()
            growing = self._answer.item_for(event)
            before += self._open(growing)
        growing.add(event)
        logprobs = b"" if growing.is_thinking else b',"logprobs":[]'
        if event.logprobs and not growing.is_thinking:
            logprobs = b',"logprobs":' + encode(token_logprobs(event.logprobs))
        number = b'"sequence_number":%d' % self._number()
        delta = b',"delta":' + encode(event.text)
        return before + self._prefix + number + delta + logprobs + b"}\n\n"

    def _open(self, item: GrowingItem) -> bytes:
        place = _place(item)
        name = "response.reasoning_text.delta" if item.is_thinking else "response.output_text.delta"
        self._prefix = (
            b"event: %s\ndata: " % name.encode() + encode({"type": name, **place})[:-1] + b","
        )
        added = self._event(
            "response.output_item.added", output_index=item.index, item=item.fields("in_progress")
        )
        return added + self._event("response.content_part.added", **place, part=item.part())

    def _close(self, status: str = "completed") -> bytes:
        growing = self._answer.growing
        item = self._answer.close(status)
        if growing is None or item is None:
            return b""
        place, part = _place(growing), growing.part()
        if growing.is_thinking:
            done = self._event("response.reasoning_text.done", **place, text=part["text"])
        else:
            done = self._event(
                "response.output_text.done", **place, text=part["text"], logprobs=part["logprobs"]
            )
        done += self._event("response.content_part.done", **place, part=part)
        return done + self._event(
            "response.output_item.done", output_index=growing.index, item=item
        )

    def _call(self, event: ToolCallDone) -> bytes:
        index, item = self._answer.add_call(event)
        place: Json = {"item_id": item["id"], "output_index": index}
        arguments = item["arguments"]
        begun = {**item, "arguments": "", "status": "in_progress"}
        done = {"name": item["name"], "arguments": arguments}  # mistralai insists on the name
        name = "response.function_call_arguments"
        return b"".join(
            (
                self._event("response.output_item.added", output_index=index, item=begun),
                self._event(f"{name}.delta", **place, delta=arguments),
                self._event(f"{name}.done", **place, **done),
                self._event("response.output_item.done", output_index=index, item=item),
            )
        )

    def _finish(self, event: Finished) -> bytes:
        response = self._answer.finish(event)
        is_whole = response["status"] == "completed"
        name = "response.completed" if is_whole else "response.incomplete"
        return self._event(name, response=response)

    def _event(self, name: str, /, **fields: object) -> bytes:
        data = encode({"type": name, "sequence_number": self._number(), **fields})
        return b"event: %s\ndata: %s\n\n" % (name.encode(), data)

    def _number(self) -> int:
        number = self._next_number
        self._next_number += 1
        return number


def _place(item: GrowingItem) -> Json:
    return {"item_id": item.item_id, "output_index": item.index, "content_index": 0}
