"""Rows of parameters that an optimizer leaves as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llmtrain.optim.clip import local_part
from llmtrain.parallel import local_boxes


class FrozenRows:
    """Keeps chosen rows of parameters to the bit through every step of ``optimizer``, weight decay
    and moments notwithstanding. During a step it holds a copy of them.

    params: of this rank, by name; plain tensors or DTensors of any layout.
    """

    def __init__(self, optimizer: Optimizer, params: Mapping[str, nn.Parameter]) -> None:
        self.params = params
        self._rows: dict[str, Tensor] = {}
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def choose(self, patterns: Mapping[str, Sequence[bool]]) -> None:
        """Freeze these rows and no others. patterns: by parameter, repeated over the rows of the
        whole; true: frozen. Parameters that this rank does not have are passed over."""
        self._rows = {}
        for name, pattern in patterns.items():
            if name in self.params:
                ((values, offset),) = local_boxes(self.params[name])
                places = torch.arange(offset[0], offset[0] + len(values)) % len(pattern)
                frozen = torch.tensor(pattern)[places].nonzero().squeeze(1)
                self._rows[name] = frozen.to(values.device)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set their gradients to zero, so that neither norms nor moments see them."""
        for name, rows in self._rows.items():
            grad = self.params[name].grad
            if grad is not None:
                local_part(grad).index_fill_(0, rows, 0.0)

    @torch.no_grad()
    def _before_step(self, *_: Any) -> None:
        for name, rows in self._rows.items():
            values = local_part(self.params[name])
            self._kept.append((values, rows, values[rows]))

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        for values, rows, kept in self._kept:
            values[rows] = kept
        self._kept = []
