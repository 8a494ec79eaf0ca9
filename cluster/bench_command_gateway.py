"""`ostro bench gateway`: its options and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ostro.cluster.bench_figures import to_table, write_json
from ostro.cluster.bench_options import Json, Rounds, parse_counts
from ostro.cluster.bench_progress import shown_progress
from ostro.cluster.cli_console import make_console, plain_errors
from ostro.cluster.ray_environment import prepare_environment

_PAGE_SIZE = 16


@plain_errors()
def gateway(  # noqa: PLR0913  each is an option
    model: Annotated[
        str, typer.Option(help="Checkpoint whose tokenizer is used; nothing is computed.")
    ] = "embedded",
    concurrency: Annotated[
        str, typer.Option(help="Streams at a time for the first token, by commas.")
    ] = "1,32",
    streams: Annotated[
        int, typer.Option(min=1, help="Streams at a time for throughput and stalls.")
    ] = 256,
    pace_ms: Annotated[
        float, typer.Option("--pace", min=0, help="Milliseconds of a step's forward pass.")
    ] = 20.0,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each request.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=1, help="For the first token.")] = 16,
    stream_tokens: Annotated[int, typer.Option(min=4, help="For throughput and stalls.")] = 128,
    clients: Annotated[int, typer.Option(min=1, help="Client processes.")] = 2,
    rounds: Rounds = 3,
    json: Json = None,
) -> None:
    """The cost of ingress and router alone: the engine says canned tokens at a set pace.

    "added" is a face's first token beyond the bare engine's. "stall" is how much longer than the
    pace a stream's tokens were apart at worst, over streams. "streamed" is with an engine that does
    not wait; a busiest client near 100 % of a core was the limit itself: use more --clients.
    """
    sizes = parse_counts(concurrency, "--concurrency")
    prepare_environment()
    from ostro.cluster.bench_face_calls import Face
    from ostro.cluster.bench_gateway import GatewayPlan, measure_gateway
    from ostro.cluster.cli_deployment import check_ports_free
    from ostro.cluster.model_paths import resolve_model
    from ostro.configs.load import load_deployment

    plan = GatewayPlan(
        concurrencies=tuple(sizes),
        streams=streams,
        pace_s=pace_ms / 1e3,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        stream_tokens=stream_tokens,
        rounds=rounds,
        num_clients=clients,
    )
    running = max(streams, *sizes, 1)
    pages = -(-(prompt_tokens + max(new_tokens, stream_tokens)) // _PAGE_SIZE) + 1
    deployment = load_deployment(
        "laptop_single",
        [
            f"model={model}",
            f"engine.num_pages={running * pages}",
            f"engine.max_running_requests={running}",
            f"engine.max_tokens_per_step={max(2048, running)}",
            "engine.prefix_cache=false",
            f"serving.max_ongoing_requests={max(1024, 2 * running)}",
        ],
    )
    check_ports_free(deployment.serving)
    with shown_progress(plan.total_runs()) as progress:
        figures = measure_gateway(deployment, resolve_model(model), plan, progress)
    make_console().print(to_table("Gateway", figures, anchor=Face.ENGINE.value))
    if json is not None:
        write_json(json, figures, model=Path(model).name, pace_ms=pace_ms, clients=clients)
