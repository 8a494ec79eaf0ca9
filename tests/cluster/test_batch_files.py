"""The files of a batch: what is read, what is written, and how a run takes up another one's."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from ostro.cluster import batch_lines
from ostro.cluster.batch_lines import BatchLine, LineFault, read_batch
from ostro.cluster.batch_output import BatchIndex, Record, Response, open_output
from ostro.configs.errors import ConfigError

CHAT = "/v1/chat/completions"


def line(custom_id: object = "a", url: str = CHAT, body: object = None, **more) -> bytes:
    fields = {"custom_id": custom_id, "method": "POST", "url": url, "body": body or {"x": 1}}
    return json.dumps(fields | more).encode() + b"\n"


def read(tmp_path: Path, *data: bytes, effort: str | None = None) -> list[BatchLine | LineFault]:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(data))
    return list(read_batch(path, effort))


# ---- what is asked


def test_lines_are_read_one_by_one_with_their_places(tmp_path):
    first, second = line("a"), line("b", "/v1/completions")
    lines = read(tmp_path, first, b"\n", second.strip())
    assert [(item.number, item.custom_id) for item in lines] == [(1, "a"), (3, "b")]
    assert [item.end for item in lines] == [len(first), len(first) + len(second)]
    assert isinstance(lines[0], BatchLine)
    assert lines[0].body == {"x": 1}


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    assert isinstance(read(tmp_path, b"\xef\xbb\xbf" + line())[0], BatchLine)


@pytest.mark.parametrize(
    ("data", "code", "custom_id", "why"),
    [
        (b"{nonsense\n", "invalid_json", None, "malformed"),
        (b'{"custom_id": "\xff"}\n', "invalid_json", None, "utf-8"),
        (b"[1]\n", "invalid_line", None, "object"),
        (line(7), "invalid_line", None, "custom_id"),
        (line(""), "invalid_line", "", "custom_id is empty"),
        (line(body="text"), "invalid_line", "a", "body"),
        (b'{"custom_id": "a", "body": {}}\n', "invalid_line", "a", "url"),
        (line(url="/v1/embeddings"), "unknown_url", "a", "/v1/messages"),
        (line(method="GET"), "unsupported_value", "a", "method"),
        (line(body={"stream": True}), "unsupported_value", "a", "stream"),
        (line().replace(b'"x": 1', b'"x": 1e400'), "invalid_line", "a", "out of range"),
        (b"[" * 100_000 + b"\n", "invalid_line", None, "object"),
        (line()[:-2] + b', "more": ' + b"[" * 100_000 + b"\n", "invalid_json", None, "recursion"),
    ],
)
def test_a_line_that_cannot_be_asked_is_named(tmp_path, data, code, custom_id, why):
    fault, after = read(tmp_path, data, line("next"))
    assert isinstance(fault, LineFault)
    assert (fault.code, fault.custom_id, fault.number) == (code, custom_id, 1)
    assert fault.message.startswith("line 1: ")
    assert why in fault.message
    assert after.custom_id == "next"


def test_a_line_without_an_end_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_lines, "_MAX_LINE_BYTES", 100)
    long, short = line("x" * 1000), line("b", body={})
    fault, after = read(tmp_path, long, short)
    assert isinstance(fault, LineFault)
    assert (fault.code, fault.end) == ("line_too_long", len(long))
    assert after.custom_id == "b"


@pytest.mark.parametrize(
    ("url", "body", "asked"),
    [
        (CHAT, {"n": 1}, {"n": 1, "reasoning_effort": "high"}),
        (CHAT, {"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ("/v1/responses", {"n": 1}, {"n": 1, "reasoning": {"effort": "high"}}),
        ("/v1/responses", {"reasoning": "x"}, {"reasoning": "x"}),
        ("/v1/messages", {"n": 1}, {"n": 1, "output_config": {"effort": "high"}}),
        ("/v1/completions", {"n": 1}, {"n": 1}),
    ],
)
def test_the_effort_goes_where_the_dialect_has_it(tmp_path, url, body, asked):
    (item,) = read(tmp_path, line(url=url, body=body), effort="high")
    assert isinstance(item, BatchLine)
    assert item.body == asked


# ---- what was written


def answered(custom_id: str, status: int = 200) -> bytes:
    response = {"status_code": status, "request_id": "r", "body": {"a": 1}}
    record = {"id": "batch_req_1", "custom_id": custom_id, "response": response, "error": None}
    return json.dumps(record).encode() + b"\n"


def faulty(number: int, custom_id: str | None) -> bytes:
    error = {"code": "invalid_line", "message": "...", "line": number}
    record = {"id": "batch_req_2", "custom_id": custom_id, "response": None, "error": error}
    return json.dumps(record).encode() + b"\n"


def asked(number: int, custom_id: str) -> BatchLine:
    return BatchLine(number=number, end=number, custom_id=custom_id, url=CHAT, body={})


def left_to_do(path: Path, *lines: BatchLine | LineFault, **options) -> list[str]:
    with (
        closing(BatchIndex()) as index,
        open_output(path, index, goes_on=True, **options),
    ):
        found = [index.to_do(item) for item in lines]
    return [
        f"{item.number} {item.code}" if isinstance(item, LineFault) else item.custom_id
        for item in found
        if item is not None
    ]


def test_what_is_written_is_not_asked_again(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(answered("a") + answered("b", 400))
    lines = (asked(1, "a"), asked(2, "b"), asked(3, "c"))
    assert left_to_do(path, *lines) == ["c"]
    assert left_to_do(path, *lines, drops_failed=True) == ["b", "c"]
    assert path.read_bytes() == answered("a")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_file_without_its_failures_stays_a_link_and_as_private_as_it_was(tmp_path):
    path, link = tmp_path / "out.jsonl", tmp_path / "link"
    path.write_bytes(answered("a") + answered("b", 400))
    path.chmod(0o600)
    link.symlink_to(path)
    assert left_to_do(link, asked(1, "a"), asked(2, "b"), drops_failed=True) == ["b"]
    assert path.read_bytes() == answered("a")
    assert path.stat().st_mode & 0o777 == 0o600
    assert link.is_symlink()


def test_a_torn_last_line_is_cut_off_and_asked_again(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(answered("a") + answered("b")[:-9])
    assert left_to_do(path, asked(1, "a"), asked(2, "b")) == ["b"]
    assert path.read_bytes() == answered("a")


def test_a_second_line_with_an_id_is_a_fault_told_once(tmp_path):
    path = tmp_path / "out.jsonl"
    lines = (asked(1, "a"), asked(2, "a"), asked(3, "b"))
    assert left_to_do(path, *lines) == ["a", "2 duplicate_custom_id", "b"]
    # The first was running when the run ended; its double had been told.
    path.write_bytes(faulty(2, "a"))
    assert left_to_do(path, *lines) == ["a", "b"]
    path.write_bytes(answered("a"))
    assert left_to_do(path, *lines) == ["2 duplicate_custom_id", "b"]


def test_a_faulty_line_that_was_mended_is_asked(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(faulty(1, None))
    fault = LineFault(number=1, end=9, custom_id=None, code="invalid_json", message="")
    assert left_to_do(path, fault) == []
    assert left_to_do(path, asked(1, "a")) == ["a"]


def test_a_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(answered("a") + b"my diary\n")
    for drops_failed in (False, True):
        with pytest.raises(ConfigError, match=r"out\.jsonl: line 2 is none that run-batch wrote"):
            left_to_do(path, drops_failed=drops_failed)
    assert path.read_bytes() == answered("a") + b"my diary\n"


def test_two_runs_do_not_write_to_one_file(tmp_path):
    path = tmp_path / "out.jsonl"
    with closing(BatchIndex()) as index, open_output(path, index, goes_on=True):
        with pytest.raises(ConfigError, match="another run writes to it"):
            left_to_do(path)
        with pytest.raises(ConfigError, match="another run writes to it"):
            left_to_do(path, drops_failed=True)


def test_beginning_anew_empties_the_file(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"anything")
    with closing(BatchIndex()) as index, open_output(path, index, goes_on=False):
        assert path.read_bytes() == b""


def test_an_output_that_cannot_be_opened_is_named(tmp_path):
    path = tmp_path / "no" / "out.jsonl"
    with pytest.raises(ConfigError, match="No such file"):
        left_to_do(path)


def test_the_index_counts_what_had_failed(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(answered("a") + answered("b", 400) + faulty(3, None))
    with closing(BatchIndex()) as index, open_output(path, index, goes_on=True):
        assert index.num_failed == 2


@pytest.mark.parametrize(
    ("record", "has_failed"),
    [
        (Record(custom_id="a", response=Response(200, None)), False),
        (Record(custom_id="a", response=Response(400, None)), True),
        (Record(custom_id="a", error={"code": "timeout"}), True),
        (Record(custom_id="a", response=Response(200, None), error={"code": "x"}), True),
    ],
)
def test_a_record_without_an_answer_has_failed(record, has_failed):
    assert record.has_failed is has_failed
