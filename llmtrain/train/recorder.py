"""Turning steps into records: console lines, metrics files, per-source counters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from llmtrain.checkpoint import Saved
from llmtrain.checkpoint.remote import Copied
from llmtrain.config.schema import RunConfig
from llmtrain.data.batch import Batch
from llmtrain.data.plan import DataPlan
from llmtrain.parallel import Layout
from llmtrain.train.clockwork import Clockwork
from llmtrain.train.console import Console, human, step_line
from llmtrain.train.metrics import Logger, Record
from llmtrain.train.module import StepResult, StepSums
from llmtrain.train.stragglers import Stopwatch, Stragglers
from llmtrain.train.throughput import Throughput, memory_bytes


class Recorder:
    """Counts on every rank, writes and prints on the main one.

    Methods that reduce over ranks (``step`` on logged steps) must be called by all ranks.
    """

    def __init__(
        self,
        cfg: RunConfig,
        layout: Layout,
        plan: DataPlan,
        clockwork: Clockwork,
        throughput: Throughput,
        outputs: tuple[Console, Sequence[Logger]],
    ) -> None:
        self.cfg, self.layout, self.plan, self.clockwork = cfg, layout, plan, clockwork
        self.world = layout.world
        self.throughput = throughput
        self.stopwatch = Stopwatch(self.world)
        self._slow: list[int] = []
        self._named: list[int] = []
        self.console, self.loggers = outputs
        # Rows: weighted loss, weight (since the last log line), samples (since the start).
        n = len(plan.names)
        self._sums = torch.zeros(2, n, dtype=torch.float64, device=self.world.device)
        self._seen = torch.zeros(n, dtype=torch.float64, device=self.world.device)
        self._before: dict[str, dict[str, float]] = {}
        self._waited = 0.0
        self._noted: dict[str, float] = {}

    def begin(self, step_done: int) -> None:
        """Training starts (again) after update ``step_done``."""
        self.console.start_bar(step_done)
        self.throughput.start()
        self.stopwatch.begin()

    def pause(self) -> None:
        """What follows is not training: stop the throughput's clock."""
        self.throughput.pause()
        self.stopwatch.pause()

    def resume(self) -> None:
        """Training goes on."""
        self.throughput.start()
        self.stopwatch.resume()

    def stop(self) -> None:
        """The run is over or broken off."""
        self.throughput.pause()
        self.stopwatch.end()
        self.console.stop_bar()

    def count(self, sums: StepSums, batch: Batch, skipped: bool) -> None:
        """Add a step of this rank: what it read and, unless skipped, its losses by source."""
        if self.layout.counts_samples:
            ones = torch.ones(len(batch), dtype=torch.float64, device=batch.source_ids.device)
            self._seen.index_add_(0, batch.source_ids, ones)
        if not skipped:
            self._sums[0] += sums.nll
            self._sums[1] += sums.weight

    def state_dict(self) -> dict[str, Any]:
        """Counters over all ranks, by source, as JSON values. Collective."""
        return {"sources": self._reduced()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self._before = state["sources"]

    def due(self, step: int) -> bool:
        """Whether update ``step`` is logged."""
        return step % self.cfg.log.every == 0 or step in (1, self.clockwork.stop)

    def note(self, name: str, value: float) -> None:
        """A method's own number of the step that is being made, for its record."""
        self._noted[name] = value

    def step(self, result: StepResult, waited: float) -> None:
        """Count a step and log it when due. waited: seconds the loader has stalled in all."""
        self.throughput.add(self.clockwork.tokens_per_step)
        self.console.advance(result.step)
        if not self.due(result.step):
            return
        rate, mfu, seconds = self.throughput.read()
        ranks = self.stopwatch.read()
        sources = self._sources()
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
        if self._noted:
            record["method"], self._noted = self._noted, {}
        self._waited = waited
        if ranks is not None:
            record["ranks"] = ranks.record()
        left = (self.clockwork.stop - result.step) * self.clockwork.tokens_per_step
        self._write(record)
        eta = self.throughput.eta_seconds(left)
        self.console.say(step_line(record, self.clockwork.total, eta))
        if ranks is not None:
            self._name_slow(result.step, ranks)

    def _name_slow(self, step: int, ranks: Stragglers) -> None:
        """An event when ranks are slow twice running and were not before."""
        slow = ranks.slow(self.cfg.train.watchdog.slow)
        again = [rank for rank in slow if rank in self._slow]
        if again and again != self._named:
            factors = ranks.factors()
            named = ", ".join(f"rank {r} ({factors[r]:.2f} x)" for r in again[:8])
            self.event(
                step,
                f"slow: {named} against the median; the others wait most for rank {ranks.awaited}",
            )
        self._slow, self._named = slow, again

    def evaluation(
        self, step: int, metrics: dict[str, dict[str, float]], weights: str | None = None
    ) -> None:
        """Record a held-out evaluation. metrics: domain -> loss, perplexity, ...

        weights: name of weights other than those in training that were evaluated.
        """
        if not metrics:
            return
        mean = math.fsum(m["loss"] for m in metrics.values()) / len(metrics)
        record: Record = {"kind": "eval", **self._position(step), "domains": metrics}
        if weights is not None:
            record.update(kind="eval_of", weights=weights)
        self._write({**record, "mean_loss": mean})
        parts = []
        for name, m in metrics.items():
            bits = m.get("bits_per_byte")
            extra = "" if bits is None else f", {bits:.3f} bits/byte"
            parts.append(f"{name} {m['loss']:.4f} (ppl {m['perplexity']:.1f}{extra})")
        what = "eval" if weights is None else f"eval of {weights}"
        self.console.say(f"{what} at step {step} | mean loss {mean:.4f} | " + " | ".join(parts))

    def mixture(
        self,
        step: int,
        weights: dict[str, float],
        losses: dict[str, float],
        mean: dict[str, float],
    ) -> None:
        """Record weights that take over after ``step``, what they follow from, and their mean."""
        record: Record = {"kind": "mixture", **self._position(step)}
        self._write({**record, "weights": weights, "losses": losses, "mean_weights": mean})
        parts = [f"{name} {w:.4f} (loss {losses[name]:.4f})" for name, w in weights.items()]
        self.console.say(f"mixture after step {step} | " + " | ".join(parts))
        shares = ", ".join(f"{name} {w:.4f}" for name, w in weights.items())
        self.event(step, f"mixture from here on: {shares}", quiet=True)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Record a generated continuation."""
        self._write({"kind": "sample", **self._position(step), "prompt": prompt, "text": text})
        self.console.say(f"sample | {prompt}[...]{text}")

    def numerics(self, step: int, tensors: dict[str, dict[str, Any]]) -> None:
        """Record how tensors lie in a number format's range. tensors: layer -> role -> numbers."""
        self._write({"kind": "numerics", **self._position(step), "tensors": tensors})

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

    def copied(self, step: int, copied: Copied) -> None:
        """Record what became of a checkpoint's copy in the object store."""
        if copied.problem is None:
            self.event(step, f"step {copied.step} copied in {copied.seconds:.1f} s", quiet=True)
        else:
            self.trouble(step, copied.problem)

    def trouble(self, step: int, text: str) -> None:
        """Warn of what went wrong and does not stop the run, and record it."""
        self.console.warn(text)
        self.event(step, text, quiet=True)

    def close(self) -> None:
        """Close the loggers."""
        for logger in self.loggers:
            logger.close()

    def _position(self, step: int) -> dict[str, int]:
        samples = step * self.cfg.train.global_batch_size
        return {"step": step, "tokens": samples * self.cfg.data.seq_len, "samples": samples}

    def _reduced(self) -> dict[str, dict[str, float]]:
        """Source -> loss sum, weight (both since the last log line), samples, over all ranks."""
        parts = [*self._sums[0].tolist(), *self._sums[1].tolist(), *self._seen.tolist()]
        sums = self.world.sum(parts)
        n = len(self.plan.names)
        out = {}
        for i, name in enumerate(self.plan.names):
            old = self._before.get(name, {"nll": 0.0, "weight": 0.0, "samples": 0.0})
            values = zip(("nll", "weight", "samples"), sums[i::n], strict=True)
            out[name] = {key: old[key] + value for key, value in values}
        return out

    def _sources(self) -> dict[str, dict[str, Any]]:
        """Realised tokens, share and epochs per source since the start; loss since last time."""
        reduced = self._reduced()
        total = math.fsum(source["samples"] for source in reduced.values())
        out: dict[str, dict[str, Any]] = {}
        for name, size in zip(self.plan.names, self.plan.sizes, strict=True):
            source = reduced[name]
            out[name] = {
                "tokens": int(source["samples"]) * self.cfg.data.seq_len,
                "share": source["samples"] / max(total, 1.0),
                "epochs": source["samples"] / max(size, 1),
                "loss": source["nll"] / source["weight"] if source["weight"] > 0 else None,
            }
        self._sums.zero_()
        for source in self._before.values():
            source["nll"] = source["weight"] = 0.0
        return out

    def _write(self, record: Record) -> None:
        for logger in self.loggers:
            logger.write(record)
