"""Optimizer state as named tensors, for checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llmtrain.optim.lion import Lion


def create_state(optimizer: Optimizer, params: Iterable[Tensor] | None = None) -> None:
    """Allocate the moments now instead of in the first step, so that a checkpoint can be read.

    AdamW: ``exp_avg``, ``exp_avg_sq`` like the parameter and a float32 ``step``; Lion: ``exp_avg``.
    params: whose; None: those in the optimizer's groups.
    """
    if params is None:
        params = [param for group in optimizer.param_groups for param in group["params"]]
    for param in params:
        state = optimizer.state[param]
        if state:
            continue
        if not isinstance(optimizer, Lion):
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg_sq"] = torch.zeros_like(param)
        state["exp_avg"] = torch.zeros_like(param)


def replace_parameter(
    optimizer: Optimizer,
    old: nn.Parameter,
    new: nn.Parameter,
    convert: Callable[[Tensor], Tensor],
) -> None:
    """Let ``new`` stand where ``old`` does. What there is of its shape in the optimizer's state
    goes through ``convert``; a parameter that no group has is none of the optimizer's."""
    for group in optimizer.param_groups:
        group["params"] = [new if param is old else param for param in group["params"]]
    state = optimizer.state.pop(old, None)
    if state:
        optimizer.state[new] = {
            key: convert(value) if value.shape == old.shape else value
            for key, value in state.items()
        }


def state_tensors(optimizer: Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """``{"optim.<parameter>.<key>": tensor}``; the live tensors, not copies."""
    names: dict[Tensor, str] = {param: name for name, param in named.items()}
    return {
        f"optim.{names[param]}.{key}": value
        for param, state in optimizer.state.items()
        for key, value in state.items()
    }
