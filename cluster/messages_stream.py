"""Generation events to server-sent events of the Anthropic dialect.

A message is a row of blocks, one open at a time; what comes in another channel closes it. A plain
delta is written from a prebuilt prefix: one string is encoded per token, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ostro.actors.errors import OstroError
from ostro.cluster.error_table import in_words_of
from ostro.cluster.generation import (
    Finished,
    GenerationEvent,
    Started,
    TextDelta,
    ToolCallDone,
)
from ostro.cluster.messages_fields import (
    OWN_NAMES,
    SIGNATURE,
    Json,
    head,
    input_usage,
    message_error,
    stop_fields,
    tool_use_fields,
    usage_fields,
)

_encode = msgspec.json.Encoder().encode

_TEXT: Json = {"type": "text", "text": ""}
_THINKING: Json = {"type": "thinking", "thinking": "", "signature": ""}


class MessageEventWriter:
    """Writes one generation's events; knows what went before."""

    end = b""  # `message_stop` or `error` is the last word

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._num_blocks = 0
        self._open: Json | None = None
        self._prefix = b""

    def write(self, event: GenerationEvent) -> bytes:
        """The bytes of an event, ready to send; may hold several chunks or none."""
        if isinstance(event, TextDelta):
            return self._delta(event)
        if isinstance(event, Started):
            return self._start(event)
        if isinstance(event, ToolCallDone):
            return self._tool_use(event)
        return self._finish(event)

    def failure(self, error: OstroError) -> bytes:
        """The last chunk of a stream that failed after it began."""
        told = in_words_of(error, OWN_NAMES)
        return _event("error", message_error(told, self._request_id))

    def _start(self, event: Started) -> bytes:
        usage = input_usage(event.num_prompt_tokens, event.num_cached_tokens)
        message = {
            **head(event),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {**usage, "output_tokens": 0},
        }
        return _event("message_start", {"type": "message_start", "message": message})

    def _delta(self, event: TextDelta) -> bytes:
        if not event.text:
            return b""
        block = _THINKING if event.thinking else _TEXT
        opening = b"" if self._open is block else self._open_block(block)
        return opening + self._prefix + _encode(event.text) + b"}}\n\n"

    def _open_block(self, block: Json) -> bytes:
        closing = self._close_block()
        index, kind = self._num_blocks, block["type"]
        self._open = block
        self._num_blocks += 1
        self._prefix = (
            b"event: content_block_delta\ndata: "
            b'{"type":"content_block_delta","index":%d,"delta":{"type":"%s_delta","%s":'
            % (index, *(2 * (str(kind).encode(),)))
        )
        fields = {"type": "content_block_start", "index": index, "content_block": block}
        return closing + _event("content_block_start", fields)

    def _close_block(self) -> bytes:
        if self._open is None:
            return b""
        index = self._num_blocks - 1
        signed = b""
        if self._open is _THINKING:
            signed = _delta(index, {"type": "signature_delta", "signature": SIGNATURE})
        self._open = None
        return signed + _event("content_block_stop", {"type": "content_block_stop", "index": index})

    def _tool_use(self, event: ToolCallDone) -> bytes:
        block = {**tool_use_fields(event.call.call_id, event.call.name), "input": {}}
        opening = self._open_block(block)
        arguments = {"type": "input_json_delta", "partial_json": event.call.arguments}
        return opening + _delta(self._num_blocks - 1, arguments) + self._close_block()

    def _finish(self, event: Finished) -> bytes:
        last = {
            "type": "message_delta",
            "delta": stop_fields(event),
            "usage": usage_fields(event),
        }
        return (
            self._close_block()
            + _event("message_delta", last)
            + _event("message_stop", {"type": "message_stop"})
        )


def _delta(index: int, delta: Mapping[str, object]) -> bytes:
    fields = {"type": "content_block_delta", "index": index, "delta": delta}
    return _event("content_block_delta", fields)


def _event(name: str, fields: Mapping[str, object]) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + _encode(fields) + b"\n\n"
