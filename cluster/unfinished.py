"""What is left to do of one submission: its choices that have not ended, each with its output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from ostro.actors.engine.choices import choice_ids, each_choice, unique_id
from ostro.actors.engine.request import FinishReason, GenerationRequest, TokenEvent
from ostro.actors.fabric.messages import Cancel, EndThinking, Submit


class Unfinished:
    """Follows a submission, so that what a failure interrupts can be submitted again.

    A prompt and its images are kept as long as one of its choices has not ended.

    Args:
        requests: As the caller named them; several have different prompts.

    Attributes:
        was_accepted: Whether the router has let any of it in; before that, all begins anew.
    """

    def __init__(self, requests: Sequence[GenerationRequest]) -> None:
        self._requests = list(requests)
        self._output_of = {
            request.choice + index: list[int]()
            for request in requests
            for index in range(request.num_choices)
        }
        self._latest: dict[int, TokenEvent] = {}
        self._cancelled: set[int] = set()
        self._unthinking: set[int] = set()
        self._choice_of: dict[str, int] = {}  # by the ids of the latest `submits`
        self.was_accepted = False

    def __len__(self) -> int:
        return len(self._output_of)

    def submits(self, serial: str) -> list[Submit]:
        """What to ask of the router: whole requests, or what is left of accepted ones by choice.

        Args:
            serial: Another one each time, so that nothing of an earlier attempt is mistaken for
                this one's.
        """
        if self.was_accepted:
            left = [
                Submit(
                    self._steered(_named(choice, request, serial)),
                    list(self._output_of[choice.choice]),
                )
                for request in self._requests
                for choice in each_choice(request)
                if choice.choice in self._output_of
            ]
        else:
            left = [Submit(_named(request, request, serial)) for request in self._requests]
        self._choice_of = {
            choice_id: submit.request.choice + index
            for submit in left
            for index, choice_id in enumerate(choice_ids(submit.request))
        }
        return left

    def observe(self, event: TokenEvent) -> None:
        """Take note of what a choice brought."""
        self.was_accepted = True  # its word and the shard's come by different ways
        output = self._output_of.get(event.choice)
        if output is not None:
            output.extend(event.token_ids)
            self._latest[event.choice] = event
            if event.finish_reason is not None:
                self._end(event.choice)

    def heed(self, controls: Iterable[Cancel | EndThinking]) -> None:
        """Remember what was asked of choices, by their ids in the latest attempt."""
        for control in controls:
            asked = self._cancelled if isinstance(control, Cancel) else self._unthinking
            asked.add(self._choice_of[control.request_id])

    def take_cancelled(self) -> list[TokenEvent]:
        """The ends of choices that were cancelled, and lost before a shard could say so."""
        ends = []
        for choice in self._cancelled & self._output_of.keys():
            first_index = len(self._output_of[choice])
            latest = self._latest.get(choice, TokenEvent("", 0, [], choice=choice))
            end = msgspec.structs.replace(
                latest,
                first_index=first_index,
                token_ids=[],
                logprobs=None,
                finish_reason=FinishReason.CANCELLED,
                seconds=None,
            )
            self.observe(end)
            ends.append(end)
        return ends

    def drop(self, choice_ids: Iterable[str]) -> None:
        """Forget choices that the caller wants no more of, by their ids in the latest attempt."""
        for choice_id in choice_ids:
            self._end(self._choice_of[choice_id])

    def _steered(self, choice: GenerationRequest) -> GenerationRequest:
        """With the caller's word that its thinking is to end, unless it had ended before that."""
        latest = self._latest.get(choice.choice)
        ended_by = latest.thinking_ended_by if latest is not None else None
        is_asked = ended_by is None and choice.choice in self._unthinking
        if choice.thinking is None or not (is_asked or ended_by == "caller"):
            return choice
        thinking = msgspec.structs.replace(choice.thinking, ended_by_caller=True)
        return msgspec.structs.replace(choice, thinking=thinking)

    def _end(self, choice: int) -> None:
        self._output_of.pop(choice, None)
        self._latest.pop(choice, None)
        self._requests = [request for request in self._requests if self._is_wanted(request)]

    def _is_wanted(self, request: GenerationRequest) -> bool:
        choices = range(request.choice, request.choice + request.num_choices)
        return any(choice in self._output_of for choice in choices)


def _named(choice: GenerationRequest, asked: GenerationRequest, serial: str) -> GenerationRequest:
    name = unique_id(asked.request_id, serial, choice.choice)
    return msgspec.structs.replace(choice, request_id=name)
