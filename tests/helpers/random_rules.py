"""Random rules that a request's tokens are under, for property tests over `engine_fakes`."""

from __future__ import annotations

from hypothesis import strategies as st

from ostro.actors.engine.request import GrammarParams, ThinkingParams

BEGIN, END = 3, 4

# Tokens from 5 on are the letters from a on: 9, which may be a stop token, is e.
_GRAMMARS = (
    "start: /[a-d]{2,4}/",
    'start: "ab" /[cd]/* "g"?',
    "start: /.+/",
    'start: "a" /e+/ "g"',
)


def thinking_rules(most_budget: int) -> st.SearchStrategy[ThinkingParams]:
    """Thinking with any budget up to this one, or without; any close, any soft zone up to 3."""
    return st.builds(
        ThinkingParams,
        begin_token_id=st.just(BEGIN),
        end_token_id=st.just(END),
        budget_tokens=st.none() | st.integers(0, most_budget),
        soft_zone_tokens=st.integers(0, 3),
        closing_token_ids=st.sampled_from([(), (END,), (5, 6, END)]),
        starts_open=st.booleans(),
    )


def grammar_rules(
    *,
    prefixes: tuple[tuple[int, ...], ...] = ((),),
    held: tuple[tuple[int, ...], ...] = ((), (2,)),
) -> st.SearchStrategy[GrammarParams]:
    """Grammars of few letters, with one of these prefixes and of these held tokens."""
    return st.builds(
        GrammarParams,
        text=st.sampled_from(_GRAMMARS),
        prefix_token_ids=st.sampled_from(prefixes),
        held_token_ids=st.sampled_from(held),
    )
