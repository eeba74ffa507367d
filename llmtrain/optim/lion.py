"""Lion (Chen et al. 2023, 2302.06675, Algorithm 2): sign of an interpolated momentum."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from llmtrain.optim.clip import local_part


class Lion(torch.optim.Optimizer):
    """c = b1 m + (1-b1) g;  p <- p (1 - lr wd) - lr sign(c);  m <- b2 m + (1-b2) g.

    One moment per parameter, in the parameter's dtype. Parameters may be DTensors.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]] | Iterable[nn.Parameter],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient. ``closure`` is not supported."""
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for param in params:
                if not self.state[param]:
                    self.state[param]["exp_avg"] = torch.zeros_like(param)
            # Element by element, so each rank's part does; DTensor would first look for the best
            # placement of every operand, seconds of a first step.
            weights = [local_part(p) for p in params]
            grads = [local_part(p.grad) for p in params]
            moments = [local_part(self.state[p]["exp_avg"]) for p in params]
            beta1, beta2 = group["betas"]
            update = torch._foreach_lerp(moments, grads, 1.0 - beta1)
            torch._foreach_sign_(update)
            if group["weight_decay"]:
                torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, update, alpha=-group["lr"])
            torch._foreach_lerp_(moments, grads, 1.0 - beta2)
