"""Whatever is lost and goes on: live choices are counted right, no token is paid for twice."""

from __future__ import annotations

from collections import Counter

import msgspec
from engine_fakes import make_request
from hypothesis import given
from hypothesis import strategies as st
from rank_reports import step_that_finished

from ostro.actors.cell_requests import CellRequests
from ostro.actors.engine.choices import each_choice, unique_id
from ostro.actors.engine.quotas import TenantQuotas
from ostro.actors.engine.request import GenerationRequest
from ostro.configs.deployment import EngineConfig
from ostro.configs.key_table import Quota

_BUDGET = 10**6
_TENANTS = ("a", "b")
_PROMPT = [1, 5, 6]

_BEGINS = st.tuples(st.sampled_from(_TENANTS), st.integers(1, 3))
_ENDS = st.tuples(st.integers(0, 20), st.integers(0, 9))  # which of the open ones, its tokens
_ACTS = st.lists(_BEGINS | _ENDS | st.just("the epoch is lost"), max_size=30)


class Books:
    """A router's books over epochs, and what they should say."""

    def __init__(self) -> None:
        self.quotas = TenantQuotas(clock=lambda: 0.0)
        quota = Quota(tokens_per_minute=_BUDGET, requests_per_minute=_BUDGET)
        self.quotas.configure(dict.fromkeys(_TENANTS, quota))
        self.open: list[GenerationRequest] = []
        self.num_losses = self.num_begun = 0
        self.most: Counter[str] = Counter()  # tokens that tenants may have paid for
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.requests = CellRequests(EngineConfig(), [0], self.quotas)

    def begin(self, tenant: str, num_choices: int) -> None:
        self.num_begun += 1
        name = unique_id(f"r{self.num_begun}", "i-1", 0)
        asked = msgspec.structs.replace(
            make_request(name, _PROMPT, tenant=tenant), num_choices=num_choices
        )
        self.requests.place(asked, "i")
        self.open += each_choice(asked)
        self.most[tenant] += len(_PROMPT)

    def end(self, which: int, num_tokens: int) -> None:
        if not self.open:
            return
        choice = self.open.pop(which % len(self.open))
        outputs = [(choice.request_id, [7] * num_tokens)]
        self.requests.follow(step_that_finished(choice.request_id, outputs=outputs), elapsed_s=0.1)
        self.most[choice.tenant] += num_tokens

    def lose(self) -> None:
        self.num_losses += 1
        given_up = self.requests.give_up()
        assert {live.request_id for live in given_up} == {c.request_id for c in self.open}
        self._begin_epoch()
        renamed = []
        for choice in self.open:
            name, serial = choice.request_id.split("#")[0], f"i-{self.num_losses + 1}"
            again = unique_id(name, serial, choice.choice)
            renamed.append(msgspec.structs.replace(choice, request_id=again))
            self.requests.place(renamed[-1], "i", is_resumed=True)
        self.open = renamed

    def check(self) -> None:
        assert self.quotas._num_live == Counter(choice.tenant for choice in self.open)
        assert len(self.requests) == len(self.open)
        for tenant in _TENANTS:
            paid = _BUDGET - self.quotas._tokens[tenant]._level
            assert 0 <= paid <= self.most[tenant]
            if not self.num_losses:
                assert paid == self.most[tenant]


@given(_ACTS)
def test_live_choices_and_what_tenants_pay_add_up_over_losses(acts: list[object]) -> None:
    books = Books()
    for act in acts:
        match act:
            case str(tenant), int(num_choices):
                books.begin(tenant, num_choices)
            case int(which), int(num_tokens):
                books.end(which, num_tokens)
            case _:
                books.lose()
        books.check()
    while books.open:
        books.end(0, 1)
    books.check()
    assert not books.requests._choices
    assert not books.requests._latest
