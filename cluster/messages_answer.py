"""Generation events gathered into one message of the Anthropic dialect."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from ostro.actors.errors import OstroError
from ostro.cluster.generation import (
    Finished,
    GenerationEvent,
    Started,
    TextDelta,
    ToolCallDone,
)
from ostro.cluster.messages_fields import (
    SIGNATURE,
    Json,
    head,
    stop_fields,
    tool_use_fields,
    usage_fields,
)

_encode = msgspec.json.Encoder().encode


@dataclass(slots=True)
class _Text:
    """A block of text or thinking, as it grows."""

    is_thinking: bool
    pieces: list[str] = field(default_factory=list)

    def fields(self) -> Json:
        text = "".join(self.pieces)
        if self.is_thinking:
            return {"type": "thinking", "thinking": text, "signature": SIGNATURE}
        return {"type": "text", "text": text}


@dataclass(slots=True)
class WholeMessage:
    """Gathers events until they can be told as one message; its blocks are those of the stream."""

    started: Started | None = None
    finished: Finished | None = None
    blocks: list[_Text | ToolCallDone] = field(default_factory=list)

    def add(self, event: GenerationEvent) -> None:
        """Take the next event."""
        if isinstance(event, TextDelta):
            self._add_text(event)
        elif isinstance(event, ToolCallDone):
            self.blocks.append(event)
        elif isinstance(event, Started):
            self.started = event
        else:
            self.finished = event

    def body(self) -> bytes:
        """A `message`."""
        if self.started is None or self.finished is None:
            raise OstroError("the generation ended without its first or last event")
        return _encode(
            {
                **head(self.started),
                "content": [_block_fields(block) for block in self.blocks],
                **stop_fields(self.finished),
                "usage": usage_fields(self.finished),
            }
        )

    def _add_text(self, event: TextDelta) -> None:
        if not event.text:
            return
        last = self.blocks[-1] if self.blocks else None
        if not isinstance(last, _Text) or last.is_thinking is not event.thinking:
            last = _Text(event.thinking)
            self.blocks.append(last)
        last.pieces.append(event.text)


def _block_fields(block: _Text | ToolCallDone) -> Json:
    if isinstance(block, _Text):
        return block.fields()
    # Raw: the parser has seen that it is an object, and numbers keep all their digits.
    arguments = msgspec.Raw(block.call.arguments.encode())
    return {**tool_use_fields(block.call.call_id, block.call.name), "input": arguments}
