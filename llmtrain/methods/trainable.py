"""Freezing and thawing as training goes on: ``trainable`` (see ``model.trainable``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtrain.config.trainable import TrainableConfig
from llmtrain.model import Trainable
from llmtrain.train.hooks import Hook

if TYPE_CHECKING:
    from llmtrain.data.batch import Batch
    from llmtrain.train.trainer import Trainer


class PartialTraining(Hook):
    """Tells the module before each update which parameters it changes.

    What never trains is frozen when the module is built; nothing is kept in checkpoints.
    """

    def __init__(self, section: list[TrainableConfig]) -> None:
        self._plan: Trainable | None = None
        self._now: frozenset[str] | None = None

    def on_run_start(self, trainer: Trainer) -> None:
        self._plan = Trainable(trainer.cfg, trainer.module.model_cfg)

    def before_batch(self, trainer: Trainer, batch: Batch) -> None:
        assert self._plan is not None
        names = self._plan.at(trainer.step_done)
        if names != self._now:
            self._now = names
            trainer.module.train_only(names)
