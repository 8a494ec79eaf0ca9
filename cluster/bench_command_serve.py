"""`ostro bench serve`: its options, its checks and its tables."""

from __future__ import annotations

import asyncio
import json as json_module
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ostro.cluster.bench_figures import to_table, write_json
from ostro.cluster.bench_load import ClosedLoop, Load, OpenLoop, PromptShape
from ostro.cluster.bench_options import Json, Rounds, parse_counts, parse_range, parse_rates
from ostro.cluster.bench_progress import shown_progress
from ostro.cluster.bench_serve import (
    LoadPlan,
    Runs,
    failure_table,
    failures_by_kind,
    remarks,
    run_plan,
    servers_without_answers,
    to_figures,
)
from ostro.cluster.bench_statistics import Slo
from ostro.cluster.bench_stream import Target
from ostro.cluster.cli_connection import KEY_VARIABLE, base_url
from ostro.cluster.cli_console import make_console, plain_errors, print_error
from ostro.cluster.cli_tls import Ca, Cert, Key, https_context, read_tls

_DEFAULT_CONCURRENCY = "1,16"


class Api(StrEnum):
    """Where requests go."""

    COMPLETIONS = "completions"
    CHAT = "chat"


class PromptKind(StrEnum):
    """What prompts are."""

    TOKENS = "tokens"
    TEXT = "text"


@plain_errors()
def serve(  # noqa: PLR0913  each is an option
    url: Annotated[str, typer.Argument(help="The server, for example http://127.0.0.1:8000.")],
    model: Annotated[str, typer.Option(help="The model's name at the server.")],
    beside: Annotated[
        str, typer.Option(help="A second server, which takes turns with the first.")
    ] = "",
    beside_model: Annotated[str, typer.Option(help="Its name there, if another.")] = "",
    name: Annotated[str, typer.Option(help="What tables call the server.")] = "",
    beside_name: Annotated[str, typer.Option(help="What they call the second one.")] = "",
    concurrency: Annotated[
        str | None,
        typer.Option(help="Closed loops: requests at a time, by commas.", show_default="1,16"),
    ] = None,
    request_rate: Annotated[
        str, typer.Option(help="Open loops: requests per second (Poisson), by commas.")
    ] = "",
    requests: Annotated[
        int | None, typer.Option(min=1, help="Requests of each loop in each round.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each request.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Of each request.")] = 64,
    rounds: Rounds = 3,
    api: Annotated[Api, typer.Option(help="/v1/completions or /v1/chat/completions.")] = (
        Api.COMPLETIONS
    ),
    prompt_kind: Annotated[
        PromptKind | None,
        typer.Option(help="Token ids or words.", show_default="tokens, and text for chat"),
    ] = None,
    token_ids: Annotated[
        str, typer.Option(help="Token ids of prompts are drawn from FIRST:END.")
    ] = "1000:32000",
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos/--heed-eos", help="Send ignore_eos.")
    ] = True,
    min_tokens: Annotated[
        bool, typer.Option("--min-tokens", help="Send min_tokens, the same as max_tokens.")
    ] = False,
    extra: Annotated[str, typer.Option(help="More fields of the body, as JSON.")] = "",
    slo_ttft_ms: Annotated[
        float | None, typer.Option(min=0, help="Goodput: the first output within.")
    ] = None,
    slo_itl_ms: Annotated[
        float | None, typer.Option(min=0, help="Goodput: each token after it within, on average.")
    ] = None,
    max_in_flight: Annotated[
        int, typer.Option(min=1, help="Requests under way in an open loop, at most.")
    ] = 512,
    timeout_s: Annotated[float, typer.Option(min=0.001, help="Of a whole request.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Same seed, same prompts and arrivals.")] = 0,
    api_key: Annotated[str, typer.Option(envvar=KEY_VARIABLE, help="Bearer token.")] = "",
    beside_api_key: Annotated[str, typer.Option(help="The second server's.")] = "",
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    json: Json = None,
) -> None:
    """Load a server that speaks the OpenAI API, or two in turns; streams every answer.

    TTFT is the time to the first output, ITL the gap between two arrivals of output, TPOT the mean
    time per token after the first arrival of a request. An arrival may hold several tokens; tokens
    are counted by the server's usage. Exit code 1 if a server answers nothing.

    For example:

    ostro bench serve http://127.0.0.1:8000 --model mid --concurrency 1,16

    ostro bench serve http://a:8000 --beside http://b:8000 --model m --request-rate 2,4
    --slo-ttft-ms 500 --slo-itl-ms 50
    """
    plan = LoadPlan(
        loads=read_loads(concurrency, request_rate, max_in_flight),
        num_requests=requests,
        shape=_shape(prompt_tokens, api, prompt_kind, token_ids, seed),
        rounds=rounds,
        slo=Slo(ttft_s=_seconds(slo_ttft_ms), itl_s=_seconds(slo_itl_ms)),
    )
    fields: dict[str, Any] = {"ignore_eos": True} if ignore_eos else {}
    fields |= {"min_tokens": new_tokens} if min_tokens else {}
    fields |= _parse_object(extra)
    first = Target(
        name=name or base_url(url).partition("://")[2],
        url=base_url(url),
        model=model,
        chat=api is Api.CHAT,
        new_tokens=new_tokens,
        api_key=api_key,
        extra=fields,
        timeout_s=timeout_s,
    )
    targets = [first]
    if beside:
        second = replace(
            first,
            name=beside_name or base_url(beside).partition("://")[2],
            url=base_url(beside),
            model=beside_model or model,
            api_key=beside_api_key,
        )
        if second.name == first.name:
            raise typer.BadParameter("both servers have one name: give --name and --beside-name")
        targets.append(second)
    with shown_progress(plan.total_requests(len(targets))) as progress:
        runs = asyncio.run(
            run_plan(targets, plan, progress, https_context(read_tls(ca, cert, key)))
        )
    report(runs, plan, targets, json)


def read_loads(concurrency: str | None, request_rate: str, max_in_flight: int) -> tuple[Load, ...]:
    """The loops that the options ask for.

    Raises:
        typer.BadParameter: They ask for none, or are no numbers.
    """
    if concurrency is None:
        concurrency = "" if request_rate else _DEFAULT_CONCURRENCY
    rates = parse_rates(request_rate, "--request-rate")
    loads: tuple[Load, ...] = (
        *(ClosedLoop(size) for size in parse_counts(concurrency, "--concurrency")),
        *(OpenLoop(rate, max_in_flight) for rate in rates),
    )
    if not loads:
        raise typer.BadParameter("neither --concurrency nor --request-rate asks for anything")
    return loads


def report(runs: Runs, plan: LoadPlan, targets: Sequence[Target], json: Path | None) -> None:
    """Print figures, failures and remarks; write the JSON.

    Raises:
        typer.Exit: A server answered nothing.
    """
    console = make_console()
    figures = to_figures(runs, plan.slo)
    anchor = targets[-1].name if len(targets) > 1 else None
    console.print(to_table("Serving", figures, anchor=anchor))
    if failures_by_kind(runs):
        console.print(failure_table(runs))
    new_tokens = targets[0].new_tokens
    for remark in remarks(runs, new_tokens):
        console.print(f"note: {remark}", markup=False)
    if json is not None:
        write_json(
            json,
            figures,
            servers=[{"name": target.name, "url": target.url} for target in targets],
            model=targets[0].model,
            prompt_tokens=plan.shape.num_tokens,
            new_tokens=new_tokens,
            failures=[
                {"server": server, "load": load, "kind": kind, "requests": count, "first": first}
                for (server, load, kind), (count, first) in failures_by_kind(runs).items()
            ],
            remarks=list(remarks(runs, new_tokens)),
        )
    for silent in servers_without_answers(runs):
        print_error(f"{silent} answered no request; the table above says why")
    if servers_without_answers(runs):
        raise typer.Exit(1)


def _shape(
    prompt_tokens: int, api: Api, kind: PromptKind | None, token_ids: str, seed: int
) -> PromptShape:
    if api is Api.CHAT and kind is PromptKind.TOKENS:
        raise typer.BadParameter("chat takes text only", param_hint="--prompt-kind")
    first_id, end_id = parse_range(token_ids, "--token-ids")
    return PromptShape(
        num_tokens=prompt_tokens,
        as_text=api is Api.CHAT or kind is PromptKind.TEXT,
        first_token_id=first_id,
        end_token_id=end_id,
        seed=seed,
    )


def _parse_object(text: str) -> dict[str, Any]:
    try:
        fields = json_module.loads(text or "{}")
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise typer.BadParameter(f"{text!r}: must be a JSON object", param_hint="--extra")
    return fields


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
