"""Dynamic sparse training: RigL and SET.

Every ``every`` steps until ``end`` the share f(t) of each layer's kept blocks that is smallest in
magnitude is dropped and as many are grown, so that the density stays what it is:
f(t) = fraction / 2 (1 + cos(pi t / T_end)).

``rigl`` (Evci et al. 2020, 1911.11134) grows where the gradient of the loss is largest, ``set``
(Mocanu et al. 2018, 1707.04780) at random. Dropped blocks are candidates too and keep their values
when they are chosen again; new ones begin at zero, with zero moments. RigL's gradients are those
of the whole global batch of the step at which the mask changes; that step's update is made with
the new mask (the paper's algorithm makes none).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmtrain.methods.sparsity import StaticMask
from llmtrain.sparsity import Granularity, Masks, largest, random_keys

if TYPE_CHECKING:
    from llmtrain.data.batch import Batch
    from llmtrain.train.trainer import Trainer


def replaced_share(fraction: float, step: int, end: int) -> float:
    """f(t): the share of kept blocks replaced after ``step`` updates."""
    return fraction / 2 * (1 + math.cos(math.pi * min(step / end, 1.0)))


def regrown(kept: Tensor, weights: Tensor, growth: Tensor, share: float) -> Tensor:
    """The mask after one change: bool like ``kept``, with as many kept.

    weights, growth: scores of dropping (smallest first) and of growing (largest first).
    """
    total = int(kept.sum())
    moved = min(int(share * total), kept.numel() - total)
    stay = largest(weights.masked_fill(~kept, -1.0), total - moved)
    grown = largest(growth.masked_fill(stay, -torch.inf), moved)
    return stay | grown


class Regrowth(StaticMask):
    """SET and RigL."""

    _every = _end = 0
    _due = False
    _changed = -1

    def prepare(self, trainer: Trainer) -> None:
        """Resolve the durations."""
        times = trainer.clockwork
        self._every = max(self.cfg.every.steps(times.tokens_per_step, times.total), 1)
        self._end = self.cfg.end.steps(times.tokens_per_step, times.total)
        super().prepare(trainer)

    def before_batch(self, trainer: Trainer, batch: Batch) -> None:
        """Ask for whole gradients in the step that changes the mask."""
        step = trainer.step_done
        self._due = not self.dropped and 0 < step < self._end and step % self._every == 0
        if self._due and self.cfg.method == "rigl":
            assert self.masks is not None
            self.masks.want_dense_gradients(True)

    def after_backward(self, trainer: Trainer) -> None:
        """Change the mask; the gradients of this step are those of the new one."""
        if not self._due:
            super().after_backward(trainer)
            return
        masks, step, self._due = self.make(trainer), trainer.step_done, False
        share = replaced_share(self.cfg.fraction, step, self._end)
        moved = self._change(trainer, masks, share)
        masks.install(self.seed(trainer))
        masks.want_dense_gradients(False)
        self.zero(trainer, masks.layers)
        self.mask_gradients(masks)
        if moved:
            self._changed = step
        text = f"{self.cfg.method}: {moved:.1%} of the kept blocks moved"
        trainer.recorder.event(step, text, quiet=True)

    def repeatable(self, trainer: Trainer) -> bool:
        """Not in a step that has changed the mask: its forward pass was another function's."""
        return self._changed != trainer.step_done

    def _change(self, trainer: Trainer, masks: Masks, share: float) -> float:
        """New masks; returns the share of kept blocks that are others now."""
        moved = total = 0
        for name in masks.sparse:
            kept = masks.whole(name)
            weights = masks.scores(name, masks.params[name]).to(kept.device)
            growth = self._growth(trainer, masks, name).to(kept.device)
            # Of a batch that is not finite the guard skips the update; the mask stays as well.
            if bool(growth.isfinite().all()):
                new = regrown(kept, weights, growth, share)
                masks.take_whole(name, new)
                moved += int((new & ~kept).sum())
            total += int(kept.sum())
        return moved / max(total, 1)

    def _growth(self, trainer: Trainer, masks: Masks, name: str) -> Tensor:
        granularity: Granularity = masks.sparse[name].granularity
        if self.cfg.method == "set":
            grid = granularity.grid(masks.sparse[name].shape)
            label = (self.seed(trainer), f"{name}/{trainer.step_done}")
            return random_keys(label, grid)
        grad = masks.params[name].grad
        assert grad is not None
        return masks.scores(name, grad)
