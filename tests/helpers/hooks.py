"""Hooks that tests name by import path in processes of their own."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

import torch

from llmtrain.train import Hook


class HalveOnEval(Hook):
    """Halves every parameter after each evaluation, as an averaging method may change them."""

    @torch.no_grad()
    def on_eval(self, trainer: object, metrics: object) -> None:
        for param in trainer.module.params.values():  # type: ignore[attr-defined]
            param.mul_(0.5)


class Slow(Hook):
    """Makes every step SLOW_SECONDS longer until SLURM restarts the job; same numbers."""

    def after_step(self, trainer: object, result: object) -> None:
        if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
            time.sleep(float(os.environ.get("SLOW_SECONDS", "0")))


class Late(Hook):
    """Lets the second rank come late to every step."""

    def after_step(self, trainer: object, result: object) -> None:
        if os.environ.get("RANK") == "1":
            time.sleep(0.4)


class KeepStart(Hook):
    """Writes the weights that a run begins with to ``start.bin`` in its folder."""

    def on_run_start(self, trainer: object) -> None:
        from safetensors.torch import save_file

        from llmtrain.train.run import run_folder

        module = trainer.module  # type: ignore[attr-defined]
        weights = {n: p.detach().clone() for n, p in module.params.items()}
        weights |= {n: c.spread(weights[n]) for n, c in module.compact.items()}
        save_file(weights, run_folder(trainer.cfg) / "start.bin")  # type: ignore[attr-defined]


class ZeroOutside(Hook):
    """Looks after every step whether weights and moments are zero outside the masks."""

    def after_step(self, trainer: object, result: object) -> None:
        from llmtrain.model import hidden_layers

        module = trainer.module  # type: ignore[attr-defined]
        for name, layer in hidden_layers(module.model):
            outside = ~layer.mask.box((0, 0), layer.mask.shape)
            state = module.optimizer.state[layer.weight]
            for held in (layer.weight, state["exp_avg"], state["exp_avg_sq"]):
                if layer.compact is not None:
                    assert held.numel() < outside.numel()
                value = held if layer.compact is None else layer.compact.spread(held)
                assert bool((value[outside] == 0).all()), name


class LossNotFinite(Hook):
    """The loss of some steps is no number, whenever they are computed; gradients are."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_run_start(self, trainer: Any) -> None:
        inner = trainer.module.forward_backward

        def forward_backward(*given: Any) -> Any:
            sums = inner(*given)
            bad = trainer.step_done + 1 in self.steps
            return replace(sums, loss=sums.loss * float("nan")) if bad else sums

        trainer.module.forward_backward = forward_backward


class Stop(Hook):
    """The run is interrupted in the middle of a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def after_step(self, trainer: Any, result: Any) -> None:
        if result.step == self.at:
            raise KeyboardInterrupt


class KeepGradients(Hook):
    """Writes hidden weights and their gradients of every step to ``gradients-<step>.bin``:
    ``before.<name>`` the weights, ``<name>`` the gradient as the optimizer gets it,
    ``whole.<name>`` as backward gave it."""

    def on_run_start(self, trainer: Any) -> None:
        from llmtrain.model import hidden_layers

        self.names = [f"{name}.weight" for name, _ in hidden_layers(trainer.module.model)]
        inner, self.whole = trainer.module.forward_backward, {}

        def forward_backward(*given: Any) -> Any:
            sums = inner(*given)
            for name in self.names:
                self.whole[f"whole.{name}"] = trainer.module.params[name].grad.clone()
            return sums

        trainer.module.forward_backward = forward_backward

    def after_backward(self, trainer: Any) -> None:
        from safetensors.torch import save_file

        from llmtrain.train.run import run_folder

        params = trainer.module.params
        found = {name: params[name].grad.clone() for name in self.names}
        found |= {f"before.{name}": params[name].detach().clone() for name in self.names}
        file = run_folder(trainer.cfg) / f"gradients-{trainer.step_done + 1}.bin"
        save_file(found | self.whole, file)
