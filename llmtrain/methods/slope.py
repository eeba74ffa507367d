"""SLoPe: double-pruned sparse training with lazy low-rank adapters (2405.16325).

Forward computes with W_R, N:M along the inputs of each output; the gradient of the input with
W_{R,C}, which is W_R pruned again to N:M along the outputs, so that both products have an N:M
operand:

    Y = X W_R^T,   dX = dY W_{R,C},   dW = (dY^T X) at the mask R

Both masks are random and static. For random masks of density s = N/M the second pruning takes
sum_{j>N} C(M,j) s^j (1-s)^(M-j) (j-N)/M of all weights: 9.375% for 2:4, 12.5% for 1:2.

In the last 1% of the run (``adapters_at``) low-rank adapters take part, those of
``model.adapters`` with ``freeze: false``. They are there from the start, asleep: no product, no
gradient, no update.
"""

from __future__ import annotations

from math import comb
from typing import TYPE_CHECKING

from llmtrain.linear import LowRank
from llmtrain.methods.sparsity import StaticMask

if TYPE_CHECKING:
    from llmtrain.train.module import StepResult
    from llmtrain.train.trainer import Trainer


def density_loss(n: int, m: int) -> float:
    """Share of all weights that the second pruning of a random N:M mask takes (Theorem 2.2)."""
    s = n / m
    terms = (comb(m, j) * s**j * (1 - s) ** (m - j) * (j - n) / m for j in range(n + 1, m + 1))
    return sum(terms)


class Slope(StaticMask):
    """Double-pruned masks; adapters that wake up."""

    double = True
    _wake = 0
    _awake = False

    def prepare(self, trainer: Trainer) -> None:
        """Resolve the duration; adapters sleep until then."""
        super().prepare(trainer)
        times = trainer.clockwork
        self._wake = self.cfg.adapters_at.steps(times.tokens_per_step, times.total)
        self._set(trainer, trainer.step_done >= self._wake)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Wake the adapters when it is time."""
        if not self._awake and result.step >= self._wake and self._set(trainer, True):
            text = "sparsity.adapters_at: the low-rank adapters take part from here on"
            trainer.recorder.event(result.step, text)
        super().after_step(trainer, result)

    def _set(self, trainer: Trainer, awake: bool) -> int:
        """Put adapters to sleep or wake them; returns how many there are."""
        self._awake = awake
        found = [m for m in trainer.module.model.modules() if isinstance(m, LowRank)]
        for adapter in found:
            adapter.awake = awake
        return len(found)
