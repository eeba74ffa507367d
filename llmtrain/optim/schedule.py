"""Learning-rate schedules: a pure function of the step, so there is no state to lose."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmtrain.config.schema import ScheduleConfig


@dataclass(frozen=True)
class Schedule:
    """Factor on the peak learning rate for each step of the run.

    warmup, decay, total: optimizer steps. Step numbers start at 0 and name the update about to
    be made. Warmup is linear from 1/warmup, so that no update has learning rate zero.
    """

    name: str
    warmup: int
    total: int
    min_factor: float
    decay: int = 0
    decay_shape: str = "linear"

    @classmethod
    def from_config(cls, cfg: ScheduleConfig, total: int, tokens_per_step: int) -> Schedule:
        """Resolve the durations of ``cfg`` for a run of ``total`` steps."""
        return cls(
            name=cfg.name,
            warmup=cfg.warmup.steps(tokens_per_step, total),
            total=total,
            min_factor=cfg.min_factor,
            decay=cfg.decay.steps(tokens_per_step, total) if cfg.name == "wsd" else 0,
            decay_shape=cfg.decay_shape,
        )

    def factor(self, step: int) -> float:
        """Learning rate of update ``step`` over the peak, in [0, 1]."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.name == "constant":
            return 1.0
        if self.name == "inverse_sqrt":
            return max(math.sqrt(max(self.warmup, 1) / (step + 1)), self.min_factor)
        if self.name == "wsd":
            return self._wsd(step)
        progress = self._progress(step, self.warmup)
        if self.name == "cosine":
            shape = 0.5 * (1.0 + math.cos(math.pi * progress))
        else:
            shape = 1.0 - progress
        return self.min_factor + (1.0 - self.min_factor) * shape

    def _progress(self, step: int, start: int) -> float:
        """Fraction of [start, total) done when update ``step`` has been made."""
        return min((step + 1 - start) / max(self.total - start, 1), 1.0)

    def _wsd(self, step: int) -> float:
        """Warmup, stable, decay (MiniCPM, 2404.06395; 1-sqrt: Haegele et al., 2405.18392)."""
        start = max(self.total - self.decay, self.warmup)
        if step < start:
            return 1.0
        progress = self._progress(step, start)
        if self.decay_shape == "exponential":
            return float(max(self.min_factor, 1e-3) ** progress)
        left = 1.0 - (math.sqrt(progress) if self.decay_shape == "1-sqrt" else progress)
        return self.min_factor + (1.0 - self.min_factor) * left
