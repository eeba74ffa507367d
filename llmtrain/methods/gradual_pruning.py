"""Gradual magnitude pruning (Zhu and Gupta 2017, 1710.01878).

From ``start`` to ``end`` the density of each layer falls from 1 to its own by the cubic
d(t) = d + (1 - d) (1 - (t - t0) / (t1 - t0))^3; every ``every`` steps, and at ``end``, the kept
blocks of least magnitude go. What was pruned never comes back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtrain.methods.sparsity import StaticMask
from llmtrain.sparsity import Masks, Timetable, largest

if TYPE_CHECKING:
    from llmtrain.train.module import StepResult
    from llmtrain.train.trainer import Trainer


class GradualPruning(StaticMask):
    """Masks that shrink."""

    _times: Timetable

    def prepare(self, trainer: Trainer) -> None:
        """Resolve the durations."""
        run = trainer.clockwork
        self._times = Timetable.of(self.cfg, run.tokens_per_step, run.total)
        super().prepare(trainer)

    def first(self, trainer: Trainer, masks: Masks) -> None:
        """Nothing is pruned yet."""
        masks.keep_all()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Prune when it is time."""
        step = result.step
        if self._times.due(step) and not self.dropped:
            self._prune(trainer, step)
        super().after_step(trainer, result)

    def _prune(self, trainer: Trainer, step: int) -> None:
        masks = self.make(trainer)
        kept = blocks = 0
        for name, sparse in masks.sparse.items():
            old = masks.whole(name)
            scores = masks.scores(name, masks.params[name]).to(old.device).masked_fill(~old, -1.0)
            density = self._times.density(sparse.density, step)
            new = largest(scores, round(density * old.numel())) & old
            masks.take_whole(name, new)
            kept, blocks = kept + int(new.sum()), blocks + old.numel()
        masks.install(self.seed(trainer))
        self.zero(trainer, masks.layers)
        self.count_flops(trainer, step)
        text = f"pruned to {kept / max(blocks, 1):.1%} of the blocks"
        trainer.recorder.event(step, text, quiet=True)
