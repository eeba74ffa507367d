"""SR-STE: N:M masks from scratch that follow the magnitudes (Zhou et al. 2021, 2102.04010).

In every step forward and the input's gradient compute with the N largest of every M weights; the
gradient of W * M goes straight through to all of W, and what is pruned decays besides (eq. 7):

    W <- W - rate (g(W * M) + decay_pruned (1 - M) * W)

so that the masks come to rest. It is the baseline that SLoPe is measured against; "extended": the
optimizer is the run's, whatever it is, and the term is a part of its gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtrain.methods.live import LiveMask
from llmtrain.sparsity import Masks

if TYPE_CHECKING:
    from llmtrain.data.batch import Batch
    from llmtrain.train.trainer import Trainer


class SrSte(LiveMask):
    """Masks of the present magnitudes."""

    def first(self, trainer: Trainer, masks: Masks) -> None:
        """Of the weights that the run begins with."""
        masks.choose_largest()

    def before_batch(self, trainer: Trainer, batch: Batch) -> None:
        """Masks of this step's weights."""
        if self.dropped or self.settled:
            return
        masks = self.make(trainer)
        masks.choose_largest()
        masks.install()

    def after_backward(self, trainer: Trainer) -> None:
        """What is pruned decays."""
        if self.dropped or self.settled:
            super().after_backward(trainer)
            return
        masks = self.make(trainer)
        for name, param in masks.params.items():
            if param.grad is not None:
                masks.add_outside(name, param.grad, param, self.cfg.decay_pruned)
