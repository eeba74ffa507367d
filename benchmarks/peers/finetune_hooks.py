"""The hook through which ``finetune.py`` looks at a real ``llmtrain train``."""

from __future__ import annotations

from finetune_job import FinetuneJob

from llmtrain.train.hooks import Hook
from llmtrain.train.trainer import StepResult, Trainer


class Stamps(Hook):
    """Notes when each step ends, and how many tokens counted in its loss."""

    def __init__(self) -> None:
        self.job = FinetuneJob()

    def on_run_start(self, trainer: Trainer) -> None:
        self.job.begin()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self.job.losses.append(result.loss)
        self.job.useful.append(round(result.weight))
        self.job.stamp()

    def on_run_end(self, trainer: Trainer) -> None:
        params = trainer.module.params.values()
        self.job.finish(sum(p.numel() for p in params if p.requires_grad))
