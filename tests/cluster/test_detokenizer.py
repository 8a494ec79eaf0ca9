"""Detokenizer: any cut of any bytes gives the text that the whole gives."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ostro.cluster.detokenizer import Detokenizer, TokenTable

NUM_SPECIAL = 2


def table_of(pieces: list[bytes]) -> TokenTable:
    return TokenTable([b"<s>", b"</s>", *pieces], NUM_SPECIAL)


@st.composite
def cut_bytes(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> list[bytes]:
    data = draw(whole)
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    ends = [0, *cuts, len(data)]
    return [data[begin:end] for begin, end in pairwise(ends)]


def parts(pieces: list[bytes]) -> list[str]:
    detokenizer = Detokenizer(table_of(pieces))
    return [detokenizer.push(NUM_SPECIAL + i) for i in range(len(pieces))] + [detokenizer.flush()]


@given(cut_bytes(st.text(st.characters(exclude_categories=["Cs"])).map(str.encode)))
def test_detokenizer_gives_any_cut_text_back(pieces: list[bytes]) -> None:
    shown = parts(pieces)
    assert "".join(shown) == b"".join(pieces).decode()
    assert shown[-1] == ""


@given(cut_bytes(st.binary(max_size=24)))
def test_detokenizer_decodes_any_cut_bytes_like_the_whole(pieces: list[bytes]) -> None:
    assert "".join(parts(pieces)) == b"".join(pieces).decode("utf-8", errors="replace")


def test_detokenizer_holds_back_a_cut_character() -> None:
    euro = "\u20ac".encode()
    assert parts([b"a" + euro[:1], euro[1:2], euro[2:] + b"b"]) == ["a", "", "\u20acb", ""]


def test_detokenizer_shows_a_lost_end_only_at_the_end() -> None:
    assert parts([b"a\xe2", b"\x82"]) == ["a", "", "\ufffd"]


def test_detokenizer_starts_afresh_after_flush() -> None:
    detokenizer = Detokenizer(table_of([b"\xe2", b"b"]))
    detokenizer.push(2)
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.push(3) == "b"


def test_table_gives_control_tokens_a_name_and_no_text() -> None:
    table = table_of([b"a"])
    assert (table.name(1), table.text(1)) == (b"</s>", b"")
    assert (table.name(2), table.text(2)) == (b"a", b"a")
    assert table.decode([0, 2, 1]) == "<s>a</s>"


def test_table_gives_nothing_for_padding_ids() -> None:
    table = table_of([b"a"])
    assert table.text(3) == table.name(3) == b""
    assert not table.is_special(3)
