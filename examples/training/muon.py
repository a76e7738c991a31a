"""Muon (Jordan et al. 2024) in a chosen dtype. ``torch.optim.Muon`` computes in bfloat16, slow on most CPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration, as in torch.optim.Muon


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for matrices.

    Args:
        params: Parameters of two dimensions.
        lr: Learning rate.
        momentum: Factor of the momentum buffer.
        weight_decay: Decoupled weight decay.
        dtype: Dtype of the Newton-Schulz iteration.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update the parameters that have a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                kept = self.state[p].setdefault("momentum", torch.zeros_like(p))
                kept.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalised(p.grad.lerp(kept, group["momentum"]).to(self.dtype)).to(p.dtype)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)
        return loss


def orthogonalised(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Return the matrix with its singular values moved close to 1."""
    a, b, c = COEFFICIENTS
    x = matrix / (matrix.norm() + 1e-7)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T
