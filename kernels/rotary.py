"""Rotary position embedding in interleaved pairs, YaRN frequencies, and the llama-4 query scale.

A head's rope part is J = P / 2 pairs (x[2j], x[2j+1]); pair j of a token at position p turns by the
angle p * inv_freq[j]. Pairs stay pairs: queries and cached keys agree, so nothing is permuted.
Angles are computed in float32 from absolute positions, so no table bounds the context.

Shape legend: T tokens, H heads, P rope dim, J = P / 2 pairs.
"""

from __future__ import annotations

import math

import torch

from ostro.kernels.cpu import library


def inverse_frequencies(dim: int, theta: float) -> torch.Tensor:
    """Angles per position of the `dim / 2` pairs, theta ** (-2j / dim), float32 on the CPU."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def yarn_inverse_frequencies(
    dim: int,
    theta: float,
    *,
    factor: float,
    original_max_positions: int,
    beta_fast: float,
    beta_slow: float,
) -> torch.Tensor:
    """YaRN: pairs that turn often keep their frequency, slow ones are divided by `factor`.

    The blend is linear in the pair's number, between the pairs that turn `beta_fast` and
    `beta_slow` times over the original positions.

    Example:
        dim 64, theta 10000, factor 128, original 8192, betas 32 and 1 give
        1 at j = 0, 3.04827e-3 at j = 18 and 1.04181e-6 at j = 31.
    """

    def pair_turning(num_turns: float) -> float:
        positions_per_radian = original_max_positions / (num_turns * 2 * math.pi)
        return dim * math.log(positions_per_radian) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(beta_fast)), 0)
    high = min(math.ceil(pair_turning(beta_slow)), dim - 1)
    inv_freq_J = inverse_frequencies(dim, theta)
    pairs_J = torch.arange(dim // 2, dtype=torch.float32)
    slow_J = ((pairs_J - low) / max(high - low, 1e-3)).clamp(0.0, 1.0)
    return inv_freq_J * (1.0 - slow_J) + inv_freq_J / factor * slow_J


def rotations(
    positions_T: torch.Tensor, inv_freq_J: torch.Tensor, factor: float = 1.0
) -> torch.Tensor:
    """Unit complex numbers (times `factor`) that turn each pair of each token, complex64 [T, J]."""
    angles_TJ = positions_T.float()[:, None] * inv_freq_J
    return torch.polar(torch.full_like(angles_TJ, factor), angles_TJ)


def rotary(x_THP: torch.Tensor, turn_TJ: torch.Tensor) -> torch.Tensor:
    """Turn the pairs of every head.

    Args:
        x_THP: Rope part of queries or keys, any float dtype, possibly strided.
        turn_TJ: What `rotations` gave for the tokens' positions.

    Returns:
        A new tensor of the same shape and dtype.

    Example:
        x [[[1., 0.]]] turned by a quarter (turn [[0 + 1j]]) gives [[[0., 1.]]].
    """
    x_THP_wide = x_THP.float()
    if x_THP_wide.storage_offset() % 2 or any(stride % 2 for stride in x_THP_wide.stride()[:-1]):
        x_THP_wide = x_THP_wide.clone(memory_format=torch.contiguous_format)
    turned_THJ = torch.view_as_complex(x_THP_wide.unflatten(-1, (-1, 2))) * turn_TJ[:, None]
    return torch.view_as_real(turned_THJ).flatten(-2).to(x_THP.dtype)


def rotary_(x_THP: torch.Tensor, turn_TJ: torch.Tensor) -> None:
    """`rotary` in place."""
    if not library.serves(x_THP) or x_THP.shape[2] % 16 or x_THP.stride(2) != 1:
        x_THP.copy_(rotary(x_THP, turn_TJ))
        return
    num_tokens, num_heads, width = x_THP.shape
    library.required().ostro_rotary(
        x_THP.data_ptr(),
        x_THP.stride(0),
        x_THP.stride(1),
        num_tokens,
        num_heads,
        width,
        turn_TJ.data_ptr(),
        torch.get_num_threads(),
    )


def rotary_reference(x_THP: torch.Tensor, turn_TJ: torch.Tensor) -> torch.Tensor:
    """Meaning of `rotary`, pair by pair in real numbers."""
    cos_T1J, sin_T1J = turn_TJ.real[:, None], turn_TJ.imag[:, None]
    even_THJ, odd_THJ = x_THP[..., 0::2].float(), x_THP[..., 1::2].float()
    turned = (even_THJ * cos_T1J - odd_THJ * sin_T1J, odd_THJ * cos_T1J + even_THJ * sin_T1J)
    return torch.stack(turned, dim=-1).flatten(-2).to(x_THP.dtype)


def llama4_query_scale(
    positions_T: torch.Tensor, beta: float, original_max_positions: int
) -> torch.Tensor:
    """Factor on the whole query, 1 + beta * ln(1 + floor(position / original)), float32 [T].

    Example:
        beta 0.1, original 8192: 1.0 at 8191, 1.0693 at 8192, 1.3466 at 262143.
    """
    steps_T = torch.div(positions_T, original_max_positions, rounding_mode="floor")
    return 1.0 + beta * torch.log1p(steps_T.float())
