"""One response as it grows: generation events in, the `response` object out."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import msgspec

from ostro.actors.errors import OstroError
from ostro.cluster.generation import Finished, GenerationEvent, Started, TextDelta, ToolCallDone
from ostro.cluster.openai_fields import Json, reasoning_fields, token_logprobs
from ostro.cluster.responses_fields import response_error, response_usage, status_of

encode = msgspec.json.Encoder().encode


@dataclass(slots=True)
class GrowingItem:
    """Thinking or text of the answer, which the next delta may add to.

    Attributes:
        index: Its place in the response's output.
    """

    item_id: str
    index: int
    is_thinking: bool
    texts: list[str] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)

    def add(self, event: TextDelta) -> None:
        """Take the next piece."""
        self.texts.append(event.text)
        if event.logprobs and not self.is_thinking:
            self.logprobs.extend(token_logprobs(event.logprobs))

    def part(self) -> Json:
        """Its one part, with all that has come."""
        text = "".join(self.texts)
        if self.is_thinking:
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs}

    def fields(self, status: str) -> Json:
        """The output item; without its part until the first piece has come."""
        parts = [self.part()] if self.texts else []
        item: Json = {"id": self.item_id, "status": status, "content": parts}
        if self.is_thinking:
            return {"type": "reasoning", **item, "summary": []}
        return {"type": "message", **item, "role": "assistant"}


class ResponseAnswer:
    """Gathers the events of one generation.

    Attributes:
        growing: The last item, while more may be added to it.
    """

    def __init__(self, head: Json) -> None:
        self.growing: GrowingItem | None = None
        self._response = head
        self._items: list[Json] = []
        self._has_ended = False

    def add(self, event: GenerationEvent) -> None:
        """Take the next event."""
        if isinstance(event, TextDelta):
            self.item_for(event).add(event)
        elif isinstance(event, ToolCallDone):
            self.close()
            self.add_call(event)
        elif isinstance(event, Started):
            self.begin(event)
        else:
            self.close(status_of(event.reason))
            self.finish(event)

    def body(self) -> bytes:
        """The whole response.

        Raises:
            OstroError: Its generation brought no last event.
        """
        if not self._has_ended:
            raise OstroError("the generation ended without its last event")
        return encode(self._response)

    def begin(self, event: Started) -> Json:
        """The response as it stands once its generation has begun."""
        reasoning = {"effort": event.effort, "summary": None, "budget": event.budget_tokens}
        self._response |= {"id": event.request_id, "model": event.model, "reasoning": reasoning}
        return self._response

    def item_for(self, event: TextDelta) -> GrowingItem:
        """The item that a delta belongs to; a new one if the last is of the other channel."""
        if self.growing is None or self.growing.is_thinking is not event.thinking:
            self.close()
            kind = "rs" if event.thinking else "msg"
            index = len(self._items)
            self.growing = GrowingItem(self._item_id(kind), index, is_thinking=event.thinking)
        return self.growing

    def close(self, status: str = "completed") -> Json | None:
        """End the growing item and give it; None if there is none."""
        item, self.growing = self.growing, None
        if item is None:
            return None
        fields = item.fields("completed" if status == "completed" else "incomplete")
        self._items.append(fields)
        return fields

    def add_call(self, event: ToolCallDone) -> tuple[int, Json]:
        """A call's place in the output and its item."""
        call = event.call
        item: Json = {
            "type": "function_call",
            "id": self._item_id("fc"),
            "call_id": call.call_id,
            "name": call.name,
            "arguments": call.arguments,
            "status": "completed",
        }
        self._items.append(item)
        return len(self._items) - 1, item

    def finish(self, event: Finished) -> Json:
        """The response of a generation that ended well, or by its limit or its caller."""
        status = status_of(event.reason)
        if status == "completed":
            self._response["completed_at"] = int(time.time())
        elif status == "incomplete":
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}
        reasoning = {**reasoning_fields(event.reasoning), "summary": None}
        usage = response_usage(event.usage)
        self._has_ended = True
        return self._end(status, reasoning=reasoning, usage=usage)

    def fail(self, error: OstroError) -> Json:
        """The response of a generation that failed after it began."""
        self.close("failed")
        return self._end("failed", error=response_error(error))

    def _end(self, status: str, **fields: object) -> Json:
        self._response |= {"status": status, "output": self._items, **fields}
        return self._response

    def _item_id(self, kind: str) -> str:
        response_id = str(self._response["id"]).removeprefix("resp_")
        return f"{kind}_{response_id}_{len(self._items)}"
