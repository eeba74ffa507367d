"""Averaging during training: the hook of the config section ``average``.

Everything works on this rank's parts of the parameters (float32 masters), so any layout will do
and nothing but Model Stock's angles is communicated. Between merges nothing is done. Copies lie
in host memory, go into every checkpoint and come back under any layout. The optimizer's state is
kept as it is when weights are merged.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmtrain.checkpoint import HOOK_PREFIX, MODEL_PREFIX, OPTIM_PREFIX, load_checkpoint
from llmtrain.config import RunConfig
from llmtrain.config.weight_methods import AverageConfig
from llmtrain.errors import CheckpointError
from llmtrain.merge.copies import (
    Weights,
    copy_into,
    empty_copy,
    mean_into,
    move_towards,
    part,
)
from llmtrain.merge.formulas import gram, stock_ratio
from llmtrain.train.fitting import Needed
from llmtrain.train.hooks import Hook

if TYPE_CHECKING:
    from llmtrain.train.module import StepResult
    from llmtrain.train.trainer import Trainer

_ANCHOR = "average.anchor"


def averaging(cfg: AverageConfig) -> Averaging:
    """The hook of a section ``average``."""
    return {"sfa": Soup, "ema": Ema, "latest": Latest, "stock": Stock}[cfg.method](cfg)


class Averaging(Hook):
    """What the methods share: when they act, their copies, and averaged weights in evaluation.

    copies: named sets of weights in the parameters' layout. taken: counts of a method's own.
    """

    def __init__(self, cfg: AverageConfig) -> None:
        self.cfg = cfg
        self.copies: dict[str, Weights] = {}
        self.taken = 0
        self.running = False
        self.every: int | None = None
        self.start = 0
        self._expected: list[str] = []

    def on_run_start(self, trainer: Trainer) -> None:
        """Resolve the durations; begin unless a checkpoint has brought the state back."""
        times = trainer.clockwork
        self.start = self.cfg.start.steps(times.tokens_per_step, times.total)
        if self.cfg.every is not None:
            self.every = max(self.cfg.every.steps(times.tokens_per_step, times.total), 1)
        if not self.running and trainer.step_done >= self.start:
            self._begin(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Begin, act when it is time, and finish at the run's last step."""
        step, last = result.step, result.step == trainer.clockwork.total
        if self.running:
            if self.every is not None and (step - self.start) % self.every == 0:
                self.act(trainer, last)
            elif last:
                self.finish(trainer)
        elif step == self.start:
            self._begin(trainer)

    def on_eval(self, trainer: Trainer, metrics: dict[str, dict[str, float]]) -> None:
        """Measure the averaged weights on the same sequences, where the method has any."""
        if not (self.cfg.evaluate and self.running and self.has_average(trainer)):
            return
        params = trainer.module.weights()
        live = empty_copy(params, offload=True)
        copy_into(live, params)
        self.write_average(trainer)
        averaged = trainer.evaluation.run(trainer.module)
        copy_into(params, live)
        trainer.module.weights_changed()
        trainer.recorder.evaluation(trainer.step_done, averaged, weights=self.cfg.method)

    def state_dict(self) -> dict[str, Any]:
        """Which copies there are; their values are in ``tensors``."""
        return {
            "method": self.cfg.method,
            "running": self.running,
            "taken": self.taken,
            "copies": list(self.copies),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state back."""
        self.running, self.taken = bool(state["running"]), int(state["taken"])
        self._expected = list(state["copies"])

    def check_state(self, state: dict[str, Any]) -> None:
        """CheckpointError when another method saved the state."""
        if state["method"] != self.cfg.method:
            raise CheckpointError(
                f"average.method: the checkpoint was made with {state['method']} and the config "
                f"says {self.cfg.method}; resume with average.method={state['method']}, or begin "
                "a new run from its weights"
            )

    def tensors(self, trainer: Trainer) -> dict[str, torch.Tensor]:
        """Every copy as ``<copy>.<parameter>``."""
        for name in self._expected:
            self.copies[name] = self.empty(trainer)
        self._expected = []
        return {
            f"{name}.{key}": value
            for name, weights in self.copies.items()
            for key, value in weights.items()
        }

    def act(self, trainer: Trainer, last: bool) -> None:
        """What is done every ``every`` steps. last: the run ends here."""

    def finish(self, trainer: Trainer) -> None:
        """What is done at the end of the run when ``act`` is not due there."""

    def has_average(self, trainer: Trainer) -> bool:
        """Whether there are averaged weights besides those in training."""
        return False

    def write_average(self, trainer: Trainer) -> None:
        """Put the averaged weights into the parameters."""

    def _begin(self, trainer: Trainer) -> None:
        self.running = True
        self.begin(trainer)

    def begin(self, trainer: Trainer) -> None:
        """Make the first copies."""

    def empty(self, trainer: Trainer) -> Weights:
        """Room for a copy of this rank's parts, where ``average.storage`` says."""
        folder = Path(trainer.cfg.out) / trainer.cfg.name if self.cfg.storage == "disk" else None
        return empty_copy(trainer.module.weights(), self.cfg.storage == "cpu", folder)

    def keep(self, trainer: Trainer, name: str) -> None:
        """Copy the parameters as they are to the copy ``name``."""
        params = trainer.module.weights()
        if name not in self.copies:
            self.copies[name] = self.empty(trainer)
        copy_into(self.copies[name], params)

    def changed(self, trainer: Trainer, text: str) -> None:
        """The parameters were written to; record it."""
        trainer.module.weights_changed()
        trainer.recorder.event(trainer.step_done, text, quiet=True)


class _Anchored(Averaging):
    """Methods with an anchor theta_o."""

    def needs(self, cfg: RunConfig, state: dict[str, Any] | None) -> list[Needed]:
        """The anchor's checkpoint, unless the run's own checkpoint holds the copy."""
        own = self.cfg.anchor in ("start", "rolling")
        if own or (state is not None and "anchor" in state["copies"]):
            return []
        return [Needed(_ANCHOR, self.cfg.anchor)]

    def on_run_start(self, trainer: Trainer) -> None:
        """Read the anchor now, even where averaging starts later: it might be gone by then."""
        if _ANCHOR in self.found:
            self.copies["anchor"] = anchor = self.empty(trainer)
            wanted = {f"{MODEL_PREFIX}{name}": value for name, value in anchor.items()}
            unused = (OPTIM_PREFIX, HOOK_PREFIX)
            group = trainer.world.cpu_group
            load_checkpoint(self.found[_ANCHOR], wanted, group, unused=unused, verify=False)
        super().on_run_start(trainer)

    def begin(self, trainer: Trainer) -> None:
        """Take the present weights as the anchor, unless it came from a checkpoint."""
        if self.cfg.anchor in ("start", "rolling"):
            self.keep(trainer, "anchor")

    def merged(self, trainer: Trainer, text: str) -> None:
        """The parameters hold merged weights."""
        if self.cfg.anchor == "rolling":
            self.keep(trainer, "anchor")
        self.changed(trainer, text)


class Soup(_Anchored):
    """Sequential Fine-tuning with Averaging (Soup to go, 2501.05559).

    Every pT steps and at the end theta <- (1 - beta) theta + beta theta_o, where theta_o are the
    weights at the start of the task. With ``anchor: rolling`` each merge moves the anchor to the
    merged weights, which is Lookahead (Zhang et al. 2019, 1907.08610) with slow step 1 - beta.
    """

    def act(self, trainer: Trainer, last: bool) -> None:
        """Merge. At beta 0 there is nothing to do, and -0.0 must not become 0.0."""
        if self.cfg.beta > 0:
            move_towards(trainer.module.weights(), self.copies["anchor"], self.cfg.beta)
        self.merged(trainer, f"merged with the anchor (beta {self.cfg.beta:g})")

    def finish(self, trainer: Trainer) -> None:
        """The merge at the end."""
        self.act(trainer, True)


class _Beside(Averaging):
    """Methods whose averaged weights lie beside those in training and take their place at last."""

    def has_average(self, trainer: Trainer) -> bool:
        """Not once the averaged weights have taken the place of the others."""
        return not (self.cfg.replace and trainer.step_done == trainer.clockwork.total)

    def finish(self, trainer: Trainer) -> None:
        """The averaged weights become the model."""
        if self.cfg.replace:
            self.write_average(trainer)
            self.changed(trainer, f"the run ends with the averaged weights ({self.cfg.method})")


class Ema(_Beside):
    """Exponential moving average: every ``every`` steps a <- decay a + (1 - decay) theta."""

    def begin(self, trainer: Trainer) -> None:
        """The average begins at the present weights."""
        self.keep(trainer, "ema")

    def act(self, trainer: Trainer, last: bool) -> None:
        """Update the average."""
        move_towards(self.copies["ema"], trainer.module.weights(), 1.0 - self.cfg.decay)
        if last:
            self.finish(trainer)

    def write_average(self, trainer: Trainer) -> None:
        """The average as it stands."""
        copy_into(trainer.module.weights(), self.copies["ema"])
        trainer.module.weights_changed()


class Latest(_Beside):
    """Mean of the last ``keep`` snapshots, one every ``every`` steps and one at the end.

    Latest weight averaging (Kaddour 2022, 2209.14981; Sanyal et al. 2023, 2306.03241).
    """

    def act(self, trainer: Trainer, last: bool) -> None:
        """Take a snapshot in the place of the oldest."""
        self.keep(trainer, f"snapshot{self.taken % self.cfg.keep}")
        self.taken += 1
        if last:
            super().finish(trainer)

    def finish(self, trainer: Trainer) -> None:
        """The weights at the end are the last snapshot."""
        self.act(trainer, True)

    def has_average(self, trainer: Trainer) -> bool:
        """From the first snapshot on."""
        return self.taken > 0 and super().has_average(trainer)

    def write_average(self, trainer: Trainer) -> None:
        """The mean of the snapshots there are."""
        mean_into(trainer.module.weights(), list(self.copies.values()))
        trainer.module.weights_changed()


class Stock(_Anchored):
    """Periodic merging by Model Stock's ratio (2403.19522) in a single run.

    The paper merges separately trained models. Here they are excursions one after the other:
    each trains ``every`` steps from the same weights (the last merged ones) on the data that
    follow, and after ``keep`` of them every parameter becomes t mean(w_i) + (1 - t) w_0 with
    w_0 the anchor and t of the angles between the w_i - w_0 (``formulas.stock_ratio``). The last
    excursions of a run are merged as far as they have come; one alone is kept as it is. That the
    excursions share an optimizer and follow each other is our arrangement.
    """

    def begin(self, trainer: Trainer) -> None:
        """Besides the anchor, remember where the excursions begin."""
        super().begin(trainer)
        if self.cfg.anchor != "rolling":
            self.keep(trainer, "origin")

    def act(self, trainer: Trainer, last: bool) -> None:
        """End an excursion: merge, or go back for the next one."""
        self.keep(trainer, f"excursion{self.taken}")
        self.taken += 1
        if last or self.taken == self.cfg.keep:
            self._merge(trainer)
        else:
            origin = "anchor" if self.cfg.anchor == "rolling" else "origin"
            copy_into(trainer.module.weights(), self.copies[origin])
            self.changed(trainer, f"excursion {self.taken} of {self.cfg.keep} ended")

    def finish(self, trainer: Trainer) -> None:
        """Merge the unfinished excursion with those before it."""
        self.act(trainer, True)

    @torch.no_grad()
    def _merge(self, trainer: Trainer) -> None:
        params, anchor = trainer.module.weights(), self.copies["anchor"]
        number = self.taken
        ends = [self.copies.pop(f"excursion{i}") for i in range(number)]
        self.taken = 0
        if number > 1:
            products = torch.stack(
                [gram([part(end[k]) for end in ends], part(anchor[k])) for k in params]
            ).to(trainer.module.device)
            sums = trainer.module.sum_over_parts(products)
            ratios = stock_ratio(sums).tolist()
            mean_into(params, ends)
            for ratio, (name, param) in zip(ratios, params.items(), strict=True):
                own = part(param)
                own.lerp_(part(anchor[name]).to(own.device, non_blocking=True), 1.0 - ratio)
        if self.cfg.anchor != "rolling":
            self.keep(trainer, "origin")
        self.merged(trainer, f"merged {number} excursions by their angles")
