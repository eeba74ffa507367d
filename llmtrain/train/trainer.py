"""The loop. One step of training, from top to bottom, is ``Trainer.step``."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmtrain.checkpoint import HOOK_PREFIX
from llmtrain.config.schema import RunConfig
from llmtrain.data.batch import Batch
from llmtrain.data.loader import Loader
from llmtrain.data.plan import DataPlan
from llmtrain.errors import Preempted
from llmtrain.parallel import World
from llmtrain.train.clockwork import Clockwork
from llmtrain.train.evaluation import Evaluation
from llmtrain.train.guard import Guard
from llmtrain.train.hooks import Hook
from llmtrain.train.module import StepResult, TrainModule
from llmtrain.train.recorder import Recorder
from llmtrain.train.replay import Measured, judge_again, keep_samples
from llmtrain.train.replicas import verify_replicas
from llmtrain.train.saver import Saver
from llmtrain.train.signals import SignalWatch
from llmtrain.train.watchdog import Watchdog


class Trainer:
    """Drives a run from its parts. ``step_done`` updates are behind it."""

    def __init__(
        self,
        cfg: RunConfig,
        world: World,
        module: TrainModule,
        plan: DataPlan,
        hooks: Sequence[Hook],
        services: Services,
    ) -> None:
        self.cfg, self.world, self.module, self.plan = cfg, world, module, plan
        self.hooks = list(hooks)
        self.clockwork = services.clockwork
        self.evaluation, self.recorder = services.evaluation, services.recorder
        self.saver = services.saver
        self.watch = services.watch
        self.guard = Guard(cfg.guard)
        self.schedule = module.schedule(self.clockwork.total)
        self.step_done = 0
        self.last_evaluation: dict[str, dict[str, float]] = {}

    def run(self, signals: SignalWatch) -> None:
        """Train to the end. Raises Preempted after a signal (saved), GuardStop (not saved)."""
        for hook in self.hooks:
            hook.prepare(self)
        for hook in self.hooks:
            hook.on_run_start(self)
        automatic = gc.isenabled()
        if self.cfg.train.gc_every:
            gc.disable()
        try:
            self._loop(signals)
        finally:
            if automatic:
                gc.enable()
            self.recorder.stop()

    def _loop(self, signals: SignalWatch) -> None:
        layout = self.module.layout
        loader = Loader.from_config(self.plan, self.cfg, layout.data_rank, layout.degrees.data)
        times = self.clockwork
        batches: Iterator[Batch] = loader.iterate(self.step_done, times.stop)
        self.recorder.begin(self.step_done)
        self.watch.begin(self.step_done)
        try:
            for batch in batches:
                result, stop = self.step(batch, signals)
                self.watch.at("log")
                self.recorder.step(result, loader.wait_seconds)
                self._collect()
                if self.cfg.train.gc_every and result.step % self.cfg.train.gc_every == 0:
                    gc.collect()
                if stop and result.step != times.stop:
                    self._leave(signals)
                if times.evaluates(result.step):
                    self.evaluate()
                if times.verifies(result.step):
                    self.watch.at("checkpoint")
                    verify_replicas(self.module.tensors(), self.world, result.step)
                if times.saves(result.step) and result.step != times.stop:
                    self.save()
                elif times.snaps(result.step) and result.step != times.stop:
                    self.snap()
                self.watch.at("data")
        finally:
            loader.close()
        self.watch.at("end")
        for hook in self.hooks:
            hook.on_run_end(self)
        if not self.saver.has(self.step_done):
            self.save(final=True)
        self._finish_saving()

    def _leave(self, signals: SignalWatch) -> None:
        """Save and raise Preempted. Evaluation waits: the time to leave is short."""
        self.save()
        self._finish_saving()
        again = "Run the same command again to go on"
        if self.cfg.checkpoint.resume == "never":
            again += ", with --resume auto"
        raise Preempted(
            f"{signals.received or 'a signal on another rank'} arrived; step {self.step_done} "
            f"was finished and saved. {again}"
        )

    def step(self, batch: Batch, signals: SignalWatch) -> tuple[StepResult, bool]:
        """One optimizer update from this rank's part of the global batch.

        Returns the result and whether any rank was told to stop.
        """
        batch = self.module.receive(batch)
        for hook in self.hooks:
            hook.before_batch(self, batch)
        self.watch.at("exchange")
        weight, told = self.world.sum([self.module.token_weight(batch), signals.pending])
        done = self._compute(batch, weight)
        step = self.step_done + 1
        if self.guard.suspects(done.loss, float(done.norm)) and self._replays:
            done = self._replay(batch, weight, done)
        sums, loss, norm = done.sums, done.loss, done.norm
        verdict = self.guard.judge(step, loss, float(norm), self._sample_range(step))
        lr = self.cfg.optim.lr * self.schedule.factor(self.step_done)
        self.watch.at("update")
        if verdict.skip:
            self.module.drop_gradients()
        else:
            self.module.update(norm, lr)
        self.step_done = step
        self.recorder.count(sums, batch, skipped=verdict.skip)
        if verdict.event:
            self.recorder.event(step, verdict.event)
        result = StepResult(step, loss, float(norm), lr, weight, verdict.skip)
        self.watch.at("hooks", step)
        for hook in self.hooks:
            hook.after_step(self, result)
        return result, told > 0

    def _compute(self, batch: Batch, weight: float) -> Measured:
        """Forward, backward, and the global loss and gradient norm. weight: of the global batch."""
        self.watch.at("forward and backward")
        sums = self.module.forward_backward(batch, max(weight, 1e-9), len(self.plan.names))
        for hook in self.hooks:
            hook.after_backward(self)
        self.watch.at("norm")
        norm = self.module.gradient_norm()
        self.watch.at("loss")
        (loss,) = self.world.sum([float(sums.loss)])
        # Equal on all ranks to the last bit, or they might come to different verdicts.
        norm.fill_(self.world.max([float(norm)])[0])
        return Measured(sums, loss, norm)

    @property
    def _replays(self) -> bool:
        return self.cfg.guard.replay and self.cfg.parallel.engine == "native"

    def _replay(self, batch: Batch, weight: float, first: Measured) -> Measured:
        """Make a suspicious step again before it is judged; what was found is an event."""

        def compute(batch: Batch) -> Measured:
            self.module.drop_gradients()
            return self._compute(batch, weight)

        keep_samples(self, batch, Path(self.cfg.out) / self.cfg.name / "suspicious")
        done, finding = first, "not made again: a hook has changed the model in it"
        if all(hook.repeatable(self) for hook in self.hooks):
            done, finding = judge_again(self, batch, first, compute)
        self.recorder.event(self.step_done + 1, f"suspicious step: {finding}")
        return done

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Held-out loss per domain, recorded and handed to the hooks."""
        self.recorder.pause()
        self.watch.at("evaluation")
        metrics = self.last_evaluation = self.evaluation.run(self.module)
        self.recorder.evaluation(self.step_done, metrics)
        for hook in self.hooks:
            hook.on_eval(self, metrics)
        self.recorder.resume()
        return metrics

    def save(self, final: bool = False) -> None:
        """Checkpoint now (in the background when configured so)."""
        self.recorder.pause()
        self.watch.at("checkpoint")
        for hook in self.hooks:
            hook.on_checkpoint(self)
        permanent = final or self.clockwork.keeps(self.step_done)
        tensors = self.module.tensors() | self.hook_tensors()
        self.saver.save(self.step_done, tensors, self.state_dict(), permanent)
        self.recorder.resume()

    def snap(self) -> None:
        """Snapshot to the node's memory; the first state of a run becomes a checkpoint, on which
        snapshots stand."""
        if not self.saver.has_any:
            self.save()
            return
        self.recorder.pause()
        self.watch.at("checkpoint")
        for hook in self.hooks:
            hook.on_checkpoint(self)
        tensors = self.module.tensors() | self.hook_tensors()
        problem = self.saver.snap(self.step_done, tensors, self.state_dict())
        if problem is not None:
            self.recorder.trouble(self.step_done, problem)
        self.recorder.resume()

    def hook_tensors(self) -> dict[str, Tensor]:
        """What the hooks keep in a checkpoint, as ``hook.<key>.<name>``."""
        found: dict[str, Tensor] = {}
        for i, hook in enumerate(self.hooks):
            for name, value in hook.tensors(self).items():
                found[f"{HOOK_PREFIX}{self._hook_key(i)}.{name}"] = value
        return found

    def state_dict(self) -> dict[str, Any]:
        """State beside tensors and data position: guard and hooks, as JSON values."""
        return {
            "guard": self.guard.state_dict(),
            "recorder": self.recorder.state_dict(),
            "hooks": {self._hook_key(i): h.state_dict() for i, h in enumerate(self.hooks)},
        }

    def _finish_saving(self) -> None:
        saved = self.saver.wait()
        if saved is not None:
            self.recorder.saved(saved)
        for copied in self.saver.copied(last=True):
            self.recorder.copied(self.step_done, copied)

    def _collect(self) -> None:
        """Report a background save that has reached the disk; raises when it failed."""
        saved = self.saver.poll()
        if saved is not None:
            self.recorder.saved(saved)
        for copied in self.saver.copied():
            self.recorder.copied(self.step_done, copied)

    def load_state_dict(self, step: int, state: dict[str, Any]) -> None:
        """Continue after update ``step`` with ``state`` of its checkpoint."""
        self.step_done = step
        self.guard.load_state_dict(state["guard"])
        self.recorder.load_state_dict(state["recorder"])
        for i, hook in enumerate(self.hooks):
            if self._hook_key(i) in state["hooks"]:
                hook.load_state_dict(state["hooks"][self._hook_key(i)])

    def _hook_key(self, index: int) -> str:
        section = self.hooks[index].section
        if section is not None:
            return section
        kind = type(self.hooks[index])
        earlier = sum(type(h) is kind for h in self.hooks[:index])
        return f"{kind.__module__}:{kind.__qualname__}#{earlier}"

    def _sample_range(self, step: int) -> str:
        size = self.cfg.train.global_batch_size
        return f"samples {(step - 1) * size}..{step * size - 1}"


@dataclass(frozen=True)
class Services:
    """The loop's helpers: when things are due, evaluation, records and checkpoints."""

    clockwork: Clockwork
    evaluation: Evaluation
    recorder: Recorder
    saver: Saver
    watch: Watchdog
