"""`ostro keys`: who may call a deployment. A running one takes changes over within seconds."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich import box
from rich.table import Table
from rich.text import Text

from ostro.cluster.cli_console import make_console, plain_errors
from ostro.cluster.key_file import edited_keys, make_key, read_keys
from ostro.configs.errors import ConfigError
from ostro.configs.key_table import TENANT_PATTERN, Key, KeyTable, Quota, Scope

_DAYS = re.compile(r"([1-9][0-9]{0,4})d")
_DEFAULT_SCOPES = (Scope.GENERATE, Scope.CONTROL)

app = typer.Typer(
    name="keys",
    help="Make, list and remove the API keys of a deployment, and limit what tenants may use.",
    no_args_is_help=True,
)
File = Annotated[
    Path, typer.Option("--file", metavar="FILE", help="The deployment's security.key_file.")
]
Tenant = Annotated[str, typer.Argument(metavar="TENANT", help="Whose key it is.")]
_DEFAULT_FILE = Path("keys.yaml")


@app.command()
@plain_errors()
def add(
    tenant: Tenant,
    file: File = _DEFAULT_FILE,
    scope: Annotated[
        list[Scope] | None,
        typer.Option(help="What it is good for; repeatable.", show_default="generate, control"),
    ] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="WHEN", help="As 90d, 2027-06-30 or 2027-06-30T12:00Z.")
    ] = None,
    note: Annotated[str, typer.Option(help="For people.")] = "",
) -> None:
    """Make a key and write it to stdout, this one time; the file keeps its hash.

    For example:

    ostro keys add acme --expires 90d
    OSTRO_API_KEY=$(ostro keys add ops --scope observe --scope admin) ostro status
    """
    key, digest = make_key()
    if re.fullmatch(TENANT_PATTERN, tenant) is None:
        raise ConfigError(
            f"TENANT {tenant}: takes up to 64 letters, digits, dots, dashes and underscores, and "
            f"begins with a letter or a digit"
        )
    entry = Key(
        tenant=tenant,
        sha256=digest,
        scopes=tuple(dict.fromkeys(scope or _DEFAULT_SCOPES)),
        expires=None if expires is None else _moment(expires),
        note=note,
    )
    with edited_keys(file) as tables:
        table = tables[0]
        tables[0] = KeyTable(keys=(*table.keys, entry), quotas=table.quotas)
    make_console(stderr=True).print(
        f"key {entry.key_id} of {tenant} for {', '.join(entry.scopes)}; "
        f"it is not kept and will not be shown again",
        markup=False,
    )
    typer.echo(key)


@app.command("list")
@plain_errors()
def list_keys(file: File = _DEFAULT_FILE) -> None:
    """Show the keys by their ids, as the audit log names them, and the tenants' quotas."""
    table = read_keys(file)
    console = make_console()
    keys = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for title in ("key", "tenant", "scopes", "expires", "note"):
        keys.add_column(title, no_wrap=title != "note")
    for key in table.keys:
        # A note is no markup.
        keys.add_row(key.key_id, key.tenant, ", ".join(key.scopes), _expiry(key), Text(key.note))
    console.print(keys)
    for tenant, quota in table.quotas.items():
        console.print(f"{tenant}: {_limits(quota)}", markup=False)


@app.command()
@plain_errors()
def remove(
    key_id: Annotated[str, typer.Argument(metavar="KEY", help="Its id, as `list` shows it.")],
    file: File = _DEFAULT_FILE,
) -> None:
    """Remove a key. What it has running goes on; a tenant's quotas go with its last key."""
    with edited_keys(file) as tables:
        table = tables[0]
        kept = tuple(key for key in table.keys if key.key_id != key_id)
        if len(kept) == len(table.keys):
            raise ConfigError(f"{file}: no key {key_id}; `ostro keys list` shows those there are")
        left = {key.tenant for key in kept}
        quotas = {tenant: quota for tenant, quota in table.quotas.items() if tenant in left}
        tables[0] = KeyTable(keys=kept, quotas=quotas)
    make_console(stderr=True).print(f"key {key_id} is removed")


@app.command()
@plain_errors()
def limit(
    tenant: Tenant,
    file: File = _DEFAULT_FILE,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Of every kind; a minute's worth at once.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Prompts and completions.")
    ] = None,
    concurrent_requests: Annotated[
        int | None, typer.Option(min=1, help="Generations under way.")
    ] = None,
    max_tokens_per_request: Annotated[
        int | None, typer.Option(min=1, help="Thinking and answer together.")
    ] = None,
) -> None:
    """Set what a tenant may use, all of its keys together; what is not named is not limited."""
    quota = Quota(
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        concurrent_requests=concurrent_requests,
        max_tokens_per_request=max_tokens_per_request,
    )
    with edited_keys(file) as tables:
        table = tables[0]
        if tenant not in {key.tenant for key in table.keys}:
            raise ConfigError(f"{file}: no key has the tenant {tenant}; make one first")
        quotas = {name: other for name, other in table.quotas.items() if name != tenant}
        if quota != Quota():
            quotas[tenant] = quota
        tables[0] = KeyTable(keys=table.keys, quotas=quotas)
    make_console(stderr=True).print(f"{tenant}: {_limits(quota)}", markup=False)


def _limits(quota: Quota) -> str:
    limits = msgspec.to_builtins(quota)  # those that are set
    return ", ".join(f"{name} {limit}" for name, limit in limits.items()) or "not limited"


def _moment(text: str) -> datetime:
    """A point in time: so many days from now, or a date, by itself its first moment in UTC."""
    days = _DAYS.fullmatch(text)
    if days is not None:
        return datetime.now(UTC).replace(microsecond=0) + timedelta(days=int(days[1]))
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            f"--expires {text}: must read as 90d, 2027-06-30 or 2027-06-30T12:00Z"
        ) from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _expiry(key: Key) -> str:
    if key.expires is None:
        return "never"
    is_over = key.expires <= datetime.now(UTC)
    return f"{key.expires:%Y-%m-%d %H:%M %Z}{' (over)' if is_over else ''}"
