"""`ostro keys` as a user runs it."""

from __future__ import annotations

from hashlib import sha256

import pytest
import typer
from typer.testing import CliRunner

from ostro.actors.errors import UnauthenticatedError
from ostro.cluster.cli import app
from ostro.cluster.cli_console import plain_errors
from ostro.cluster.key_file import read_keys
from ostro.configs.key_table import Quota, Scope


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "keys.yaml"

    def run(*arguments: str, fails: int = 0):
        result = CliRunner().invoke(app, ["keys", *arguments, "--file", str(path)])
        assert result.exit_code == fails, result.output
        return result

    run.table = lambda: read_keys(path)
    run.path = path
    return run


def test_a_key_is_shown_once_and_only_its_hash_is_kept(run):
    shown = run("add", "acme", "--note", "laptop")
    key = shown.stdout.strip()
    (entry,) = run.table().keys
    assert entry.sha256 == sha256(key.encode()).hexdigest()
    assert (entry.tenant, entry.note) == ("acme", "laptop")
    assert entry.scopes == (Scope.GENERATE, Scope.CONTROL)
    assert entry.key_id in shown.stderr
    assert key not in run.path.read_text()
    assert key not in run("list").stdout


@pytest.mark.parametrize(
    ("when", "told"),
    [("2027-06-30", "2027-06-30 00:00"), ("2027-06-30T12:00+02:00", "2027-06-30 12:00")],
)
def test_a_key_may_expire(run, when, told):
    run("add", "acme", "--expires", when)
    assert told in run("list").stdout


def test_days_count_from_now(run):
    run("add", "acme", "--expires", "1d")
    run("add", "acme", "--expires", "2020-01-01")
    later, over = run.table().keys
    assert later.expires > over.expires
    assert run("list").stdout.count("(over)") == 1


def test_a_note_is_shown_as_it_was_written(run):
    run("add", "acme", "--note", "[bold]of[/red] x")
    assert "[bold]of[/red] x" in run("list").stdout


def test_scopes_are_as_asked(run):
    run("add", "ops", "--scope", "observe", "--scope", "admin", "--scope", "observe")
    assert run.table().keys[0].scopes == (Scope.OBSERVE, Scope.ADMIN)


def test_a_key_is_removed_by_its_id_and_quotas_with_the_last_one(run):
    run("add", "acme")
    run("add", "acme")
    run("limit", "acme", "--requests-per-minute", "60", "--max-tokens-per-request", "100")
    quota = Quota(requests_per_minute=60, max_tokens_per_request=100)
    assert run.table().quotas == {"acme": quota}
    assert "acme: requests_per_minute 60, max_tokens_per_request 100" in run("list").stdout
    first, second = (key.key_id for key in run.table().keys)
    run("remove", first)
    assert [key.key_id for key in run.table().keys] == [second]
    assert run.table().quotas == {"acme": quota}
    run("remove", second)
    assert run.table().keys == ()
    assert run.table().quotas == {}


def test_a_limit_without_a_number_lifts_the_quotas(run):
    run("add", "acme")
    run("limit", "acme", "--concurrent-requests", "2")
    assert "acme: not limited" in run("limit", "acme").stderr
    assert run.table().quotas == {}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["add", "a/b"], "TENANT a/b: takes up to 64 letters"),
        (["add", "acme", "--expires", "soon"], "must read as 90d"),
        (["remove", "0123456789ab"], "no key 0123456789ab"),
        (["limit", "nobody", "--requests-per-minute", "1"], "no key has the tenant nobody"),
        (["list"], "no key file there"),
    ],
)
def test_what_cannot_be_done_is_told(run, arguments, told):
    assert told in run(*arguments, fails=2).stderr


def test_a_command_without_a_good_key_says_where_it_takes_one_from(capsys):
    with pytest.raises(typer.Exit), plain_errors():
        raise UnauthenticatedError("no API key")
    assert "no API key; commands show the key in OSTRO_API_KEY" in capsys.readouterr().err
