"""Turning steps into records: console lines, metrics files, per-source counters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from llmtrain.checkpoint import Saved
from llmtrain.config.schema import RunConfig
from llmtrain.data.plan import DataPlan
from llmtrain.parallel import World
from llmtrain.train.clockwork import Clockwork
from llmtrain.train.console import Console, human, step_line
from llmtrain.train.metrics import Logger, Record
from llmtrain.train.module import StepSums
from llmtrain.train.throughput import Throughput, memory_bytes

if TYPE_CHECKING:
    from llmtrain.train.trainer import StepResult


class Recorder:
    """Counts on every rank, writes and prints on the main one.

    Methods that reduce over ranks (``step`` on logged steps) must be called by all ranks.
    """

    def __init__(
        self,
        cfg: RunConfig,
        world: World,
        plan: DataPlan,
        clockwork: Clockwork,
        throughput: Throughput,
        outputs: tuple[Console, Sequence[Logger]],
    ) -> None:
        self.cfg, self.world, self.plan, self.clockwork = cfg, world, plan, clockwork
        self.throughput = throughput
        self.console, self.loggers = outputs
        self._sums = torch.zeros(2, len(plan.names), dtype=torch.float64)
        self._waited = 0.0

    def begin(self, step_done: int) -> None:
        """Training starts (again) after update ``step_done``."""
        self.console.start_bar(step_done)
        self.throughput.start()

    def pause(self) -> None:
        """What follows is not training: stop the throughput's clock."""
        self.throughput.pause()

    def resume(self) -> None:
        """Training goes on."""
        self.throughput.start()

    def stop(self) -> None:
        """The run is over or broken off."""
        self.throughput.pause()
        self.console.stop_bar()

    def count(self, sums: StepSums) -> None:
        """Add a step's per-source sums."""
        self._sums[0] += sums.nll.cpu()
        self._sums[1] += sums.weight.cpu()

    def step(self, result: StepResult, waited: float) -> None:
        """Count a step and log it when due. waited: seconds the loader has stalled in all."""
        self.throughput.add(self.clockwork.tokens_per_step)
        self.console.advance(result.step)
        due = result.step % self.cfg.log.every == 0 or result.step == 1
        if not (due or result.step == self.clockwork.stop):
            return
        rate, mfu, seconds = self.throughput.read()
        sources = self._sources(result.step)
        (memory,) = self.world.max([float(memory_bytes(self.world.device))])
        record: Record = {
            "kind": "step",
            **self._position(result.step),
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "tokens_per_second": rate,
            "mfu": mfu,
            "memory_bytes": int(memory),
            "seconds": seconds,
            "data_seconds": waited - self._waited,
            "sources": sources,
        }
        self._waited = waited
        left = (self.clockwork.stop - result.step) * self.clockwork.tokens_per_step
        self._write(record)
        eta = self.throughput.eta_seconds(left)
        self.console.say(step_line(record, self.clockwork.total, eta))

    def evaluation(self, step: int, metrics: dict[str, dict[str, float]]) -> None:
        """Record a held-out evaluation. metrics: domain -> loss, perplexity, ..."""
        if not metrics:
            return
        mean = math.fsum(m["loss"] for m in metrics.values()) / len(metrics)
        position = self._position(step)
        self._write({"kind": "eval", **position, "domains": metrics, "mean_loss": mean})
        parts = []
        for name, m in metrics.items():
            bits = m.get("bits_per_byte")
            extra = "" if bits is None else f", {bits:.3f} bits/byte"
            parts.append(f"{name} {m['loss']:.4f} (ppl {m['perplexity']:.1f}{extra})")
        self.console.say(f"eval at step {step} | mean loss {mean:.4f} | " + " | ".join(parts))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Record a generated continuation."""
        self._write({"kind": "sample", **self._position(step), "prompt": prompt, "text": text})
        self.console.say(f"sample | {prompt}[...]{text}")

    def event(self, step: int, text: str, quiet: bool = False) -> None:
        """Record that something happened; printed unless ``quiet``."""
        self._write({"kind": "event", **self._position(step), "text": text})
        if not quiet:
            self.console.say(f"step {step} | {text}")

    def saved(self, saved: Saved) -> None:
        """Record a checkpoint that is complete on disk."""
        size = f"{human(saved.bytes)}B"
        text = f"checkpoint {saved.path.name} ({size}, training waited {saved.stall_seconds:.2f} s)"
        self.event(saved.step, text if saved.note is None else f"{text}; {saved.note}")

    def close(self) -> None:
        """Close the loggers."""
        for logger in self.loggers:
            logger.close()

    def _position(self, step: int) -> dict[str, int]:
        samples = step * self.cfg.train.global_batch_size
        return {"step": step, "tokens": samples * self.cfg.data.seq_len, "samples": samples}

    def _sources(self, step: int) -> dict[str, dict[str, Any]]:
        """Realised tokens and epochs per source since the start, and the loss since last time."""
        n = len(self.plan.names)
        reduced = self.world.sum(self._sums.flatten().tolist())
        self._sums.zero_()
        counts = self.plan.counts(step * self.cfg.train.global_batch_size)
        out: dict[str, dict[str, Any]] = {}
        for i, name in enumerate(self.plan.names):
            nll, weight = reduced[i], reduced[n + i]
            out[name] = {
                "tokens": int(counts[i]) * self.cfg.data.seq_len,
                "epochs": float(counts[i]) / max(self.plan.sizes[i], 1),
                "loss": nll / weight if weight > 0 else None,
            }
        return out

    def _write(self, record: Record) -> None:
        for logger in self.loggers:
            logger.write(record)
