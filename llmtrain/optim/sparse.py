"""AdamW and Lion for packed weights (``llmtrain.ops.sparse``): moments for kept weights only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.ops import Packed
from llmtrain.ops.sparse_update import Rule, sparse_adamw_, sparse_lion_


class _Sparse(torch.optim.Optimizer):
    """What both have in common. packed: the matrix whose ``values`` a parameter is."""

    def __init__(self, packed: Mapping[nn.Parameter, Packed], defaults: dict[str, Any]) -> None:
        super().__init__(list(packed), defaults)
        self.packed = dict(packed)
        for param, matrix in self.packed.items():
            assert param.data_ptr() == matrix.values.data_ptr()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient. ``closure`` is not supported."""
        assert closure is None
        for group in self.param_groups:
            rule = Rule(group["lr"], group["betas"], group["weight_decay"], group.get("eps", 0.0))
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, rule)

    def _update(self, param: nn.Parameter, grad: Tensor, rule: Rule) -> None:
        raise NotImplementedError


class SparseAdamW(_Sparse):
    """torch's AdamW on the kept weights; state ``exp_avg``, ``exp_avg_sq`` like the packed values,
    and ``step``. ``unpack`` turns moments into those of a dense weight."""

    def __init__(
        self,
        packed: Mapping[nn.Parameter, Packed],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(packed, defaults)

    def _update(self, param: nn.Parameter, grad: Tensor, rule: Rule) -> None:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        state["step"] += 1
        moments = (state["exp_avg"], state["exp_avg_sq"])
        sparse_adamw_(self.packed[param], grad, moments, rule, int(state["step"]))


class SparseLion(_Sparse):
    """``llmtrain.optim.Lion`` on the kept weights; state ``exp_avg`` like the packed values."""

    def __init__(
        self,
        packed: Mapping[nn.Parameter, Packed],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(packed, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def _update(self, param: nn.Parameter, grad: Tensor, rule: Rule) -> None:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
        sparse_lion_(self.packed[param], grad, state["exp_avg"], rule)
