"""Mixture weights that follow held-out losses: the hook of the config section ``online``.

At planned steps the held-out text of every source is measured, new weights are computed
(``data.online``), and the plan deals by them from the next sample on. What was decided is part of
the plan and so of every checkpoint: a resumed run, whatever its layout, repeats it bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.store import explain
from llmtrain.config import RunConfig
from llmtrain.config.mixture_methods import OnlineConfig
from llmtrain.data.batch import Batch
from llmtrain.data.loader import HeldoutSet, heldout_sets
from llmtrain.data.online import (
    Graph,
    Weights,
    doremi,
    known_until,
    on_grid,
    rounded,
    skill_it,
    update_steps,
)
from llmtrain.data.plan import DataPlan
from llmtrain.errors import ConfigError, DataError, GuardStop
from llmtrain.eval.heldout import evaluate_domains
from llmtrain.methods.reference import check_reference, load_reference, losses_of
from llmtrain.parallel import release_gathered
from llmtrain.train.hooks import Hook

if TYPE_CHECKING:
    from llmtrain.train.module import StepResult, TrainModule
    from llmtrain.train.trainer import Trainer

ETA = {"skill-it": 0.1, "doremi": 1.0, "fixed": 1.0}


class OnlineMixture(Hook):
    """Changes the weights of the last phase at the steps that ``data.online`` names.

    history: the losses of the latest changes, the window. first: those of the first. weights: in
    force now, exact. total: sum of the weights after each of the ``changes`` so far.
    """

    def __init__(self, cfg: OnlineConfig) -> None:
        self.cfg = cfg
        self.eta = cfg.eta if cfg.eta is not None else ETA[cfg.method]
        self.history: list[Weights] = []
        self.first: Weights = {}
        self.weights: dict[str, Fraction] = {}
        self.total: Weights = {}
        self.changes = 0
        self._start: Weights = {}
        self._graph: Graph = {}
        self._sets: list[HeldoutSet] = []
        self._reference: dict[str, list[Tensor]] = {}

    def check(self, cfg: RunConfig, plan: DataPlan) -> None:
        """Whether there is what will be measured. Raises ConfigError, DataError."""
        names = list(plan.configured[-1].weights)
        self._heldout(cfg, plan, names)
        skill_graph(self.cfg, names)
        if self.cfg.reference is not None:
            check_reference(Path(self.cfg.reference), cfg, plan, "online.reference")

    def on_run_start(self, trainer: Trainer) -> None:
        """Find what will be measured. Raises ConfigError, DataError, CheckpointError."""
        planned = trainer.plan.configured[-1].weights
        self._start = {name: float(weight) for name, weight in planned.items()}
        # Those of the checkpoint's plan, unless a branch has brought its own.
        self.weights = dict(trainer.plan.mixture.schedules[-1][-1].weights)
        if set(self.total) != set(planned):
            # A fresh start, or a branch with other sources: what was measured is of no use.
            self.history, self.first = [], {}
            self.total, self.changes = dict.fromkeys(planned, 0.0), 0
        self._sets = self._heldout(trainer.cfg, trainer.plan, list(planned))
        self._graph = skill_graph(self.cfg, list(planned))
        if self.cfg.method == "doremi":
            self._measure_reference(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Change the weights when that is due; collective."""
        step, cfg = result.step, trainer.cfg
        if step not in update_steps(cfg, trainer.clockwork.total):
            return
        trainer.recorder.pause()
        losses = self._measure(trainer)
        self.weights = self._next(losses, step)
        self.changes += 1
        for name, weight in self.weights.items():
            self.total[name] += float(weight)
        plan, batch = trainer.plan, cfg.train.global_batch_size
        plan.turn(step * batch, self.weights, known_until(cfg, trainer.clockwork.total, step))

        def write() -> None:
            with explain("the plan cannot be written to the run's folder"):
                plan.write(Path(cfg.out) / cfg.name / "plan.json")

        Ranks(trainer.world.cpu_group).on_main(write)
        shares = {name: float(weight) for name, weight in self.weights.items()}
        mean = {name: total / self.changes for name, total in self.total.items()}
        trainer.recorder.mixture(step, shares, losses, mean)
        trainer.recorder.resume()

    def state_dict(self) -> dict[str, Any]:
        """Losses of the window and sums of weights; the weights themselves are in the plan."""
        return {
            "history": self.history,
            "first": self.first,
            "total": self.total,
            "changes": self.changes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.history, self.first = state["history"], state["first"]
        self.total, self.changes = state["total"], state["changes"]

    def _heldout(self, cfg: RunConfig, plan: DataPlan, names: Sequence[str]) -> list[HeldoutSet]:
        """The held-out text of the sources, in their order."""
        limited = replace(cfg, eval=replace(cfg.eval, samples=self.cfg.samples))
        found = {s.name: s for s in heldout_sets(limited, plan.catalogue)}
        missing = [name for name in names if name not in found]
        if missing:
            raise ConfigError(
                f"online: the source {missing[0]!r} has no held-out text to measure; prepare the "
                f"corpus with a heldout_fraction, or name it in data.heldout.{missing[0]}"
            )
        return [found[name] for name in names]

    def _next(self, losses: Weights, step: int) -> dict[str, Fraction]:
        """The weights that follow from the losses, which join the window."""
        wrong = [name for name, loss in losses.items() if not math.isfinite(loss)]
        if wrong:
            raise GuardStop(
                f"online: the held-out loss of {wrong[0]!r} after step {step} is not a number, so "
                "no weights follow from it; resume from an earlier checkpoint with a lower optim.lr"
            )
        if self.cfg.method == "fixed":
            return self.weights
        if self.cfg.method == "doremi":
            before = {name: float(weight) for name, weight in self.weights.items()}
            return on_grid(doremi(before, losses, self.eta, self.cfg.smoothing))
        self.first = self.first or losses
        if self.cfg.relative:
            losses = {name: loss / max(self.first[name], 1e-6) for name, loss in losses.items()}
        self.history = [*self.history, losses][-self.cfg.window :]
        return on_grid(skill_it(self._start, self._graph, self.history, self.eta))

    @torch.no_grad()
    def _measure(self, trainer: Trainer) -> Weights:
        """Held-out loss of every source, or its excess over the reference's; on the grid."""
        module = trainer.module
        module.model.eval()
        try:
            if self.cfg.method == "doremi":
                found = {s.name: self._excess(module, s) for s in self._sets}
            else:
                domains = evaluate_domains(module, self._sets, self._rows(module), module.layout)
                found = {name: metrics["loss"] for name, metrics in domains.items()}
        finally:
            module.model.train()
            release_gathered(module.model)
        return {name: rounded(x) if math.isfinite(x) else x for name, x in found.items()}

    def _excess(self, module: TrainModule, heldout: HeldoutSet) -> float:
        """Mean over tokens of max(loss - the reference's, 0), over all ranks."""
        layout, total, weight = module.layout, 0.0, 0.0
        batches = self._batches(module, heldout)
        for batch, theirs in zip(batches, self._reference[heldout.name], strict=True):
            own = module.receive(batch)
            nll = module.loss(own, 1.0).nll
            if layout.counts_losses:
                excess = (nll - theirs).clamp(min=0.0)
                total += float((excess * own.weights).sum(dtype=torch.float64))
            if layout.counts_tokens:
                weight += float(own.weights.sum(dtype=torch.float64))
        total, weight = layout.world.sum([total, weight])
        return total / weight if weight else math.nan

    def _measure_reference(self, trainer: Trainer) -> None:
        """The reference's loss of every held-out token of this rank; the model is then let go.

        The reference reads whole sequences; ``receive`` cuts its losses as it cuts the tokens.
        """
        module, path = trainer.module, self.cfg.reference
        assert path is not None
        reference = load_reference(Path(path), trainer, "online.reference")
        for heldout in self._sets:
            self._reference[heldout.name] = [
                module.receive(replace(batch, weights=losses_of(reference, module, batch))).weights
                for batch in self._batches(module, heldout)
            ]

    def _batches(self, module: TrainModule, heldout: HeldoutSet) -> list[Batch]:
        layout = module.layout
        return list(heldout.batches(self._rows(module), layout.data_rank, layout.degrees.data))

    def _rows(self, module: TrainModule) -> int:
        cfg = module.cfg
        whole = cfg.train.global_batch_size // module.layout.degrees.data
        return cfg.eval.micro_batch_size or cfg.train.micro_batch_size or whole


def skill_graph(cfg: OnlineConfig, names: Sequence[str]) -> Graph:
    """A_ij as source -> helped source -> edge, from the config or the file it names.

    Raises DataError for a file that is no graph or names none of the sources.
    """
    if cfg.graph_file is None:
        return cfg.graph or {name: {name: 1.0} for name in names}
    try:
        graph = json.loads(Path(cfg.graph_file).read_text(encoding="utf-8"))["graph"]
        found = {i: {j: float(edge) for j, edge in row.items()} for i, row in graph.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it does not hold one"
        raise DataError(
            f"online.graph_file: {cfg.graph_file} is no skill graph ({why}); make one with "
            "`llmtrain branch RUN --at ... --skill-graph FILE`"
        ) from error
    for i, row in found.items():
        for j, edge in row.items():
            if not (math.isfinite(edge) and edge >= 0):
                raise DataError(
                    f"online.graph_file: {cfg.graph_file}: the edge from {i!r} to {j!r} is "
                    f"{edge:g}; edges are 0 or more"
                )
    known = {*found, *(j for row in found.values() for j in row)}
    missing = [name for name in names if name not in known]
    if missing:
        raise DataError(
            f"online.graph_file: {cfg.graph_file} does not know the source {missing[0]!r}; make "
            "the graph from a run with the same sources"
        )
    return {i: {j: e for j, e in row.items() if j in names} for i, row in found.items()}
