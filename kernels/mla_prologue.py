"""What comes between the down projections and attention: norms, rotary, and the cache.

    compressed = norm(query);   cache[slot] = norm(latent), rotary(rope key)

Shape legend: T tokens, L compressed query width, O outputs, N pages, S page size, C latent, P rope
dim, J = P / 2 rotary pairs, W = C + P.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from ostro.kernels.fp8_linear import Fp8Rows, Fp8Weight, fp8_linear_reference
from ostro.kernels.latent_cache import write_latents_reference, write_rows
from ostro.kernels.linear import LinearWeight, linear
from ostro.kernels.rms_norm import rms_norm, rms_norm_reference
from ostro.kernels.rotary import rotary_reference


@dataclass(frozen=True, slots=True)
class PrologueNorms:
    """Weights of one layer's two RMS norms before attention.

    Attributes:
        query_L: Of compressed queries.
        latent_C: Of latents.
        eps: Of both.
    """

    query_L: torch.Tensor
    latent_C: torch.Tensor
    eps: float


# query_TL, row_TW, norms, turn_TJ, slots_T and cache_NSW, as `mla_prologue` takes them.
PrologueInputs: TypeAlias = tuple[
    torch.Tensor, torch.Tensor, PrologueNorms, torch.Tensor, torch.Tensor, torch.Tensor
]


def mla_prologue(
    query_TL: torch.Tensor,
    row_TW: torch.Tensor,
    norms: PrologueNorms,
    turn_TJ: torch.Tensor,
    slots_T: torch.Tensor,
    cache_NSW: torch.Tensor,
    weight_OL: LinearWeight | None = None,
) -> torch.Tensor | Fp8Rows:
    """Norm the compressed queries; norm, turn and store the tokens' latents and rope keys.

    Args:
        query_TL: As projected; rows may be strided.
        row_TW: Latents as projected, then rope keys; likewise.
        norms: The layer's.
        turn_TJ: Rotations of the tokens' positions, complex64.
        slots_T: int64, all different; on a GPU -1 stores nothing.
        cache_NSW: One layer's cache, plain or of FP8 rows, contiguous; written in place.
        weight_OL: What multiplies the compressed queries; on a GPU they come rounded for it, if it
            is FP8.

    Returns:
        compressed_TL.

    Example:
        query [[3., 4.]] with norm [1., 1.] and eps 0 gives [[0.8485, 1.1314]].
    """
    if query_TL.is_cuda:
        from ostro.kernels.gpu.mla_prologue import mla_prologue_triton

        arguments = (query_TL, row_TW, norms, turn_TJ, slots_T)
        if isinstance(weight_OL, Fp8Weight):
            values_TL = mla_prologue_triton(*arguments, cache_NSW, weight_OL.input_scale)
            return Fp8Rows(values_TI=values_TL, dtype=query_TL.dtype)
        return mla_prologue_triton(*arguments, cache_NSW)
    write_rows(cache_NSW, row_TW, norms.latent_C, norms.eps, turn_TJ, slots_T)
    return rms_norm(query_TL, norms.query_L, norms.eps)


def project_queries(
    query_TL: torch.Tensor,
    row_TW: torch.Tensor,
    norms: PrologueNorms,
    turn_TJ: torch.Tensor,
    slots_T: torch.Tensor,
    cache_NSW: torch.Tensor,
    weight_OL: LinearWeight,
) -> torch.Tensor:
    """`mla_prologue`, and its queries times a weight: [T, O] in the dtype of `query_TL`.

    Example:
        query [[3., 4.]] with norm [1., 1.] and eps 0, weight [[1., 1.]] give [[1.9799]].
    """
    arguments = (query_TL, row_TW, norms, turn_TJ, slots_T, cache_NSW)
    if query_TL.is_cuda and isinstance(weight_OL, Fp8Weight):
        from ostro.kernels.gpu.query_projection import project_queries_triton, projects_queries

        if projects_queries(query_TL):
            return project_queries_triton(*arguments, weight_OL)
    return linear(mla_prologue(*arguments, weight_OL), weight_OL)


def project_queries_reference(
    query_TL: torch.Tensor,
    row_TW: torch.Tensor,
    norms: PrologueNorms,
    turn_TJ: torch.Tensor,
    slots_T: torch.Tensor,
    cache_NSW: torch.Tensor,
    weight_OL: Fp8Weight,
) -> torch.Tensor:
    """Plain-torch meaning of `project_queries` with an FP8 weight."""
    arguments = (query_TL, row_TW, norms, turn_TJ, slots_T, cache_NSW)
    return fp8_linear_reference(mla_prologue_reference(*arguments), weight_OL)


def mla_prologue_reference(
    query_TL: torch.Tensor,
    row_TW: torch.Tensor,
    norms: PrologueNorms,
    turn_TJ: torch.Tensor,
    slots_T: torch.Tensor,
    cache_NSW: torch.Tensor,
) -> torch.Tensor:
    """Plain-torch meaning of `mla_prologue`; skips slots of -1."""
    latent = norms.latent_C.shape[0]
    is_stored = slots_T >= 0
    latent_TC = rms_norm_reference(row_TW[:, :latent], norms.latent_C, norms.eps)
    key_TP = rotary_reference(row_TW[:, None, latent:], turn_TJ)[:, 0]
    write_latents_reference(cache_NSW, latent_TC[is_stored], key_TP[is_stored], slots_T[is_stored])
    return rms_norm_reference(query_TL, norms.query_L, norms.eps)
