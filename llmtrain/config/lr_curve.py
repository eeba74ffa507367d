"""Learning-rate schedules: a pure function of the step, so there is no state to lose."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace

from llmtrain.config.schema import ScheduleConfig

DECAYING = ("wsd", "infinite")


@dataclass(frozen=True)
class Schedule:
    """Factor on the peak learning rate for each step of the run.

    warmup, decay, total: optimizer steps. Step numbers start at 0 and name the update about to
    be made. Warmup is linear from 1/warmup, so that no update has learning rate zero.
    restarts: steps, in order, at which the whole shape begins anew and runs to the next one:
    re-warming and re-decaying (Ibrahim et al. 2024, 2403.08763).
    """

    name: str
    warmup: int
    total: int
    min_factor: float
    decay: int = 0
    decay_shape: str = "linear"
    cooldown: int = 0
    cooldown_shape: str = "cosine"
    constant_factor: float = 1.0
    restarts: tuple[int, ...] = ()

    @classmethod
    def from_config(cls, cfg: ScheduleConfig, total: int, tokens_per_step: int) -> Schedule:
        """Resolve the durations of ``cfg`` for a run of ``total`` steps."""
        return cls(
            name=cfg.name,
            warmup=cfg.warmup.steps(tokens_per_step, total),
            total=total,
            min_factor=cfg.min_factor,
            decay=cfg.decay.steps(tokens_per_step, total) if cfg.name in DECAYING else 0,
            decay_shape=cfg.decay_shape,
            cooldown=cfg.cooldown.steps(tokens_per_step, total) if cfg.name == "infinite" else 0,
            cooldown_shape=cfg.cooldown_shape,
            constant_factor=cfg.constant_factor,
            restarts=tuple(at.steps(tokens_per_step, total) for at in cfg.restarts),
        )

    def factor(self, step: int) -> float:
        """Learning rate of update ``step`` over the peak, in [0, 1]."""
        if self.restarts:
            ends = (0, *self.restarts, self.total)
            place = max(bisect_right(ends[:-1], step) - 1, 0)
            one = replace(self, restarts=(), total=ends[place + 1] - ends[place])
            return one.factor(step - ends[place])
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.name == "constant":
            return 1.0
        if self.name == "inverse_sqrt":
            return max(math.sqrt(max(self.warmup, 1) / (step + 1)), self.min_factor)
        if self.name == "wsd":
            return self._wsd(step)
        if self.name == "infinite":
            return self._infinite(step)
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

    def _infinite(self, step: int) -> float:
        """Warmup, cooldown to a constant rate, that rate for any length, annealing at the end.

        2403.08763, section 5.4: the constant rate c is where training goes on with new data
        without warming up again; annealing is c (min / c)^progress over the last ``decay`` steps.
        The inverse square root is a + b / sqrt(1 + t) from the peak at t = 0 to c at its end.
        """
        anneal = max(self.total - self.decay, self.warmup + self.cooldown)
        if step < anneal:
            return self._before_annealing(step)
        left = max(self.min_factor, 1e-3) / self.constant_factor
        return float(self.constant_factor * left ** self._progress(step, anneal))

    def _before_annealing(self, step: int) -> float:
        """Cooldown from the peak, then the constant factor."""
        done = step + 1 - self.warmup
        if done >= self.cooldown:
            return self.constant_factor
        drop = 1.0 - self.constant_factor
        if self.cooldown_shape == "cosine":
            return 1.0 - drop * 0.5 * (1.0 - math.cos(math.pi * done / self.cooldown))
        last = 1.0 / math.sqrt(1.0 + self.cooldown)
        return 1.0 - drop * (1.0 - 1.0 / math.sqrt(1.0 + done)) / (1.0 - last)
