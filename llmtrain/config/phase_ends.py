"""Where the phases of a mixture end: at a time, or where the learning rate has fallen so far."""

from __future__ import annotations

from llmtrain.config.lr_curve import Schedule
from llmtrain.config.schema import PhaseConfig, RunConfig

# The curve's last bits may differ between machines; the step of a switch may not.
_SLACK = 1e-9


def phase_end(cfg: RunConfig, phase: PhaseConfig, total: int) -> int:
    """Global sample at which ``phase`` ends in a run of ``total`` steps.

    A phase with ``until_lr`` ends before the first update whose learning rate is at most that part
    of the peak, beyond the warmup; where there is none, with the run.
    """
    batch = cfg.train.global_batch_size
    if phase.until_lr is None:
        return phase.until.samples(cfg.data.seq_len, batch, total)
    return lr_step(cfg, phase.until_lr, total) * batch


def lr_step(cfg: RunConfig, level: float, total: int) -> int:
    """First update (from 0) after the warmup at or below ``level`` times the peak, or ``total``."""
    curve = Schedule.from_config(
        cfg.schedule, total, cfg.train.global_batch_size * cfg.data.seq_len
    )
    low, high = min(curve.warmup, total), total
    if curve.restarts:  # the curve rises again
        reached = (at for at in range(low, total) if curve.factor(at) <= level * (1 + _SLACK))
        return next(reached, total)
    while low < high:  # the curve never rises after the warmup
        middle = (low + high) // 2
        if curve.factor(middle) <= level * (1 + _SLACK):
            high = middle
        else:
            low = middle + 1
    return low


def end_text(phase: PhaseConfig) -> str:
    """How the config says where a phase ends."""
    return str(phase.until) if phase.until_lr is None else f"until_lr {phase.until_lr:g}"
