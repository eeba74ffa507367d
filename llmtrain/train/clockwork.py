"""When things are due: total steps, evaluations, checkpoints; pure functions of the step."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.config.duration import Duration
from llmtrain.config.schema import RunConfig


@dataclass(frozen=True)
class Clockwork:
    """All in optimizer steps. total: the run's length; stop: where this process stops."""

    total: int
    stop: int
    eval_every: int | None
    save_every: int | None
    keep_every: int | None
    tokens_per_step: int
    keep_at: frozenset[int] = frozenset()
    verify_every: int | None = None
    snapshot_every: int | None = None

    @classmethod
    def from_config(cls, cfg: RunConfig) -> Clockwork:
        """Resolve the durations of ``cfg``."""
        tokens = cfg.train.global_batch_size * cfg.data.seq_len
        total = max(cfg.train.duration.steps(tokens), 1)

        def steps(duration: Duration | None) -> int | None:
            return None if duration is None else max(duration.steps(tokens, total), 1)

        stop = steps(cfg.train.stop_after) or total
        return cls(
            total=total,
            stop=min(stop, total),
            eval_every=steps(cfg.eval.every),
            save_every=steps(cfg.checkpoint.every),
            keep_every=steps(cfg.checkpoint.permanent_every),
            tokens_per_step=tokens,
            verify_every=steps(cfg.train.verify_replicas),
            snapshot_every=steps(cfg.checkpoint.snapshot_every),
            keep_at=frozenset(max(at.steps(tokens, total), 1) for at in cfg.checkpoint.keep_at),
        )

    def evaluates(self, step: int) -> bool:
        """Evaluate after update ``step``? Always after the last one."""
        return step == self.stop or (self.eval_every is not None and step % self.eval_every == 0)

    def saves(self, step: int) -> bool:
        """Save after update ``step``?"""
        due = self.save_every is not None and step % self.save_every == 0
        return due or self.keeps(step)

    def verifies(self, step: int) -> bool:
        """Compare the copies of the weights after update ``step``?"""
        return self.verify_every is not None and step % self.verify_every == 0

    def snaps(self, step: int) -> bool:
        """Take a snapshot in memory after update ``step``?"""
        return self.snapshot_every is not None and step % self.snapshot_every == 0

    def keeps(self, step: int) -> bool:
        """Is the checkpoint of update ``step`` permanent?"""
        every = self.keep_every is not None and step % self.keep_every == 0
        return every or step in self.keep_at
