"""Hooks that tests name by import path in processes of their own."""

from __future__ import annotations

import torch

from llmtrain.train import Hook


class HalveOnEval(Hook):
    """Halves every parameter after each evaluation, as an averaging method may change them."""

    @torch.no_grad()
    def on_eval(self, trainer: object, metrics: object) -> None:
        for param in trainer.module.params.values():  # type: ignore[attr-defined]
            param.mul_(0.5)
