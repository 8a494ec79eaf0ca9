"""The key file: whole or refused, edited by one at a time, published when it changes."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import stat
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from wait_for import wait_for

from ostro.actors.errors import NotReadyError
from ostro.cluster import key_file, key_watch
from ostro.cluster.key_file import check_access, edited_keys, make_key, read_keys, write_keys
from ostro.cluster.key_watch import key_publishing, published_keys
from ostro.configs.errors import ConfigError
from ostro.configs.key_table import Key, KeyTable, Quota, Scope
from ostro.configs.load import load_deployment
from ostro.configs.security import SecurityConfig

WAIT_S = 20
DIGESTS = ["a" * 64, "b" * 64]


def key(digest: str = DIGESTS[0], **fields) -> Key:
    return Key(sha256=digest, **{"tenant": "acme", "scopes": (Scope.GENERATE,), **fields})


TABLE = KeyTable(keys=(key(note="the first"),), quotas={"acme": Quota(requests_per_minute=60)})


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "keys.yaml"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def entry(**fields) -> str:
    fields = {"tenant": "acme", "sha256": DIGESTS[0], "scopes": ["generate"], **fields}
    return json.dumps({"keys": [fields]})


# ---- keys and files


def test_keys_are_random_and_recognisable():
    keys = {make_key()[0] for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("ostro-") and len(key) == 49 for key in keys)


@pytest.mark.parametrize("name", ["keys.yaml", "keys.json"])
def test_what_is_written_is_read_again(tmp_path, name):
    path = tmp_path / name
    write_keys(path, TABLE)
    assert read_keys(path) == TABLE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (path.suffix == ".json") is path.read_text().startswith("{")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("keys: [", "cannot be read as YAML"),
        ("- a", "must hold a mapping"),
        ("kees: []", r"unknown field `kees`"),
        (entry(tenant="a/b"), r"\$\.keys\[0\]\.tenant"),
        (entry(tenant="a\n"), r"\$\.keys\[0\]\.tenant"),
        (entry(sha256="secret"), r"\$\.keys\[0\]\.sha256"),
        (entry(scopes=[]), r"\$\.keys\[0\]\.scopes"),
        (entry(scopes=["everything"]), r"'everything'.*\$\.keys\[0\]\.scopes"),
        (entry(expires="2027-01-01T00:00:00"), r"timezone.*\$\.keys\[0\]\.expires"),
        (entry(expires="soon"), r"\$\.keys\[0\]\.expires"),
        ('{"keys": [], "quotas": {"acme": {}}}', "quotas of acme: no key has this tenant"),
        (
            json.dumps({"keys": [json.loads(entry())["keys"][0]] * 2}),
            f"key {DIGESTS[0][:12]} stands 2 times",
        ),
        (
            '{"quotas": {"acme": {"requests_per_minute": 0}}, "keys": ' + entry()[9:],
            r"\$\.quotas\[\.\.\.\]\.requests_per_minute",
        ),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_the_place(path, text, told):
    with pytest.raises(ConfigError, match=told) as caught:
        read_keys(write(path, text))
    assert str(path) in str(caught.value)


def test_a_key_in_the_place_of_a_key_file_is_not_told(path):
    path.write_text("ostro-a-secret")
    with pytest.raises(ConfigError, match=r"must hold a mapping, not str$"):
        read_keys(path)


def test_a_file_that_anybody_may_write_is_refused(path):
    write(path, entry()).chmod(0o666)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_keys(path)


def test_a_pipe_is_refused_and_not_waited_for(path):
    os.mkfifo(path, 0o600)
    with pytest.raises(ConfigError, match="is no regular file"):
        read_keys(path)


def test_a_file_that_is_not_there_names_the_way_to_make_one(path):
    with pytest.raises(ConfigError, match=r"ostro keys add --file .*keys\.yaml TENANT"):
        read_keys(path)


def test_a_file_of_any_size_is_not_read(path):
    with pytest.raises(ConfigError, match="at most"):
        read_keys(write(path, "#" * (5 * 2**20)))


def test_a_link_stays_a_link(tmp_path, path):
    target = tmp_path / "elsewhere.yaml"
    path.symlink_to(target)
    write_keys(path, TABLE)
    assert path.is_symlink()
    assert read_keys(target) == TABLE


def test_an_edit_that_fails_leaves_the_file_and_nothing_else(path):
    write_keys(path, TABLE)
    with contextlib.suppress(ZeroDivisionError), edited_keys(path):
        raise ZeroDivisionError
    assert read_keys(path) == TABLE
    assert {file.name for file in path.parent.iterdir()} == {path.name, f".{path.name}.lock"}


def test_editors_take_turns(path):
    def add(number: int) -> None:
        with edited_keys(path) as tables:
            tables[0] = KeyTable(keys=(*tables[0].keys, key(f"{number:064x}"[::-1])))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_keys(path).keys) == 8


def test_editors_take_turns_by_whatever_link_they_come(path, monkeypatch):
    monkeypatch.setattr(key_file, "_LOCK_TIMEOUT_S", 0.0)
    write_keys(path, TABLE)
    link = path.with_name("link.yaml")
    link.symlink_to(path)
    with (
        edited_keys(path),
        pytest.raises(ConfigError, match="somebody else is editing it"),
        edited_keys(link),
    ):
        pass


def test_an_editor_that_does_not_end_is_not_waited_for(path, monkeypatch):
    monkeypatch.setattr(key_file, "_LOCK_TIMEOUT_S", 0.1)
    with edited_keys(path), pytest.raises(ConfigError, match="somebody else is editing"):
        edited_keys(path).__enter__()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["serving.host=0.0.0.0"], r"serving\.host=0\.0\.0\.0.*security\.allow_open=true"),
        (["security.key_file=/nowhere/keys.yaml"], "no key file there"),
        (["serving.host=0.0.0.0", "security.allow_open=true"], None),
        (
            [
                "serving.host=0.0.0.0",
                "serving.tls={cert_file: a, key_file: b, client_ca_file: c}",
            ],
            None,
        ),
        ([], None),
    ],
)
def test_check_access(settings, told):
    deployment = load_deployment("laptop", settings)
    with pytest.raises(ConfigError, match=told) if told else contextlib.nullcontext():
        check_access(deployment)


# ---- publishing


@contextlib.contextmanager
def publishing(path: Path):
    """The tables that are published, the first one taken."""
    published: queue.Queue[KeyTable] = queue.Queue()
    with published_keys(path, published.put, poll_s=0.01):
        published.get(timeout=WAIT_S)
        yield published


def test_a_change_is_published(path):
    write_keys(path, TABLE)
    with publishing(path) as published:
        for digest in DIGESTS:
            changed = KeyTable(keys=(key(digest),))
            write_keys(path, changed)
            assert published.get(timeout=WAIT_S) == changed
        assert published.empty()


def test_a_file_that_breaks_leaves_the_keys_until_it_is_whole_again(path, caplog):
    write_keys(path, TABLE)
    with publishing(path) as published:
        write(path, "keys: [")
        wait_for(lambda: "the keys stay as they were" in caplog.text)
        path.unlink()
        wait_for(lambda: "no key file there" in caplog.text)
        assert published.empty()
        write_keys(path, TABLE)
        assert published.get(timeout=WAIT_S) == TABLE
    assert caplog.text.count("the keys stay as they were") == 2  # once for each state


def test_a_file_that_is_refused_is_taken_once_nobody_else_may_write_it(path, caplog):
    write_keys(path, TABLE)
    changed = KeyTable(keys=(key(DIGESTS[1]),))
    other = path.with_name("other.yaml")
    write_keys(other, changed)
    other.chmod(0o666)
    with publishing(path) as published:
        other.replace(path)
        wait_for(lambda: "anybody may write it" in caplog.text)
        path.chmod(0o600)
        assert published.get(timeout=WAIT_S) == changed


def test_a_slip_in_a_date_ends_no_watch(path, caplog):
    write_keys(path, TABLE)
    with publishing(path) as published:
        write(path, entry().replace('"acme"', '"acme", "expires": 2027-13-01'))
        wait_for(lambda: "'2027-13-01' is no timestamp" in caplog.text)
        write_keys(path, TABLE)
        assert published.get(timeout=WAIT_S) == TABLE


def test_a_publication_that_fails_is_tried_again(path, caplog):
    write_keys(path, TABLE)
    published: queue.Queue[KeyTable] = queue.Queue()
    failures = iter([None, NotReadyError("busy"), NotReadyError("busy"), None])

    def publish(table: KeyTable) -> None:
        failure = next(failures)
        if failure is not None:
            raise failure
        published.put(table)

    with published_keys(path, publish, poll_s=0.01):
        published.get(timeout=WAIT_S)
        write_keys(path, KeyTable(keys=(key(DIGESTS[1]),)))
        assert published.get(timeout=WAIT_S).keys[0].sha256 == DIGESTS[1]
    assert caplog.text.count("could not be published: busy") == 2


def test_a_file_is_not_read_while_it_is_being_written(path, monkeypatch):
    write_keys(path, TABLE)
    with publishing(path) as published:
        for size in range(40):  # valid at every moment, and never the same twice in a row
            write(path, entry() + "\n" * size)
            os.utime(path, ns=(size, size))
        assert published.get(timeout=WAIT_S).keys == (key(),)


def test_the_keys_in_force_are_published_again_on_demand(path):
    write_keys(path, TABLE)
    published: queue.Queue[KeyTable] = queue.Queue()
    with published_keys(path, published.put, poll_s=0.01) as publish_again:
        assert published.get(timeout=WAIT_S) == TABLE
        write(path, "keys: [")  # in force is what was whole
        publish_again()
        assert published.get(timeout=WAIT_S) == TABLE


def test_the_first_keys_wait_for_the_routers_process(path, monkeypatch):
    write_keys(path, TABLE)
    waited_s: list[float] = []
    monkeypatch.setattr(key_watch.ray, "get", lambda _, timeout: waited_s.append(timeout))
    router = SimpleNamespace(set_keys=SimpleNamespace(remote=lambda _: None))
    security = SecurityConfig(key_file=str(path))
    with key_publishing(security, router, start_timeout_s=600) as publish_again:
        publish_again()
    assert waited_s == [600, 30]
