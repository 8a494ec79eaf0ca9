"""The expert MLP over rows that belong to different experts.

    out[r] = sum over k of weight[r, k] * down[e] swiglu(gate_up[e] rows[r]),   e = expert[r, k]

Pairs (row, k) are sorted by expert, so every hit expert is two matrix products over a contiguous
slice. A row's experts are summed in float32 by ascending expert id, whatever the order of its k:
the result does not depend on the other rows.

Shape legend: R rows, K experts per row, A = pairs with a local expert, D hidden, F expert hidden,
E local experts.
"""

from __future__ import annotations

import torch

from ostro.kernels.cpu import library
from ostro.kernels.linear import LinearWeight, is_packed, linear


def swiglu(gate_up_AH: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of rows that hold gate in their first half and up in their second."""
    gate_AF, up_AF = gate_up_AH.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_AF).mul_(up_AF)


def mlp(x_TD: torch.Tensor, gate_up_HD: LinearWeight, down_DF: LinearWeight) -> torch.Tensor:
    """One SwiGLU MLP over every row, down swiglu(gate_up x): the shared expert.

    Args:
        x_TD: Hidden states.
        gate_up_HD: H = 2F: gate rows [0, F), up rows [F, 2F); plain, packed, FP8 or NVFP4.
        down_DF: Likewise.
    """
    if not is_packed(gate_up_HD) or not is_packed(down_DF):
        return linear(swiglu(linear(x_TD, gate_up_HD)), down_DF)
    num_rows = len(x_TD)
    first_R1 = torch.zeros(num_rows, 1, dtype=torch.int64)
    one_R1 = torch.ones(num_rows, 1)
    return expert_mlp(x_TD, first_R1, one_R1, gate_up_HD[None], down_DF[None])


def expert_mlp(
    rows_RD: torch.Tensor,
    expert_RK: torch.Tensor,
    weight_RK: torch.Tensor,
    gate_up_EHD: torch.Tensor,
    down_EDF: torch.Tensor,
    *,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run every row through its local experts and add up the weighted results.

    Args:
        rows_RD: Hidden states.
        expert_RK: int64 local expert ids, -1 where the k-th expert is not here.
        weight_RK: float32 gate weights.
        gate_up_EHD: H = 2F: gate rows [0, F), up rows [F, 2F) of each expert; plain or packed.
        down_EDF: Second matrix of each expert, likewise.
        counts: int64 [1 + E] on the same device, to which is added how many pairs have no local
            expert, then how many each expert has.

    Returns:
        out_RD in the dtype of `rows_RD`; zeros for a row without a local expert.

    Raises:
        ValueError: On a GPU, D or F does not fill 16-byte steps.

    Example:
        with D = F = E = 1, gate 1, up 2, down 3, row [1.] of weight 0.5: 0.5 * 3 * silu(1) * 2.
    """
    if counts is None:
        counts = expert_RK.new_zeros(1 + len(gate_up_EHD))
    if is_packed(gate_up_EHD):
        return expert_mlp_cpu(rows_RD, expert_RK, weight_RK, gate_up_EHD, down_EDF, counts)
    if rows_RD.is_cuda:
        from ostro.kernels.gpu.expert_mlp import expert_mlp_triton

        return expert_mlp_triton(rows_RD, expert_RK, weight_RK, gate_up_EHD, down_EDF, counts)
    found = torch.bincount(expert_RK.flatten() + 1, minlength=len(counts))
    counts += found
    num_absent, *num_pairs_E = found.tolist()
    order_A = torch.argsort(expert_RK.flatten(), stable=True)
    row_A = torch.div(order_A[num_absent:], expert_RK.shape[1], rounding_mode="floor")
    y_AD = _sorted_mlp(rows_RD, row_A, num_pairs_E, gate_up_EHD, down_EDF)
    place_RK = _places(order_A, num_absent).view(expert_RK.shape)
    return _weighted_sum(y_AD, place_RK, weight_RK)


def expert_mlp_cpu(
    rows_RD: torch.Tensor,
    expert_RK: torch.Tensor,
    weight_RK: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    counts: torch.Tensor,
) -> torch.Tensor:
    """`expert_mlp` for packed stacks [E, 2F / 16, D / 2, 16, 2] and [E, D / 16, F / 2, 16, 2].

    Only the experts that some row hits are read.
    """
    native = library.required()
    num_rows, hidden = rows_RD.shape
    top_k, inner = expert_RK.shape[1], down.shape[2] * 2
    rows_RD, expert_RK = rows_RD.contiguous(), expert_RK.contiguous()
    weight_RK = weight_RK.contiguous()
    out_RD = torch.empty_like(rows_RD)
    native.ostro_expert_mlp(
        rows_RD.data_ptr(),
        num_rows,
        top_k,
        expert_RK.data_ptr(),
        weight_RK.data_ptr(),
        gate_up.data_ptr(),
        down.data_ptr(),
        len(gate_up),
        hidden,
        inner,
        counts.data_ptr(),
        out_RD.data_ptr(),
        torch.get_num_threads(),
    )
    return out_RD


def expert_mlp_reference(
    rows_RD: torch.Tensor,
    expert_RK: torch.Tensor,
    weight_RK: torch.Tensor,
    gate_up_EHD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> torch.Tensor:
    """Meaning of `expert_mlp`, pair by pair."""
    out_RD = torch.zeros(rows_RD.shape, device=rows_RD.device)
    for r, experts in enumerate(expert_RK.tolist()):
        for expert, k in sorted((e, k) for k, e in enumerate(experts) if e >= 0):
            hidden_F = swiglu(gate_up_EHD[expert] @ rows_RD[r])
            out_RD[r] += weight_RK[r, k] * (down_EDF[expert] @ hidden_F).float()
    return out_RD.to(rows_RD.dtype)


def _sorted_mlp(
    rows_RD: torch.Tensor,
    row_A: torch.Tensor,
    num_pairs_E: list[int],
    gate_up_EHD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> torch.Tensor:
    """Unweighted results of the pairs in sorted order, and one more row of zeros at the end."""
    zeros_1D = rows_RD.new_zeros(1, rows_RD.shape[1])
    slices = _hit_slices(num_pairs_E)
    if not slices:
        return zeros_1D
    x_AD = rows_RD.index_select(0, row_A)
    gate_up = [linear(x_AD[start:stop], gate_up_EHD[e]) for e, start, stop in slices]
    hidden_AF = swiglu(torch.cat(gate_up))
    down = [linear(hidden_AF[start:stop], down_EDF[e]) for e, start, stop in slices]
    return torch.cat([*down, zeros_1D])


def _hit_slices(num_pairs_E: list[int]) -> list[tuple[int, int, int]]:
    """(expert, start, stop) of each hit expert's pairs [start, stop) in sorted order."""
    slices = []
    start = 0
    for expert, count in enumerate(num_pairs_E):
        if count:
            slices.append((expert, start, start + count))
            start += count
    return slices


def _places(order_A: torch.Tensor, num_absent: int) -> torch.Tensor:
    """Row of `_sorted_mlp`'s result for each pair; absent pairs get the row of zeros at the end."""
    num_present = order_A.shape[0] - num_absent
    place_of_sorted_A = torch.arange(-num_absent, num_present, device=order_A.device)
    place_of_sorted_A[:num_absent] = num_present
    return torch.empty_like(order_A).scatter_(0, order_A, place_of_sorted_A)


def _weighted_sum(
    y_AD: torch.Tensor, place_RK: torch.Tensor, weight_RK: torch.Tensor
) -> torch.Tensor:
    place_RK, by_expert_RK = torch.sort(place_RK, dim=1)
    weight_RK = weight_RK.gather(1, by_expert_RK)
    out_RD = y_AD.index_select(0, place_RK[:, 0]).float() * weight_RK[:, :1]
    for k in range(1, place_RK.shape[1]):
        out_RD.addcmul_(y_AD.index_select(0, place_RK[:, k]).float(), weight_RK[:, k : k + 1])
    return out_RD.to(y_AD.dtype)
