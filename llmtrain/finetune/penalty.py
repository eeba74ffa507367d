"""Penalties on leaving an anchor: the hook of the config section ``penalty``.

Anchor and Fisher information lie in the parameters' own layout, so each rank adds the gradient of
the penalty to its own parts, when the gradients are complete and before their norm is taken.
Gradients are sums over ranks of a mean over the global batch; every part is added to once on each
rank that holds it, so the layout changes nothing.
"""

from __future__ import annotations

import time
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.checkpoint import HOOK_PREFIX, MODEL_PREFIX, OPTIM_PREFIX, load_checkpoint
from llmtrain.config import RunConfig
from llmtrain.config.continual import PenaltyConfig
from llmtrain.data.batch import Batch
from llmtrain.data.loader import Loader
from llmtrain.data.plan import DataPlan, build_plan
from llmtrain.errors import CheckpointError, ConfigError, DataError
from llmtrain.merge.copies import Weights, copy_into, empty_copy, part
from llmtrain.optim import counts_part
from llmtrain.train.fitting import Needed
from llmtrain.train.hooks import Hook

if TYPE_CHECKING:
    from llmtrain.train.module import TrainModule
    from llmtrain.train.trainer import Trainer

ANCHOR, FISHER = "anchor", "fisher"
_STATE = (MODEL_PREFIX, OPTIM_PREFIX, HOOK_PREFIX)


class Penalty(Hook):
    """Adds lambda F (theta - theta_o) to the gradients, F = 1 for ``l2``.

    The penalty is lambda/2 sum F (theta - theta_o)^2, with theta_o the anchor. ``ewc`` (elastic
    weight consolidation, Kirkpatrick et al. 2017, 1612.00796): F is the diagonal of the empirical
    Fisher information at the anchor, summed over the tasks so far with the latest weights as the
    only anchor (Schwarz et al. 2018, 1805.06370, with gamma = 1). Its value, over all ranks and
    before the update, is recorded as ``penalty`` and is no part of the loss.
    """

    def __init__(self, cfg: PenaltyConfig) -> None:
        self.cfg = cfg
        self.copies: dict[str, Weights] = {}
        self.seconds = 0.0
        self._expected: list[str] = []

    def needs(self, cfg: RunConfig, state: dict[str, Any] | None) -> list[Needed]:
        """Anchor and earlier Fisher information, unless the run's own checkpoint holds them."""
        if state is not None and state["copies"]:
            return []
        if self.cfg.data:
            try:
                _fisher_plan(cfg, self.cfg.data, self.cfg.samples)
            except DataError as error:
                raise ConfigError(f"penalty.data: {error}") from error
        needed = []
        if self.cfg.anchor != "start":
            needed.append(Needed("penalty.anchor", self.cfg.anchor, learnt=True))
        if self.cfg.fisher is not None:
            prefix = f"{HOOK_PREFIX}penalty.{FISHER}."
            needed.append(Needed("penalty.fisher", self.cfg.fisher, prefix, learnt=True))
        return needed

    def on_run_start(self, trainer: Trainer) -> None:
        """Take the anchor and the Fisher information, unless a checkpoint brought them back."""
        if self.copies:
            return
        params = learnt(trainer.module)
        began = time.perf_counter()
        if self.cfg.kind == "ewc":
            # First: anything that is wrong with the data is said before memory is taken.
            self.copies[FISHER] = self._fisher(trainer)
            self.seconds = time.perf_counter() - began
        self.copies[ANCHOR] = empty_copy(params, self.cfg.offload)
        if self.cfg.anchor == "start":
            copy_into(self.copies[ANCHOR], params)
        else:
            self._load(trainer, "anchor", MODEL_PREFIX, self.copies[ANCHOR])

    def after_backward(self, trainer: Trainer) -> None:
        """Add the penalty's gradient; its value where the step is logged."""
        due = trainer.recorder.due(trainer.step_done + 1)
        value = self.add(trainer.module, measure=due)
        if due:
            trainer.recorder.note("penalty", value)

    @torch.no_grad()
    def add(self, module: TrainModule, measure: bool) -> float:
        """Add to the gradients; returns the penalty over all ranks (0 unless ``measure``)."""
        counted = module.counted()
        total = torch.zeros((), dtype=torch.float64, device=module.device)
        for name, param in learnt(module).items():
            assert param.grad is not None
            own, grad = part(param), part(param.grad)
            away = own - part(self.copies[ANCHOR][name]).to(own.device, non_blocking=True)
            pull = away
            if FISHER in self.copies:
                pull = away * part(self.copies[FISHER][name]).to(own.device, non_blocking=True)
            grad.add_(pull, alpha=self.cfg.strength)
            if measure and name in counted and counts_part(param):
                total += torch.dot(away.flatten().double(), pull.flatten().double())
        if not measure:
            return 0.0
        layout = module.layout
        if layout.state is not None:
            for dim in ("shard", "tensor", "pipeline"):
                dist.all_reduce(total, group=layout.state.get_group(dim))
        return 0.5 * self.cfg.strength * float(total)

    def state_dict(self) -> dict[str, Any]:
        """Which copies there are; their values are in ``tensors``. seconds: of the Fisher pass."""
        return {"kind": self.cfg.kind, "copies": list(self.copies), "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state back; CheckpointError when another kind saved it."""
        if state["kind"] != self.cfg.kind:
            raise CheckpointError(
                f"penalty.kind: the checkpoint was made with {state['kind']} and the config says "
                f"{self.cfg.kind}; resume with penalty.kind={state['kind']}, or begin a new run "
                "with init.path"
            )
        self._expected, self.seconds = list(state["copies"]), float(state["seconds"])

    def tensors(self, trainer: Trainer) -> dict[str, Tensor]:
        """Every copy as ``<copy>.<parameter>``."""
        for name in self._expected:
            self.copies[name] = empty_copy(learnt(trainer.module), self.cfg.offload)
        self._expected = []
        return {
            f"{name}.{key}": value
            for name, weights in self.copies.items()
            for key, value in weights.items()
        }

    def _fisher(self, trainer: Trainer) -> Weights:
        cfg, module = self.cfg, trainer.module
        params = learnt(module)
        found = empty_copy(params, offload=False)
        for value in found.values():
            part(value).zero_()
        if cfg.data:
            began = time.perf_counter()
            add_fisher(trainer, found, cfg.data, cfg.samples)
            took = time.perf_counter() - began
            text = f"Fisher information estimated on {cfg.samples} sequences in {took:.1f} s"
            trainer.recorder.event(trainer.step_done, text)
        if cfg.fisher is not None:
            earlier = empty_copy(params, offload=False)
            self._load(trainer, "fisher", f"{HOOK_PREFIX}penalty.{FISHER}.", earlier)
            for name, value in earlier.items():
                part(found[name]).add_(part(value))
        if not cfg.offload:
            return found
        kept = empty_copy(params, offload=True)
        copy_into(kept, found)
        return kept

    def _load(self, trainer: Trainer, key: str, prefix: str, into: Weights) -> None:
        """Read the tensors ``prefix + name`` of the checkpoint that ``penalty.<key>`` names."""
        path, group = self.found[f"penalty.{key}"], trainer.world.cpu_group
        wanted = {f"{prefix}{name}": value for name, value in into.items()}
        load_checkpoint(path, wanted, group, unused=_STATE, verify=False)


def learnt(module: TrainModule) -> dict[str, nn.Parameter]:
    """The parameters that training changes: beside adapters the others are frozen."""
    return {name: param for name, param in module.params.items() if param.requires_grad}


def add_fisher(trainer: Trainer, into: Weights, data: dict[str, float], samples: int) -> None:
    """Add the diagonal empirical Fisher information at the present weights; collective.

    Mean over the first ``samples`` sequences of the mixture ``data`` of the squared gradient of a
    sequence's summed loss, as in ``merge.fisher``, without dropout. into: in the parameters'
    layout, on the device. Gradients of ranks are summed in the reduction, so a sequence is seen
    by all data ranks and counts on the first of them alone: exact under any layout, and no
    faster on many ranks.
    """
    module, cfg = trainer.module, trainer.cfg
    plan = _fisher_plan(cfg, data, samples)
    loader = Loader(plan, 1, 0, 1)
    # A pipeline's schedules want a micro-batch for each of its ranks.
    depth = module.layout.degrees.pipeline
    rows = 1 if depth == 1 else depth * (cfg.train.micro_batch_size or 1)
    module.model.eval()
    for i in range(samples):
        batch = _repeated(loader.batch(i), rows)
        batch.weights[1 if module.layout.data_rank == 0 else 0 :] = 0
        module.forward_backward(module.receive(batch), 1.0, len(plan.names))
        for name, param in learnt(module).items():
            assert param.grad is not None
            grad = part(param.grad)
            part(into[name]).addcmul_(grad, grad, value=1.0 / samples)
        module.drop_gradients()
    module.model.train()


def _fisher_plan(cfg: RunConfig, data: dict[str, float], samples: int) -> DataPlan:
    """The sequences that the Fisher information is estimated on. Raises DataError."""
    mixture = replace(cfg.data, weights=dict(data), phases=[])
    return build_plan(replace(cfg, data=mixture), samples)


def _repeated(batch: Batch, rows: int) -> Batch:
    """The one sequence of ``batch``, ``rows`` times."""
    columns = (getattr(batch, f.name) for f in fields(batch))
    return Batch(*(c.repeat_interleave(rows, 0) if isinstance(c, Tensor) else c for c in columns))
