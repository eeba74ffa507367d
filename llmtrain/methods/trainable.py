"""Freezing and thawing as training goes on: ``trainable`` (see ``model.trainable``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtrain.config.trainable import TrainableConfig
from llmtrain.model import Trainable
from llmtrain.optim import FrozenRows, create_state
from llmtrain.train.hooks import Hook

if TYPE_CHECKING:
    from llmtrain.data.batch import Batch
    from llmtrain.train.module import TrainModule
    from llmtrain.train.trainer import Trainer


class PartialTraining(Hook):
    """Tells the module before each update which parameters it changes, and which rows of them.

    What never trains is frozen when the module is built; nothing is kept in checkpoints.
    """

    def __init__(self, section: list[TrainableConfig]) -> None:
        self._plan: Trainable | None = None
        self._rows: FrozenRows | None = None
        self._now: tuple[frozenset[str], dict[str, tuple[bool, ...]]] | None = None

    def on_run_start(self, trainer: Trainer) -> None:
        module = trainer.module
        self._plan = Trainable(trainer.cfg, module.model_cfg)
        if any(rule.half_by == "matrix" for rule in trainer.cfg.trainable):
            self._rows = FrozenRows(module.optimizer, module.params)

    def before_batch(self, trainer: Trainer, batch: Batch) -> None:
        assert self._plan is not None
        step = trainer.step_done
        names = self._plan.at(step)
        rows = {} if self._rows is None else self._plan.frozen_rows(step)
        if (names, rows) == self._now:
            return
        self._now = names, rows
        trainer.module.train_only(names)
        if self._rows is None:
            return
        self._rows.choose(rows)
        # Of the step before by the plan, not by what this process has seen: it may have resumed.
        before = self._plan.frozen_rows(step - 1) if step else rows
        changed = {name for name in rows.keys() | before if rows.get(name) != before.get(name)}
        self._begin_anew(trainer.module, changed & names)

    def _begin_anew(self, module: TrainModule, names: set[str]) -> None:
        """New moments: one count of steps serves all rows of a parameter, so those that thaw and
        those that went on begin together."""
        for name in names & module.params.keys():
            module.optimizer.state.pop(module.params[name], None)
            create_state(module.optimizer, [module.params[name]])

    def after_backward(self, trainer: Trainer) -> None:
        if self._rows is not None:
            self._rows.mask_gradients()
