"""RMS norm: scale every row to unit mean square, then by a learned weight.

    out = weight * (x / sqrt(mean(x^2) + eps)).to(dtype of x)

Statistics are float32; the weight multiplies after the cast back, as the model was trained.

Shape legend: T tokens, D width of the normalised rows.
"""

from __future__ import annotations

import torch

from ostro.kernels.cpu import library


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise the last dimension of `x_TD`.

    Args:
        x_TD: Any float dtype; rows may be strided.
        weight_D: Same dtype as `x_TD`.
        eps: Added to the mean square.

    Example:
        x [[3., 4.]], weight [1., 2.], eps 0 give [[0.8485, 2.2627]].
    """
    if library.serves(x_TD) and x_TD.dim() == 2 and not x_TD.shape[1] % 16:
        return rms_norm_cpu(x_TD, weight_D, eps)
    if x_TD.is_cuda:
        from ostro.kernels.gpu.rms_norm import rms_norm_triton

        return rms_norm_triton(x_TD, weight_D, eps)
    return rms_norm_reference(x_TD, weight_D, eps)


def rms_norm_cpu(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm` by the CPU operators; D is a multiple of 16."""
    native = library.required()
    if x_TD.stride(1) != 1:
        x_TD = x_TD.contiguous()
    num_rows, width = x_TD.shape
    out_TD = x_TD.new_empty(num_rows, width)
    native.ostro_rms_norm(
        x_TD.data_ptr(),
        x_TD.stride(0),
        weight_D.data_ptr(),
        num_rows,
        width,
        eps,
        out_TD.data_ptr(),
        torch.get_num_threads(),
    )
    return out_TD


def rms_norm_reference(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Plain-torch meaning of `rms_norm`."""
    wide_TD = x_TD.float()
    mean_square_T1 = wide_TD.pow(2).mean(-1, keepdim=True)
    return (wide_TD * torch.rsqrt(mean_square_T1 + eps)).to(x_TD.dtype) * weight_D
