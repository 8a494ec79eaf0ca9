"""Muon for matrices and stacks of matrices, AdamW for the rest, and their common schedule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

MUON_RATE, ADAM_RATE, ROUTER_RATE = 8e-3, 3e-3, 1e-3
_WARMUP_STEPS = 60
_DECAY_SHARE = 0.5  # of all steps; linear, to almost nothing
_FLOOR = 0.01


def rate_at(step: int, num_steps: int) -> float:
    """Factor on every learning rate: a short warm-up, a plateau, a linear end."""
    left = (num_steps - step) / num_steps
    return min(1.0, (step + 1) / _WARMUP_STEPS) * min(1.0, left / _DECAY_SHARE + _FLOOR)


def _orthogonalised(grad: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps towards the nearest orthogonal matrix (Jordan et al., 2024)."""
    x = grad / (grad.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Muon over [..., rows, columns] parameters, shared out among the workers by size."""

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        by_size = sorted(parameters, key=lambda parameter: -parameter.numel())
        workers = dist.get_world_size()
        self._owner = {id(parameter): i % workers for i, parameter in enumerate(by_size)}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update; every worker ends with the same parameters."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if self._owner[id(parameter)] == dist.get_rank():
                    self._update(parameter, group)
        for group in self.param_groups:
            for parameter in group["params"]:
                dist.broadcast(parameter.data, self._owner[id(parameter)])

    def _update(self, parameter: nn.Parameter, group: dict[str, float]) -> None:
        grad = parameter.grad
        if grad is None:
            return
        mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
        mean.lerp_(grad, 1 - group["momentum"])
        update = _orthogonalised(grad.lerp(mean, group["momentum"]))
        scale = 0.2 * max(parameter.shape[-2:]) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * scale)


def make_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for embeddings, head, norms and convolution, and routers.

    Routers learn slowly, so that the balance loss keeps up with them.
    """
    matrices, routers, rest = [], [], []
    for name, parameter in model.named_parameters():
        if "mlp.gate." in name:
            routers.append(parameter)
        elif parameter.ndim in (2, 3) and "embed" not in name and "lm_head" not in name:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    optimizers = [
        Muon(matrices, MUON_RATE, weight_decay=0.02),
        torch.optim.AdamW(rest, ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        torch.optim.AdamW(routers, ROUTER_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]
    return _with_full_rates(optimizers)


def head_optimizers(head: nn.Module) -> list[torch.optim.Optimizer]:
    """The same for a speculation head, which has matrices and norms only."""
    matrices = [parameter for parameter in head.parameters() if parameter.ndim == 2]
    norms = [parameter for parameter in head.parameters() if parameter.ndim == 1]
    optimizers = [
        Muon(matrices, MUON_RATE, weight_decay=0.02),
        torch.optim.AdamW(norms, ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    return _with_full_rates(optimizers)


def _with_full_rates(optimizers: list[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return optimizers


def set_rates(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Scale every learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * factor
