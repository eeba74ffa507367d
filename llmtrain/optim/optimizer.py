"""Building the optimizer from its config section."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from llmtrain.config.schema import OptimConfig
from llmtrain.optim.groups import ParamGroup
from llmtrain.optim.lion import Lion


def build_optimizer(groups: list[ParamGroup], cfg: OptimConfig) -> Optimizer:
    """AdamW (fused kernels) or Lion over ``groups``.

    Weight decay, ``decoupled: lr``: p <- p (1 - lr_t wd), as in torch. ``fully``:
    p <- p (1 - wd lr_t / lr_peak), independent of the peak learning rate; realised by handing
    the optimizer wd / lr_peak, since both update rules multiply by the current rate.
    """
    entries: list[dict[str, Any]] = []
    for group in groups:
        peak = cfg.lr * group.lr_factor
        decay = group.weight_decay
        if cfg.decoupled == "fully" and peak:
            decay = decay / peak
        # The fused kernels take DTensors or plain tensors, not both at once.
        sharded = [param for param in group.params if isinstance(param, DTensor)]
        plain = [param for param in group.params if not isinstance(param, DTensor)]
        facts = {"lr": peak, "weight_decay": decay, "lr_factor": group.lr_factor}
        entries += [{"params": params, **facts} for params in (sharded, plain) if params]
    betas = (cfg.betas[0], cfg.betas[1])
    if cfg.name == "lion":
        return Lion(entries, lr=cfg.lr, betas=betas)
    return AdamW(entries, lr=cfg.lr, betas=betas, eps=cfg.eps, fused=True)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set each group's rate to ``lr`` times its factor."""
    for group in optimizer.param_groups:
        value = lr * group["lr_factor"]
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value
