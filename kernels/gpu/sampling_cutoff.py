"""The cutoff of top-k, top-p and min-p on a GPU: exact, without a sort.

A token's weight is exp((logit - largest) / temperature), at most 1; its key is the weight's bits as
an int32, which order as weights do. Its mass is the weight in units of 2**-44, so that masses add
up exactly in any order: 131,072 of them are at most 2**61, and a weight below one unit is never
drawn anyway.

The cutoff is the largest key such that tokens at or above it are k, or have the mass that top-p
needs. Every slice measures how many tokens, with how much mass, reach thresholds 3 octaves apart;
then lists the keys from the threshold below the cutoff upwards; and one program a row narrows the
cutoff down within the list, by 16 pivots a round.

Shape legend: B rows, V vocabulary, S slices of the vocabulary, T thresholds, W words of 32 tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

COLDEST = tl.constexpr(1e-6)  # below this a draw is greedy in float32 anyway

# Columns of a batch's settings.
NUM_SETTINGS = tl.constexpr(5)
TEMPERATURE = tl.constexpr(0)
TOP_K = tl.constexpr(1)
TOP_P = tl.constexpr(2)
MIN_P = tl.constexpr(3)
UNIFORM = tl.constexpr(4)

_NUM_THRESHOLDS = 16  # 2**0, 2**-3 and so on to 2**-45, which every token with mass reaches
_HIGHEST = tl.constexpr(0x3F800000)  # key of 1.0, the likeliest token's
_OCTAVES = tl.constexpr(3 << 23)  # difference of keys 3 octaves apart
_UNITS = tl.constexpr(2.0**44)
_MAX_SLICE = 4096
_BLOCK_MEASURED = 256
_BLOCK_NARROWED = 512


def slice_size(vocabulary: int) -> int:
    """Tokens of a slice; the same for any number of rows."""
    power: int = triton.next_power_of_2(vocabulary)
    return min(_MAX_SLICE, max(_BLOCK_MEASURED, power))


def sampling_cutoff_triton(
    logits_BV: torch.Tensor,
    settings_B5: torch.Tensor,
    largest_BS: torch.Tensor,
    allowed_BW: torch.Tensor | None = None,
) -> torch.Tensor:
    """Key of the lightest weight that each row's filters keep, int32 [B].

    Args:
        logits_BV: float32 or bfloat16, contiguous.
        settings_B5: float64 temperature, top-k, top-p, min-p, and a column for others. Rows of
            temperature 0, top-k 0 and top-p 1 only convert min-p.
        largest_BS: float32 largest logit of each slice.
        allowed_BW: int32, or None: bit v % 32 of word v // 32 is set where token v may be drawn.

    Example:
        logits ln [[4., 2., 1., 1.]]: top-k 2 gives the key of 0.5, top-p 0.8 that of 0.25.
    """
    (num_rows, vocabulary), num_slices = logits_BV.shape, largest_BS.shape[1]
    shape = (num_rows, num_slices, _NUM_THRESHOLDS)
    count_BST = largest_BS.new_empty(shape, dtype=torch.int32)
    mass_BST = largest_BS.new_empty(shape, dtype=torch.int64)
    measured = (logits_BV, allowed_BW, settings_B5, largest_BS, count_BST, mass_BST)
    cut = {
        "T": _NUM_THRESHOLDS,
        "BLOCK_S": triton.next_power_of_2(num_slices),
        "BLOCK_V": slice_size(vocabulary),
        "num_warps": 8,
    }
    grid = (num_rows, num_slices)
    _tails_kernel[grid](*measured, vocabulary, num_slices, BLOCK_N=_BLOCK_MEASURED, **cut)
    keys_BV = torch.empty_like(logits_BV, dtype=torch.int32)
    _list_kernel[grid](*measured, keys_BV, vocabulary, num_slices, **cut)
    cutoff_B = largest_BS.new_empty(num_rows, dtype=torch.int32)
    _cutoff_kernel[(num_rows,)](
        settings_B5,
        count_BST,
        mass_BST,
        keys_BV,
        cutoff_B,
        vocabulary,
        num_slices,
        T=_NUM_THRESHOLDS,
        BLOCK_S=triton.next_power_of_2(num_slices),
        BLOCK_N=_BLOCK_NARROWED,
        num_warps=16,
    )
    return cutoff_B


def sampling_cutoff_reference(
    logits_BV: torch.Tensor,
    settings_B5: torch.Tensor,
    largest_BS: torch.Tensor,
    allowed_BW: torch.Tensor | None = None,
) -> torch.Tensor:
    """Meaning of `sampling_cutoff_triton`, by a sort of each row."""
    cutoff_B = settings_B5[:, MIN_P.value].float()
    for b, (temperature, top_k, top_p, *_) in enumerate(settings_B5.tolist()):
        if temperature == 0.0:
            continue
        logits_V = logits_BV[b].float()
        if allowed_BW is not None:
            bit_V = torch.arange(len(logits_V), device=logits_V.device)
            is_allowed_V = (allowed_BW[b, bit_V // 32] >> (bit_V % 32)) & 1 != 0
            logits_V = logits_V.masked_fill(~is_allowed_V, -torch.inf)
        weight_V = ((logits_V - largest_BS[b].amax()) / max(temperature, COLDEST.value)).exp()
        ranked = weight_V.sort(descending=True).values
        if top_k:
            ranked = ranked[: int(top_k)]
            cutoff_B[b] = torch.maximum(cutoff_B[b], ranked[-1])
        if top_p < 1.0:
            mass = ranked.double().cumsum(0)
            reached = torch.searchsorted(mass, top_p * mass[-1]).clamp_(max=len(ranked) - 1)
            cutoff_B[b] = torch.maximum(cutoff_B[b], ranked[reached])
    return cutoff_B.view(torch.int32)


@triton.jit
def load_logits(logits, allowed, b, v, V) -> tl.tensor:
    """Logits of row b at v, float32; -inf past the vocabulary and where they may not be drawn."""
    x = tl.load(logits + b * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
    if allowed is not None:
        word = tl.load(allowed + b * tl.cdiv(V, 32) + v // 32, mask=v < V, other=0)
        x = tl.where(((word >> (v % 32)) & 1) != 0, x, float("-inf"))
    return x


@triton.jit
def load_largest(largest, b, S, BLOCK_S: tl.constexpr) -> tl.tensor:
    """Largest logit of row b, of those of its slices."""
    s = tl.arange(0, BLOCK_S)
    return tl.max(tl.load(largest + b * S + s, mask=s < S, other=float("-inf")), 0)


@triton.jit
def weight_keys(x, largest, temperature) -> tl.tensor:
    """Keys of the weights of logits x."""
    weight = tl.exp((x - largest) / tl.maximum(temperature, COLDEST).to(tl.float32))
    # Without a finite logit, or with NaN, the weight is NaN: never drawn.
    return tl.where(weight <= 1.0, weight, 0.0).to(tl.int32, bitcast=True)


@triton.jit
def mass_of(key) -> tl.tensor:
    """Mass of the weights that have these keys, int64."""
    return (key.to(tl.float32, bitcast=True) * _UNITS).to(tl.int64)


@triton.jit
def min_p_key(setting) -> tl.tensor:
    """Key of the row's min-p, `setting` being its settings."""
    return tl.load(setting + MIN_P).to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _is_filtered(setting):
    asks = (tl.load(setting + TOP_K) > 0.0) | (tl.load(setting + TOP_P) < 1.0)
    return asks & (tl.load(setting + TEMPERATURE) > 0.0)


@triton.jit
def _tails_kernel(
    logits,
    allowed,
    settings,
    largest,
    count,
    mass,
    V,
    S,
    T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)  # int64: b * V passes 2**31 at 16,384 rows
    s = tl.program_id(1)
    setting = settings + b * NUM_SETTINGS
    if _is_filtered(setting):
        top = load_largest(largest, b, S, BLOCK_S)
        temperature = tl.load(setting + TEMPERATURE)
        j = tl.arange(0, T)
        threshold_T = j * -_OCTAVES + _HIGHEST
        # Sums stay with the threads that add to them until the end; all of a slice's pairs of token
        # and threshold at once do not fit the registers.
        count_NT = tl.zeros((BLOCK_N, T), tl.int32)
        mass_NT = tl.zeros((BLOCK_N, T), tl.int64)
        for start in range(0, BLOCK_V, BLOCK_N):
            v = s * BLOCK_V + start + tl.arange(0, BLOCK_N)
            key = weight_keys(load_logits(logits, allowed, b, v, V), top, temperature)
            reaches = key[:, None] >= threshold_T[None, :]
            count_NT += reaches.to(tl.int32)
            mass_NT += tl.where(reaches, mass_of(key)[:, None], 0)
        place = (b * S + s) * T + j
        tl.store(count + place, tl.sum(count_NT, 0))
        tl.store(mass + place, tl.sum(mass_NT, 0))


@triton.jit
def _load_tails(tails, b, S, T: tl.constexpr, BLOCK_S: tl.constexpr):
    s, j = tl.arange(0, BLOCK_S), tl.arange(0, T)
    place = (b * S + s)[:, None] * T + j[None, :]
    return tl.load(tails + place, mask=(s < S)[:, None], other=0)


@triton.jit
def _num_unmet(measured_T, needed):
    # Thresholds descend, so that this is the first which as much as is needed reaches.
    return tl.sum((measured_T < needed).to(tl.int32), 0)


@triton.jit
def _top_p_mass(setting, total):
    # At most all of it, which rounding to 53 bits may pass.
    return tl.minimum((tl.load(setting + TOP_P) * total.to(tl.float64)).to(tl.int64), total)


@triton.jit
def _bounds(setting, count_T, mass_T, T: tl.constexpr):
    # k, or 0 if that many tokens have no mass; and the first threshold not above any cutoff.
    top_k = tl.load(setting + TOP_K).to(tl.int64)
    top_k = tl.where(top_k <= tl.max(count_T, 0), top_k, 0)
    needed = _top_p_mass(setting, tl.max(mass_T, 0))
    # Top-p shares out what top-k keeps, and so never goes below its cutoff.
    unmet = tl.where(top_k > 0, _num_unmet(count_T, top_k), _num_unmet(mass_T, needed))
    return top_k, unmet


@triton.jit
def _list_kernel(
    logits,
    allowed,
    settings,
    largest,
    count,
    mass,
    keys,
    V,
    S,
    T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    here = tl.program_id(1)
    setting = settings + b * NUM_SETTINGS
    if _is_filtered(setting):
        count_ST = _load_tails(count, b, S, T, BLOCK_S)
        mass_T = tl.sum(_load_tails(mass, b, S, T, BLOCK_S), 0)
        _, unmet = _bounds(setting, tl.sum(count_ST, 0), mass_T, T)
        s, j = tl.arange(0, BLOCK_S), tl.arange(0, T)
        is_before = (s < here)[:, None] & (j == unmet)[None, :]
        first = tl.sum(tl.sum(tl.where(is_before, count_ST, 0), 0), 0)
        x = load_logits(logits, allowed, b, here * BLOCK_V + tl.arange(0, BLOCK_V), V)
        top = load_largest(largest, b, S, BLOCK_S)
        key = weight_keys(x, top, tl.load(setting + TEMPERATURE))
        is_listed = (key >= unmet * -_OCTAVES + _HIGHEST).to(tl.int32)
        place = b * V + first + tl.cumsum(is_listed, 0) - 1
        tl.store(keys + place, key, mask=is_listed != 0)


@triton.jit
def _cutoff_kernel(
    settings,
    count,
    mass,
    keys,
    cutoff,
    V,
    S,
    T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    setting = settings + b * NUM_SETTINGS
    key = min_p_key(setting)
    if _is_filtered(setting):
        count_T = tl.sum(_load_tails(count, b, S, T, BLOCK_S), 0)
        mass_T = tl.sum(_load_tails(mass, b, S, T, BLOCK_S), 0)
        top_k, unmet = _bounds(setting, count_T, mass_T, T)
        n = tl.sum(tl.where(tl.arange(0, T) == unmet, count_T, 0), 0)
        listed = keys + b * V
        total = tl.max(mass_T, 0)
        if top_k > 0:
            kth, above, mass_above = _search(
                listed, n, count_T, mass_T, top_k, BY_MASS=False, T=T, BLOCK_N=BLOCK_N
            )
            # Top-p shares out the mass of k tokens, however many equal the k-th.
            total = mass_above + (top_k - above) * mass_of(kth)
            key = tl.maximum(key, kth)
        if tl.load(setting + TOP_P) < 1.0:
            needed = _top_p_mass(setting, total)
            pth, above, mass_above = _search(
                listed, n, count_T, mass_T, needed, BY_MASS=True, T=T, BLOCK_N=BLOCK_N
            )
            key = tl.maximum(key, pth)
    tl.store(cutoff + b, key)


@triton.jit
def _search(
    listed,
    n,
    count_T,
    mass_T,
    needed,
    BY_MASS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The largest key that tokens of this number or mass reach; and how many tokens, of what mass,
    # lie above it. It is always within [low, high): low is reached by enough, high is not.
    j = tl.arange(0, T)
    unmet = _num_unmet(mass_T if BY_MASS else count_T.to(tl.int64), needed)
    low = unmet * -_OCTAVES + _HIGHEST
    high = tl.where(unmet > 0, low + _OCTAVES, low + 1)
    above = tl.sum(tl.where(j == unmet - 1, count_T, 0), 0)
    mass_above = tl.sum(tl.where(j == unmet - 1, mass_T, 0), 0)
    while high - low > 1:
        step = (high - low + T) // (T + 1)
        pivot_T = low + (j + 1) * step
        count_NT = tl.zeros((BLOCK_N, T), tl.int32)
        mass_NT = tl.zeros((BLOCK_N, T), tl.int64)
        for start in range(0, n, BLOCK_N):
            i = start + tl.arange(0, BLOCK_N)
            key = tl.load(listed + i, mask=i < n, other=0)
            reaches = key[:, None] >= pivot_T[None, :]
            count_NT += reaches.to(tl.int32)
            mass_NT += tl.where(reaches, mass_of(key)[:, None], 0)
        reached_T = tl.sum(count_NT, 0)
        reached_mass_T = tl.sum(mass_NT, 0)
        is_met_T = (reached_mass_T if BY_MASS else reached_T.to(tl.int64)) >= needed
        met = tl.sum((is_met_T & (pivot_T < high)).to(tl.int32), 0)
        next_ = low + (met + 1) * step
        if (met < T) & (next_ < high):
            high = next_
            above = tl.sum(tl.where(j == met, reached_T, 0), 0)
            mass_above = tl.sum(tl.where(j == met, reached_mass_T, 0), 0)
        low += met * step
    return low, above, mass_above
