"""Several answers from one prompt: one request until it is placed, one request per choice after.

A cell places a request's choices together, so that they share the pages of its prompt; from there
on the router's books and the shard's scheduler follow each by itself.
"""

from __future__ import annotations

import msgspec

from ostro.actors.engine.choice_seed import choice_seed
from ostro.actors.engine.request import GenerationRequest


def each_choice(request: GenerationRequest) -> list[GenerationRequest]:
    """One request per choice, alike but for id, number and seed; the first keeps all three."""
    if request.num_choices == 1:
        return [request]
    return [
        msgspec.structs.replace(
            request,
            request_id=request_id,
            sampling=msgspec.structs.replace(
                request.sampling, seed=choice_seed(request.sampling.seed, index)
            ),
            choice=request.choice + index,
            num_choices=1,
            prompt_shared_by=request.num_choices,
        )
        for index, request_id in enumerate(choice_ids(request))
    ]


def choice_ids(request: GenerationRequest) -> list[str]:
    """The ids of `each_choice`."""
    submission = submission_of(request.request_id)
    others = range(request.choice + 1, request.choice + request.num_choices)
    return [request.request_id, *(f"{submission}.{choice}" for choice in others)]


def unique_id(request_id: str, serial: str, choice: int) -> str:
    """A name for one choice of one submission.

    Callers use their ids again, before the last use is quite over.
    """
    return f"{request_id}#{serial}.{choice}"


def submission_of(unique: str) -> str:
    """What a `unique_id` has in common with those of the same submission."""
    name, mark, rest = unique.rpartition("#")
    return f"{name}#{rest.rpartition('.')[0] or rest}" if mark else unique


def callers_id(unique: str) -> str:
    """The caller's id within a `unique_id`."""
    return unique.rpartition("#")[0] or unique
