"""Masks over weights that live on outside them: what SR-STE and movement pruning share.

Forward computes with W * M; the gradient that reaches the optimizer's hook is that of W * M as a
whole, so that a method can judge what is pruned. Outside the mask weights keep their values, until
the mask is settled (the run's end, or where the method says): from there on they are zeros, as with
every other method. A checkpoint of before holds them all, and its masks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtrain.methods.sparsity import StaticMask

if TYPE_CHECKING:
    from llmtrain.sparsity import Masks
    from llmtrain.train.trainer import Trainer


class LiveMask(StaticMask):
    """Masks that do not zero weights until they are settled."""

    settled = False

    def settle(self, trainer: Trainer, masks: Masks) -> None:
        """Products with whole gradients; weights stay."""
        masks.want_dense_gradients(True)

    def end(self, trainer: Trainer) -> None:
        """Nothing outside the masks lives from here on."""
        masks = self.make(trainer)
        masks.want_dense_gradients(False)
        self.zero(trainer, masks.layers)
        self.settled = True

    def on_checkpoint(self, trainer: Trainer) -> None:
        """Only what is settled is zero outside the masks."""
        if self.settled:
            super().on_checkpoint(trainer)

    def on_run_end(self, trainer: Trainer) -> None:
        """The last checkpoint holds the function that was trained."""
        over = trainer.step_done == trainer.clockwork.total
        if over and not self.dropped and not self.settled:
            self.end(trainer)
