"""Movement pruning: what finetuning moves towards zero goes (Sanh et al. 2020, 2005.07683).

Every weight has a score, forward computes with the mask of the scores, and the loss trains both,
the scores straight through the mask (eq. 2):

    a = (W * M(S)) x,    dL/dS = dL/d(W * M) * W,    S <- S - score_rate dL/dS

so that a score falls where a weight moves towards zero, whatever its magnitude. Blocks have one
score for all their weights, the sum of theirs (block pruning, Lagunas et al. 2021, 2109.04838).
Kept are the largest scores of each layer, at a density that falls on the cubic of gradual pruning
from 1 at ``start`` to ``density`` at ``end``; or, with ``threshold``, those of sigmoid(S) >
threshold (soft movement pruning), under a penalty score_decay mean(sigmoid(S)) that grows on the
same cubic. Weights outside the mask get no gradient and keep their values, since the scores may
bring them back; after ``end`` the mask stays and they are zeros. Scores are trained by gradient
descent as the equation says, by the gradients of the whole global batch before clipping; they begin
at zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmtrain.config.sparsity import SparsityConfig
from llmtrain.methods.live import LiveMask
from llmtrain.parallel import whole
from llmtrain.sparsity import Masks, Timetable, block_sums, largest

if TYPE_CHECKING:
    from llmtrain.train.module import StepResult
    from llmtrain.train.trainer import Trainer


def score_gradient(product: Tensor, scores: Tensor, block: tuple[int, int], pull: float) -> Tensor:
    """dL/dS of blocks, float32. product: dL/d(W * M) * W of a whole matrix; pull: the penalty on
    mean(sigmoid(S))."""
    found = block_sums(product, block)
    if pull:
        share = scores.sigmoid()
        found = found + pull * share * (1 - share) / scores.numel()
    return found


class Movement(LiveMask):
    """Scores that learn, and their masks."""

    _times: Timetable

    def __init__(self, cfg: SparsityConfig) -> None:
        super().__init__(cfg)
        self._learnt: dict[str, Tensor] = {}

    def prepare(self, trainer: Trainer) -> None:
        """Resolve the durations."""
        run = trainer.clockwork
        self._times = Timetable.of(self.cfg, run.tokens_per_step, run.total)
        self.settled = trainer.step_done >= self._times.end
        super().prepare(trainer)

    def first(self, trainer: Trainer, masks: Masks) -> None:
        """Nothing is pruned yet."""
        masks.keep_all()

    def settle(self, trainer: Trainer, masks: Masks) -> None:
        """Zeros once the mask stays, see ``LiveMask``."""
        if self.settled:
            self.zero(trainer, masks.layers)
        else:
            super().settle(trainer, masks)

    def scores(self, masks: Masks) -> dict[str, Tensor]:
        """Of whole layers, one a block, equal on all ranks."""
        if not masks.scored:
            for name, layer in masks.sparse.items():
                grid = layer.granularity.grid(layer.shape)
                masks.scored[name] = torch.zeros(grid, device=masks.device)
        return masks.scored

    def after_backward(self, trainer: Trainer) -> None:
        """What scores learn; then gradients of what is pruned go."""
        if self.dropped or self.settled:
            super().after_backward(trainer)
            return
        masks = self.make(trainer)
        pull = self.cfg.score_decay * (1 - self._left(trainer.step_done))
        for name, scores in self.scores(masks).items():
            param = masks.params[name]
            if param.grad is None:
                continue
            product = whole(param.grad * param.detach())
            block = masks.sparse[name].granularity.block
            self._learnt[name] = score_gradient(product, scores, block, pull)
        self.mask_gradients(masks)

    def _left(self, step: int) -> float:
        """The cubic from 1 at ``start`` to 0 at ``end``."""
        return self._times.density(0.0, step)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Scores change with the weights; new masks when it is time, the last one at ``end``."""
        step, learnt = result.step, self._learnt
        self._learnt = {}
        if not result.skipped:
            for name, change in learnt.items():
                self.scores(self.make(trainer))[name].sub_(change, alpha=self.cfg.score_rate)
        if not self.dropped and not self.settled and self._times.due(step):
            self._prune(trainer, step)
            if step == self._times.end:
                self.end(trainer)
        super().after_step(trainer, result)

    def _prune(self, trainer: Trainer, step: int) -> None:
        masks = self.make(trainer)
        kept = blocks = 0
        for name, scores in self.scores(masks).items():
            density = masks.sparse[name].density
            if self.cfg.threshold is None:
                share = density + (1 - density) * self._left(step)
                new = largest(scores, round(share * scores.numel()))
            else:
                new = scores.sigmoid() > self.cfg.threshold
            masks.take_whole(name, new)
            kept, blocks = kept + int(new.sum()), blocks + new.numel()
        masks.install(self.seed(trainer))
        self.count_flops(trainer, step)
        text = f"the scores keep {kept / max(blocks, 1):.1%} of the blocks"
        trainer.recorder.event(step, text, quiet=True)

    def tensors(self, trainer: Trainer) -> dict[str, Tensor]:
        """Masks, and scores as ``scores.<layer>``."""
        found = super().tensors(trainer)
        if found:
            scores = self.scores(self.make(trainer))
            found = found | {f"scores.{name}": value for name, value in scores.items()}
        return found
