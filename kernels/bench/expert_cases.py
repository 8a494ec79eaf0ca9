"""Cases of the expert MLP: one layer's experts, hit as a batch would.

Shape letters: B tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from ostro.kernels.bench.expert_layers import Layer, no_counts
from ostro.kernels.bench.measure import Case
from ostro.kernels.gpu.few_experts import MAX_FEW_PAIRS

BATCHES = (1, 8, 32, 128, 512, 2048, 8192)
_SKEW = 1.0  # of the Zipf routing: the i-th expert is chosen like 1 / i
_SKEWED_BATCHES = (32, 2048)


def cases(layer: Layer, batches: Sequence[int] = BATCHES) -> Iterator[Case]:
    """Both products and the whole expert MLP, evenly routed and skewed."""
    for num_tokens in batches:
        yield from _cases(layer, num_tokens, "", 0.0)
    for num_tokens in sorted(set(_SKEWED_BATCHES).intersection(batches)):
        yield from _cases(layer, num_tokens, " skewed", _SKEW)


def _cases(layer: Layer, num_tokens: int, note: str, skew: float) -> Iterator[Case]:
    s, width, row = layer.sizes, layer.weight_bytes, layer.row_dtype.itemsize
    batches = layer.batches(num_tokens, skew)
    hidden = [layer.gate_up(batch) for batch in batches]
    num_hit = sum(batch.num_hit() for batch in batches) / len(batches)
    num_pairs, matrix = num_tokens * s.num_chosen, s.inner * s.hidden
    up_bytes = num_hit * 2 * matrix * width + num_pairs * (s.hidden + s.inner) * row
    down_bytes = num_hit * matrix * width + num_pairs * (s.inner * row + s.hidden * 2)
    up_flops, down_flops = 4.0 * num_pairs * matrix, 2.0 * num_pairs * matrix
    counts = no_counts(s)
    case = partial(
        Case,
        size=f"B={num_tokens}{note}",
        flops_ceiling="fp8" if row == 1 else "bf16",
        tolerance=layer.tolerance,
    )
    yield case(
        operation=f"gate_up {layer.name}",
        launches=[partial(layer.gate_up, batch) for batch in batches],
        bytes_moved=up_bytes,
        flops=up_flops,
        error=partial(layer.gate_up_error, batches[0]),
        others=layer.gate_up_others(batches),
    )
    yield case(
        operation=f"down {layer.name}",
        launches=[partial(layer.down, b, h) for b, h in zip(batches, hidden, strict=True)],
        bytes_moved=down_bytes,
        flops=down_flops,
        error=partial(layer.down_error, batches[0], hidden[0]),
        others=layer.down_others(batches, hidden),
    )
    yield case(
        operation=f"expert_mlp {layer.name}",
        launches=[partial(layer.whole, batch, counts) for batch in batches],
        bytes_moved=up_bytes + down_bytes,
        flops=up_flops + down_flops,
        error=partial(layer.whole_error, batches[0], counts),
        others={"sorted": [partial(layer.sorted_whole, batch, counts) for batch in batches]}
        if num_pairs <= MAX_FEW_PAIRS
        else {},
    )
