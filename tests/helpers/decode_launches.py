"""Launches of single-token attention in Mistral Small 4's sizes, for the compile gate."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ostro.kernels.fp8_linear import Fp8Weight
from ostro.kernels.gpu.decode_chunks import DecodeChunks
from ostro.kernels.gpu.join_values import join_values_triton
from ostro.kernels.gpu.latent_heads import expand_values_triton, latent_queries_triton
from ostro.kernels.gpu.mla_decode import AttendedChunks, attend_latents_triton
from ostro.kernels.gpu.mla_prologue import mla_prologue_triton
from ostro.kernels.gpu.query_projection import project_queries_triton
from ostro.kernels.latent_cache import FP8_ROWS, row_width
from ostro.kernels.mla_prologue import PrologueNorms

_HEADS, _NOPE, _ROPE, _LATENT, _VALUE, _PAGE = 32, 64, 64, 256, 128, 64
_COMPRESSED = 1024
_TOKENS, _CHUNKS, _PAGES = 64, 256, 4096


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _cache(dtype: torch.dtype) -> torch.Tensor:
    return _meta(_PAGES, _PAGE, row_width(_LATENT, _ROPE, dtype), dtype=dtype)


def _prologue(cache_dtype: torch.dtype) -> None:
    projected = _meta(_TOKENS, _COMPRESSED + _LATENT + _ROPE)
    mla_prologue_triton(
        projected[:, :_COMPRESSED],
        projected[:, _COMPRESSED:],
        PrologueNorms(_meta(_COMPRESSED), _meta(_LATENT), 1e-6),
        _meta(_TOKENS, _ROPE // 2, dtype=torch.complex64),
        _meta(_TOKENS, dtype=torch.int64),
        _cache(cache_dtype),
    )


def _project_queries(num_tokens: int, cache_dtype: torch.dtype = torch.bfloat16) -> None:
    projected = _meta(num_tokens, _COMPRESSED + _LATENT + _ROPE)
    scale = _meta(dtype=torch.float32)
    values_OI = _meta(_HEADS * (_NOPE + _ROPE), _COMPRESSED, dtype=torch.float8_e4m3fn)
    project_queries_triton(
        projected[:, :_COMPRESSED],
        projected[:, _COMPRESSED:],
        PrologueNorms(_meta(_COMPRESSED), _meta(_LATENT), 1e-6),
        _meta(num_tokens, _ROPE // 2, dtype=torch.complex64),
        _meta(num_tokens, dtype=torch.int64),
        _cache(cache_dtype),
        Fp8Weight(values_OI=values_OI, scale=scale, input_scale=scale),
    )


def _latent_queries() -> None:
    latent_queries_triton(
        _meta(_TOKENS, _HEADS, _NOPE + _ROPE),
        _meta(_HEADS, _NOPE, _LATENT),
        _meta(_TOKENS, _ROPE // 2, dtype=torch.complex64),
        _meta(_TOKENS, dtype=torch.float32),
    )


def _attend_latents(cache_dtype: torch.dtype) -> None:
    chunks = DecodeChunks(
        pages_G=_meta(_PAGES, dtype=torch.int32),
        chunk_X4=_meta(_CHUNKS, 4, dtype=torch.int32),
        first_T1=_meta(_TOKENS + 1, dtype=torch.int32),
    )
    q_THW = _meta(_TOKENS, _HEADS, _LATENT + _ROPE)
    attend_latents_triton(q_THW, _cache(cache_dtype), chunks, _LATENT, 0.1)


def _expand_values() -> None:
    expand_values_triton(_meta(_TOKENS, _HEADS, _LATENT), _meta(_HEADS, _VALUE, _LATENT))


def _join_values() -> None:
    parts = AttendedChunks(
        part_XHC=_meta(_CHUNKS, _HEADS, _LATENT, dtype=torch.float32),
        lse_XH=_meta(_CHUNKS, _HEADS, dtype=torch.float32),
        out_THC=_meta(1, _HEADS, _LATENT),
    )
    join_values_triton(parts, _meta(2, dtype=torch.int32), _meta(_HEADS, _VALUE, _LATENT))


LAUNCHES: dict[str, Callable[[], None]] = {
    "mla_prologue": functools.partial(_prologue, torch.bfloat16),
    "mla_prologue_fp8": functools.partial(_prologue, FP8_ROWS),
    "project_queries": functools.partial(_project_queries, 1),
    "project_queries_2_fp8": functools.partial(_project_queries, 2, FP8_ROWS),
    "latent_queries": _latent_queries,
    "attend_latents": functools.partial(_attend_latents, torch.bfloat16),
    "attend_latents_fp8": functools.partial(_attend_latents, FP8_ROWS),
    "expand_values": _expand_values,
    "join_values": _join_values,
}
