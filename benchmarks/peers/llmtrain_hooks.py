"""Hooks through which ``cpu_peers.py`` looks at a real ``llmtrain train``."""

from __future__ import annotations

import json
import time

from shape import Job

from llmtrain.data.batch import Batch
from llmtrain.train.hooks import Hook
from llmtrain.train.trainer import StepResult, Trainer


def _parameters(trainer: Trainer) -> int:
    return sum(p.numel() for p in trainer.module.params.values())


class Stamps(Hook):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.job = Job()
        self.losses: list[float] = []

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self.losses.append(result.loss)
        self.job.stamp()

    def on_run_end(self, trainer: Trainer) -> None:
        losses = [self.losses[0], self.losses[-1]]
        formats = "bf16, fp32 masters" if self.job.bf16 else "fp32"
        self.job.finish(_parameters(trainer), losses, f"llmtrain train, {formats}")


class Overhead(Hook):
    """After each real step makes a bare one on the same model, and times both.

    Real: everything between two bare steps: loader, step, guard, records. Bare: forward,
    backward, clipping and update, without anything around them. The record of a real step is
    written after this hook, so it counts towards the next pair.
    """

    def __init__(self) -> None:
        self.job = Job()
        self.batch: Batch | None = None
        self.pairs: dict[str, list[tuple[float, float]]] = {"wall": [], "cpu": []}
        self.since = (0.0, 0.0)

    @staticmethod
    def now() -> tuple[float, float]:
        """Wall and CPU seconds."""
        return time.perf_counter(), time.process_time()

    def on_run_start(self, trainer: Trainer) -> None:
        self.since = self.now()

    def before_batch(self, trainer: Trainer, batch: Batch) -> None:
        self.batch = batch

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        begin = self.now()
        self.bare_step(trainer, result.lr)
        end = self.now()
        for i, clock in enumerate(("wall", "cpu")):
            self.pairs[clock].append((begin[i] - self.since[i], end[i] - begin[i]))
        self.since = self.now()

    def bare_step(self, trainer: Trainer, lr: float) -> None:
        """Forward, backward, clip, update: the arithmetic of a step and nothing else."""
        module, batch = trainer.module, self.batch
        assert batch is not None
        module.loss(batch, float(batch.weights.sum())).loss.backward()  # type: ignore[no-untyped-call]
        norm = module.gradient_norm()
        module.update(norm, lr)

    def on_run_end(self, trainer: Trainer) -> None:
        self.job.out.write_text(json.dumps(self.pairs))
