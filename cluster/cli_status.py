"""`ostro status`: the actors of a running cluster, its load, and how hot its experts are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich import box
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ostro.actors.errors import OstroError
from ostro.cluster.cli_connection import DEFAULT_URL, Url, asked_tls, open_client
from ostro.cluster.cli_console import make_console, plain_errors
from ostro.cluster.cli_loading import STATE_STYLES
from ostro.cluster.cli_tls import Ca, Cert, Key, certificate_end, read_tls
from ostro.cluster.client_channel import Tls
from ostro.cluster.human_numbers import days_left, format_bytes
from ostro.protos import cluster_pb2

_SOON = timedelta(days=14)
_BAR_WIDTH = 16
_WIDE = 112  # columns that the table takes with its bars; without them it fits into 80
_ID_CHARS = 8
_BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"  # an eighth to a full block
_NO_ROWS = "\u00b7"  # a middle dot
_HEAT = ("blue", "blue", "cyan", "cyan", "green", "yellow", "dark_orange", "red")


@plain_errors()
def status(
    url: Url = DEFAULT_URL,
    as_json: Annotated[bool, typer.Option("--json", help="For machines: one JSON object.")] = False,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
) -> None:
    """Show a running cluster: actors, load, experts.

    Exit code 0 if something answers, ready or not; 1 if nothing does.
    """
    picture = _look(url, read_tls(ca, cert, key))
    console = make_console()
    if as_json:
        console.print_json(data=picture.to_dict(), indent=2)
        return
    console.print(_headline(picture))
    if (warning := _certificate_warning(picture.certificate_end)) is not None:
        console.print(warning)
    console.print(_actor_table(picture.cluster, has_bars=console.width >= _WIDE))
    for line in load_lines(picture.cluster.load):
        console.print(line)
    _print_experts(picture.tokens, console)


@dataclass(frozen=True, slots=True)
class Picture:
    """One look at a cluster.

    Attributes:
        tokens: Tokens by shard and expert over all layers; a token that several copies may have
            served counts for each of them in equal parts.
        certificate_end: When the server's certificate expires, in UTC; None without TLS.
    """

    model: cluster_pb2.GetModelResponse
    cluster: cluster_pb2.Cluster
    tokens: dict[str, dict[int, float]]
    certificate_end: datetime | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, named as in the protos; 64-bit numbers are texts, as JSON of protos is."""
        return {
            "model": _plain(self.model),
            "cluster": _plain(self.cluster),
            "expert_tokens": self.tokens,
            "certificate_expires": self.certificate_end and self.certificate_end.isoformat(),
        }


def sum_by_shard(
    placements: Sequence[cluster_pb2.ExpertPlacement],
) -> dict[str, dict[int, float]]:
    """Tokens by shard and expert, over all layers."""
    tokens: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for placement in placements:
        for actor_id in placement.actor_ids:
            share = placement.tokens / len(placement.actor_ids)
            tokens[actor_id][placement.expert] += share
    return {actor_id: dict(experts) for actor_id, experts in sorted(tokens.items())}


def heat_strip(values: Sequence[float], highest: float, width: int) -> Text:
    """One block a value, taller and hotter with its share of `highest`; a dot for 0.

    Where there are more values than `width`, neighbours share a block, which shows the highest.
    """
    per_block = -(-len(values) // max(width, 1))
    strip = Text()
    for start in range(0, len(values), per_block):
        value = max(values[start : start + per_block])
        if value <= 0 or highest <= 0:
            strip.append(_NO_ROWS, "dim")
            continue
        level = min(int(value / highest * len(_BLOCKS)), len(_BLOCKS) - 1)
        strip.append(_BLOCKS[level], _HEAT[level])
    return strip


def _look(url: str, tls: Tls | None) -> Picture:
    with open_client(url, tls) as client:
        model, cluster = client.model(), client.cluster()
        try:
            placements: Sequence[cluster_pb2.ExpertPlacement] = client.experts().placements
        except OstroError:
            placements = ()  # the rest of the picture stands without them
    end = certificate_end(url, asked_tls(url, tls))
    return Picture(model, cluster, sum_by_shard(placements), end)


def _plain(message: Message) -> dict[str, Any]:
    return MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def _headline(picture: Picture) -> Text:
    model, cluster = picture.model, picture.cluster
    ready = ("ready", "bold green") if cluster.ready else ("not ready", "bold yellow")
    return Text.assemble(
        (model.id, "bold"),
        "  ",
        ready,
        f"  epoch {cluster.epoch}  ",
        (
            f"{model.layers} layers, {model.experts_per_token} of {model.experts} experts per "
            f"token, {model.max_context} tokens of context, {model.weight_dtype}",
            "dim",
        ),
    )


def _certificate_warning(end: datetime | None) -> Text | None:
    """What to do about a certificate whose end is near."""
    if end is None or (left := end - datetime.now(UTC)) >= _SOON:
        return None
    text = f"the certificate expires {days_left(left)}, on {end:%Y-%m-%d %H:%M} UTC: renew it"
    return Text.assemble(("TLS      ", "bold"), (text, "bold yellow"))


def _actor_table(cluster: cluster_pb2.Cluster, *, has_bars: bool) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=has_bars,
        pad_edge=False,
        padding=(0, 1) if has_bars else (0, 0),
        header_style="bold",
    )
    table.add_column("actor", no_wrap=True)
    table.add_column("role", no_wrap=True)
    table.add_column("rank", justify="right", no_wrap=True)
    for title in ("state", "node", "device"):
        table.add_column(title, no_wrap=True)
    if has_bars:
        table.add_column("", min_width=_BAR_WIDTH)
    table.add_column("memory", justify="right", no_wrap=True)
    for actor in sorted(cluster.actors, key=lambda actor: (actor.role, actor.rank, actor.id)):
        has_rank = actor.role in (cluster_pb2.ACTOR_ROLE_ATTENTION, cluster_pb2.ACTOR_ROLE_EXPERT)
        table.add_row(
            actor.id,
            _word(cluster_pb2.ActorRole.Name(actor.role), "ACTOR_ROLE_"),
            str(actor.rank) if has_rank else "",
            _state(actor),
            actor.node_id[:_ID_CHARS],
            actor.device or "cpu",
            *([_memory_bar(actor)] if has_bars else []),
            _memory_text(actor),
        )
    return table


def _state(actor: cluster_pb2.Actor) -> Text:
    word = _word(cluster_pb2.ActorState.Name(actor.state), "ACTOR_STATE_")
    percent = f" {actor.load_progress:.0%}" if word == "loading" else ""
    return Text(word + percent, STATE_STYLES.get(word, ""))


def _word(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).lower()


def _memory_bar(actor: cluster_pb2.Actor) -> ProgressBar | str:
    total = actor.memory_total_bytes
    if not total:
        return ""
    share = actor.memory_used_bytes / total
    style = "red" if share > 0.95 else "cyan"
    return ProgressBar(
        total=1.0, completed=share, width=_BAR_WIDTH, complete_style=style, finished_style=style
    )


def _memory_text(actor: cluster_pb2.Actor) -> str:
    if not actor.memory_total_bytes:
        return ""
    used, total = actor.memory_used_bytes, actor.memory_total_bytes
    return f"{format_bytes(used)} of {format_bytes(total)}"


def load_lines(load: cluster_pb2.Load) -> list[Text]:
    """How busy a cluster is, in words; and how its drafts do, if it has any."""
    parts = [
        f"{load.running} running, {load.waiting} waiting",
        f"KV pages {load.kv_usage:.0%} used",
        f"prefix hits {load.prefix_hit_rate:.0%}",
        f"{load.tokens_per_second:.1f} tokens/s",
    ]
    if load.expert_imbalance:
        parts.append(f"expert imbalance {load.expert_imbalance:.2f}")
    lines = [Text.assemble(("load     ", "bold"), "   ".join(parts))]
    if load.HasField("draft_acceptance"):
        drafts = f"{load.draft_acceptance:.0%} right, {load.tokens_per_step:.2f} tokens a step"
        lines.append(Text.assemble(("drafts   ", "bold"), drafts))
    return lines


def _print_experts(tokens: dict[str, dict[int, float]], console: Console) -> None:
    if not tokens:
        return
    highest = max(max(experts.values(), default=0.0) for experts in tokens.values())
    console.print(
        Text.assemble(
            ("experts  ", "bold"), ("one block an expert, by tokens over all layers", "dim")
        )
    )
    label_width = max(len(actor_id) for actor_id in tokens)
    total = sum(sum(experts.values()) for experts in tokens.values())
    for actor_id, experts in tokens.items():
        share = sum(experts.values()) / total if total else 0.0
        values = [experts[expert] for expert in sorted(experts)]
        width = console.width - label_width - 14
        strip = heat_strip(values, highest, width)
        console.print(
            Text.assemble(f"  {actor_id:<{label_width}}  ", strip, f"  {share:.0%}"),
            soft_wrap=True,
        )
