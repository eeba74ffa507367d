"""Sparse training with a static mask, and what every sparse method shares: section ``sparsity``.

SPDF (Thangarasa et al. 2023, 2303.10464): a random static mask, uniform over the layers, from the
first step on; then dense finetuning, where the mask is dropped and the zeros learn. The dense part
is ``sparsity.until`` in the same run, which keeps the optimizer's state, or another run that
begins with the sparse one's weights or branches off it. Either starts from exactly the sparse
function, since pruned weights are zeros all along: their gradients are masked, and so the moments
and the decay leave them alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from llmtrain.config import RunConfig, to_dict
from llmtrain.config.sparsity import SparsityConfig
from llmtrain.convert.masks import checkpoint_masks
from llmtrain.data.plan import DataPlan
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.model import flops_per_token, resolve_model
from llmtrain.ops import native_loaded
from llmtrain.parallel import Degrees
from llmtrain.parallel.hardware import resolve_precision
from llmtrain.parallel.world import pick_device
from llmtrain.sparsity import (
    Masks,
    Sparse,
    always_dense,
    cases_of,
    check_cuts,
    density_of_step,
    kinds_of,
    sparse_layers,
    why_dense,
)
from llmtrain.sparsity.storage import fit_masks, load_masks
from llmtrain.train.hooks import Hook

if TYPE_CHECKING:
    from llmtrain.train.fitting import Needed
    from llmtrain.train.module import StepResult
    from llmtrain.train.trainer import Trainer

# What the masks of a checkpoint were made with; other values of a resumed run contradict them.
_MADE_WITH = ("method", "granularity", "density", "rules", "seed")


def sparsity(section: SparsityConfig) -> StaticMask:
    """The hook of a section ``sparsity``."""
    from llmtrain.methods.gradual_pruning import GradualPruning
    from llmtrain.methods.lost import Lost
    from llmtrain.methods.movement import Movement
    from llmtrain.methods.rigl import Regrowth
    from llmtrain.methods.slope import Slope
    from llmtrain.methods.srste import SrSte

    kinds: dict[str, type[StaticMask]] = {
        "static": StaticMask,
        "set": Regrowth,
        "rigl": Regrowth,
        "gradual": GradualPruning,
        "slope": Slope,
        "lost": Lost,
        "movement": Movement,
        "srste": SrSte,
    }
    return kinds[section.method](section)


def check_products(cfg: RunConfig, section: SparsityConfig, sparse: Mapping[str, Sparse]) -> None:
    """Raise ConfigError where sparse products were asked for by name and cannot run."""
    if section.products != "sparse":
        return
    device = pick_device(cfg.device, 0)
    on_cpu = device.type == "cpu"
    always_dense(cfg, on_cpu)
    reasons = [
        (on_cpu and not native_loaded(), "the compiled kernels are not in use (make build)"),
    ]
    if not on_cpu:
        dtype = resolve_precision(cfg.precision, device).compute
        double, ranks = section.method == "slope", cfg.parallel.tensor
        cases = cases_of(sparse, ranks, dtype, gpu=True, double=double)
        found = {name: kinds_of(case, device)[1] for name, case in cases.items()}
        reasons += [(bool(why), f"{name}: {why}") for name, why in found.items()]
    for holds, text in reasons:
        if holds:
            raise ConfigError(f"sparsity.products: sparse: {text}; use auto")


class StaticMask(Hook):
    """The masks of a run, from its start to ``until``."""

    double = False

    def __init__(self, cfg: SparsityConfig) -> None:
        self.cfg = cfg
        self.masks: Masks | None = None
        self.dropped = False
        self._resumed = False
        self._until: int | None = None
        self._sparse: dict[str, Sparse] = {}

    def check(self, cfg: RunConfig, plan: DataPlan) -> None:
        """Masks must fit the model and the layout."""
        model_cfg = resolve_model(cfg, plan.vocab_size)
        self._sparse = sparse_layers(model_cfg, self.cfg)
        for name, layer in self._sparse.items():
            layer.granularity.check(layer.shape, layer.density, name, self.double)
            if self.cfg.choose == "magnitude" or self.cfg.method == "srste":
                layer.granularity.check_search("sparsity.granularity")
        check_cuts(self._sparse, model_cfg, cfg.parallel.tensor, self.double)
        check_products(cfg, self.cfg, self._sparse)
        # Refused here where it cannot be; the number of processes is known later.
        own = cfg.parallel
        degrees = Degrees(own.pipeline, own.replicate, own.shard or 1, own.context, own.tensor)
        why_dense(cfg, degrees, on_cpu=cfg.device == "cpu")

    def needs(self, cfg: RunConfig, state: dict[str, Any] | None) -> list[Needed]:
        """No checkpoint; but a run that begins reads ``sparsity.masks``, which must be there."""
        if state is None and self.cfg.masks is not None:
            self._given(self._sparse)
        return []

    def prepare(self, trainer: Trainer) -> None:
        """Make the masks, unless a checkpoint has brought them, and prune the weights."""
        times = trainer.clockwork
        if self.cfg.until is not None:
            self._until = self.cfg.until.steps(times.tokens_per_step, times.total)
        if self.dropped:
            return
        for line in self.begin(trainer).lines():
            trainer.recorder.event(trainer.step_done, line)
        self.count_flops(trainer, trainer.step_done)
        if self._until is not None and trainer.step_done >= self._until:
            self.drop(trainer)

    def begin(self, trainer: Trainer) -> Masks:
        """Make and install the masks; of the trainer only config and module are used."""
        masks = self.make(trainer)
        if self._resumed:
            masks.take_room()
        else:
            self.first(trainer, masks)
        masks.install(self.seed(trainer))
        self.settle(trainer, masks)
        return masks

    def _given(self, sparse: Mapping[str, Sparse]) -> dict[str, Tensor]:
        """The masks that ``sparsity.masks`` names: of a file, or of a checkpoint."""
        path = Path(self.cfg.masks or "").expanduser()
        try:
            found = checkpoint_masks(path) if path.is_dir() else load_masks(path)
        except CheckpointError as error:
            raise ConfigError(f"sparsity.masks: {error}") from error
        return fit_masks(found, sparse, path)

    def first(self, trainer: Trainer, masks: Masks) -> None:
        """The masks of a run that begins."""
        if self.cfg.masks is not None:
            for name, kept in self._given(masks.sparse).items():
                masks.take_whole(name, kept)
        elif self.cfg.choose == "magnitude":
            masks.choose_largest()
        else:
            masks.draw(self.seed(trainer))

    def seed(self, trainer: Trainer) -> int:
        """Of random masks."""
        return trainer.cfg.seed if self.cfg.seed is None else self.cfg.seed

    def make(self, trainer: Trainer) -> Masks:
        """The masks' owner, once."""
        if self.masks is None:
            module = trainer.module
            sparse = sparse_layers(module.model_cfg, self.cfg)
            self.masks = Masks(module.model, module.params, module.layout, sparse, self.double)
            dense = always_dense(trainer.cfg, module.device.type == "cpu")
            self.masks.products = self.cfg.products if dense is None else "dense"
        return self.masks

    def settle(self, trainer: Trainer, masks: Masks) -> None:
        """Nothing lives outside the masks; hold the kept weights alone, where the run allows."""
        self.zero(trainer, masks.layers)
        on_cpu = trainer.module.device.type == "cpu"
        if why_dense(trainer.cfg, trainer.module.layout.degrees, on_cpu) is None:
            for name, layer in masks.layers.items():
                trainer.module.pack(f"{name}.weight", layer)
                masks.params[name] = layer.weight

    def zero(self, trainer: Trainer, names: Any) -> None:
        """Weights and moments of layers become zero outside their masks."""
        assert self.masks is not None
        self.masks.zero_state(trainer.module.optimizer, names)
        trainer.module.weights_changed()

    def after_backward(self, trainer: Trainer) -> None:
        """A penalty pulls at every weight; what is pruned stays where it is."""
        if trainer.cfg.penalty is not None and not self.dropped:
            self.mask_gradients(self.make(trainer))

    def mask_gradients(self, masks: Masks) -> None:
        """Gradients become zero outside the masks."""
        for name, param in masks.params.items():
            if param.grad is not None:
                masks.zero_outside(name, param.grad)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Drop the masks when it is time."""
        if not self.dropped and self._until is not None and result.step >= self._until:
            self.drop(trainer)

    def drop(self, trainer: Trainer) -> None:
        """Dense layers from here on."""
        assert self.masks is not None
        # An average may have written beyond the masks: the dense part starts from zeros there.
        self.zero(trainer, self.masks.layers)
        for name, layer in self.masks.layers.items():
            if layer.compact is not None:
                trainer.module.unpack(f"{name}.weight", layer)
        self.masks.remove()
        self.dropped = True
        self.count_flops(trainer, trainer.step_done)
        text = "sparsity.until: the masks are dropped; all weights learn from here on"
        trainer.recorder.event(trainer.step_done, text)

    def count_flops(self, trainer: Trainer, step: int) -> None:
        """MFU is of the FLOPs of kept weights."""
        cfg, model_cfg = trainer.cfg, trainer.module.model_cfg
        density = 1.0 if self.dropped else density_of_step(cfg, model_cfg, step)
        flops = flops_per_token(model_cfg, cfg.data.seq_len, density)
        trainer.recorder.throughput.set_flops(flops)

    def on_checkpoint(self, trainer: Trainer) -> None:
        """What other hooks wrote into the weights does not reach beyond the masks."""
        if self.masks is not None and not self.dropped:
            self.zero(trainer, self.masks.layers)

    def state_dict(self) -> dict[str, Any]:
        """Whether the masks are still there, and what they were made with."""
        section = to_dict(self.cfg)
        return {"dropped": self.dropped, "made_with": {key: section[key] for key in _MADE_WITH}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state back; the masks follow in ``tensors``."""
        self.dropped, self._resumed = bool(state["dropped"]), True

    def check_state(self, state: dict[str, Any]) -> None:
        """CheckpointError when the config asks for other masks than the checkpoint has."""
        section = to_dict(self.cfg)
        for key, made in state["made_with"].items():
            if not state["dropped"] and section[key] != made:
                raise CheckpointError(
                    f"sparsity.{key}: the checkpoint's masks were made with {made} and the config "
                    f"says {section[key]}; resume with that, or begin a new run from its weights "
                    "(init)"
                )

    def tensors(self, trainer: Trainer) -> dict[str, Tensor]:
        """The masks by layer, eight blocks in a byte."""
        if self.dropped or (self.masks is None and not self._resumed):
            return {}
        masks = self.make(trainer)
        return masks.bits() if masks.kept else masks.room()
