"""The switch of number formats during training: ``quantization.until``.

The last part of a run in a higher precision recovers most of what a low one costs (torchtitan's
notes on NVFP4; its layers switch shortly before the learning rate decays). The switch is a
function of the step alone, so a resumed run, and an evaluation of a checkpoint, compute as the
run did.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtrain.config.number_formats import QuantizationConfig
from llmtrain.model import clear_formats, switch_step
from llmtrain.train.hooks import Hook

if TYPE_CHECKING:
    from llmtrain.train.module import StepResult
    from llmtrain.train.trainer import Trainer


class QuantizationSwitch(Hook):
    """Sets hidden layers, keys and values to the compute dtype once ``until`` is reached."""

    def __init__(self, section: QuantizationConfig) -> None:
        self._at: int | None = None
        self._done = False

    def on_run_start(self, trainer: Trainer) -> None:
        self._at = switch_step(trainer.cfg)
        self._switch(trainer, trainer.step_done, resumed=True)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self._switch(trainer, result.step, resumed=False)

    def _switch(self, trainer: Trainer, step: int, resumed: bool) -> None:
        if self._done or self._at is None or step < self._at:
            return
        self._done = True
        clear_formats(trainer.module.model)
        if not resumed:
            message = "quantization.until: products are in the compute dtype from here on"
            trainer.recorder.event(step, message)
