"""The train module on DeepSpeed: ZeRO 1, 2 or 3 holds the state instead of FSDP2.

Same interface and same arithmetic as ``TrainModule``: gradients summed over ranks, one global
norm, the same optimizers with the same groups. State is named as there and kept as ``Fragment``s,
so checkpoints are the same files whichever engine wrote them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard

from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.linear import LowRank
from llmtrain.loss import LossOutput
from llmtrain.model import (
    Block,
    Decoder,
    apply_recompute,
    check_tensor_degree,
    frozen_lengths,
    hidden_layers,
    init_weights,
    keep_own_parts,
    param_roles,
    partial_parameters,
    rate_factors,
    tensor_placements,
)
from llmtrain.optim import build_groups, build_optimizer, create_state, set_learning_rate
from llmtrain.parallel import Layout, local_boxes
from llmtrain.parallel.hardware import Precision
from llmtrain.parallel.zero import (
    ensure_group,
    import_deepspeed,
    partition_parameters,
    settings,
    start_engine,
)
from llmtrain.parallel.zero_state import Box, ZeroState, frozen_fragment
from llmtrain.train.module import TrainModule


class DeepSpeedModule(TrainModule):
    """Owns the DeepSpeed engine, which is ``model`` to the outside.

    ``params`` are the parameters that forward reads: compute dtype, this rank's tensor-parallel
    part, and empty between forwards under ZeRO 3. The float32 masters are in ``tensors``; who
    writes these calls ``restore``, or ``weights_changed`` after writing to ``weights``.
    """

    begins = False

    def __init__(
        self, cfg: RunConfig, model_cfg: ModelConfig, precision: Precision, layout: Layout
    ) -> None:
        self.cfg, self.model_cfg, self.layout = cfg, model_cfg, layout
        self.device, self.context = layout.world.device, layout.context
        check_tensor_degree(model_cfg, layout.degrees.tensor)
        deepspeed = import_deepspeed(self.device)
        ensure_group(layout)
        config = settings(cfg, precision, self._micro_batch_counts())
        with torch.device("meta"):
            model = Decoder(model_cfg, precision.compute, layout.tensor)
        apply_recompute(model, cfg.train.recompute)
        self.roles = param_roles(model)
        boxes = _cut(model, layout)
        self._gathering: Any = None
        if config["zero_optimization"]["stage"] == 3:
            self._gathering = deepspeed.zero.GatheredParameters
            partition_parameters(deepspeed, model, layout, config, precision.compute)
            _declare_gathering(deepspeed, model)
            if not model.embedding.weight.requires_grad:
                model.embedding.register_forward_hook(_require_grad)
        else:
            model.to_empty(device=self.device)
        self.params: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.groups = build_groups(self.params, self.roles, cfg.optim, rate_factors(model_cfg))
        self.optimizer = build_optimizer(self.groups, cfg.optim)
        self.model = start_engine(deepspeed, model, self.optimizer, config, layout)
        trained = {name: p for name, p in self.params.items() if p.requires_grad}
        self.zero = ZeroState(self.model, trained, {n: boxes[n] for n in trained}, layout)
        self._frozen = {name: boxes[name] for name in self.params if name not in trained}
        create_state(self.optimizer, self.zero.masters)
        init_weights(model, cfg.seed, self.zero.named(self.zero.masters) | self.frozen())
        self.zero.publish()
        self.set_magnitudes()

    def _micro_batch_counts(self) -> tuple[int, int]:
        """(sequences per micro-batch, micro-batches per step) of a rank."""
        rows = self.cfg.train.global_batch_size // self.layout.degrees.data
        size = self.cfg.train.micro_batch_size or rows
        return size, -(-rows // size)

    def _forward(self, **arguments: Any) -> LossOutput:
        head_fn = arguments.pop("head_fn")

        def as_tuple(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
            # DeepSpeed hangs its hooks on the tensors of plain containers.
            output: LossOutput = head_fn(*args)
            return output.loss, output.nll, output.z

        return LossOutput(*self.model(head_fn=as_tuple, **arguments))

    def _begin_micro_batch(self, last: bool) -> None:
        self.zero.engine.set_gradient_accumulation_boundary(last)

    def _backward(self, loss: Tensor) -> None:
        self.zero.backward(loss)

    def _finish_gradients(self) -> None:
        self.zero.finish_gradients()

    def gradient_norm(self) -> Tensor:
        """Global L2 norm of the gradients (0-dim)."""
        return self.zero.gradient_norm()

    def update(self, norm: Tensor, lr: float) -> None:
        """Clip, then one optimizer update at learning rate ``lr``; gradients are freed."""
        set_learning_rate(self.optimizer, lr)
        bound = self.cfg.optim.clip_norm
        exceeds = bound is not None and float(norm) > bound
        self.zero.step(bound / float(norm) if bound is not None and exceeds else 1.0)

    def drop_gradients(self) -> None:
        """Forget the gradients of this step."""
        self.zero.drop()

    def weights(self) -> Mapping[str, Tensor]:
        """The float32 masters of this rank: live fragments."""
        return self.zero.named(self.zero.masters)

    def weights_changed(self) -> None:
        """Cast the masters into the parameters of all ranks."""
        self.zero.publish()

    @torch.no_grad()
    def set_magnitudes(self) -> None:
        """As there, into the masters; ZeRO 3 gathers a layer at a time. Collective."""
        masters, decoder = self.weights(), self.model.module
        assert isinstance(decoder, nn.Module)
        sides = {name: layer.adapter for name, layer in hidden_layers(decoder)}
        if not any(isinstance(s, LowRank) and s.magnitude is not None for s in sides.values()):
            return
        for name, layer in hidden_layers(decoder):
            side = layer.adapter
            if not isinstance(side, LowRank) or side.magnitude is None:
                continue
            # Lengths of weights that the engine fills anew are not to be remembered.
            side.sharded = True
            key = f"{name}.adapter.magnitude.weight"
            box = self.zero.box(key)
            with nullcontext() if self._gathering is None else self._gathering([layer.weight]):
                length = frozen_lengths(layer, box.offset[0], box.part[0])
            for values, offset in local_boxes(masters[key]):
                start = offset[0] - box.offset[0]
                values.copy_(length[start : start + len(values)])
        self.zero.publish()

    def sum_over_parts(self, values: Tensor) -> Tensor:
        """Sums over whole weights from sums over this rank's fragments."""
        return self.zero.sum_over_parts(values)

    def frozen(self) -> dict[str, Tensor]:
        """The weights that do not train, as forward reads them: live fragments in the compute
        dtype. They are kept once, without a float32 master: sharded under ZeRO 3."""
        return {
            name: frozen_fragment(self.params[name], box, self.layout)
            for name, box in self._frozen.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """All state by name: ``model.<parameter>`` and ``optim.<parameter>.<key>``.

        Fragments are live; the optimizer's step counts are copies, one for each parameter.
        """
        masters = self.zero.masters
        state = [self.optimizer.state[master] for master in masters]
        named = {f"model.{name}": t for name, t in self.zero.named(masters).items()}
        for key in state[0]:
            if key == "step":
                parts = {name: state[p.flat][key].clone() for name, p in self.zero.places.items()}
            else:
                parts = self.zero.named([s[key] for s in state])
            named.update({f"optim.{name}.{key}": t for name, t in parts.items()})
        return named

    def restore(self, read: Callable[[dict[str, Tensor]], None]) -> None:
        """Replace the state by what ``read`` writes into the ``tensors`` that it is given."""
        tensors = self.tensors()
        read(tensors)
        for name, place in self.zero.places.items():
            step = self.optimizer.state[self.zero.masters[place.flat]].get("step")
            if step is not None:
                step.copy_(tensors[f"optim.{name}.step"])
        self.zero.publish()


def _cut(model: Decoder, layout: Layout) -> dict[str, Box]:
    """Leave this rank's tensor-parallel parts in the model; returns what they are."""
    whole = {name: tuple(param.shape) for name, param in model.named_parameters()}
    if layout.tensor is None:
        return {name: Box(shape, shape, (0,) * len(shape)) for name, shape in whole.items()}
    rank = layout.tensor.rank
    placements, partial = tensor_placements(model), set(partial_parameters(model))
    keep_own_parts(model, rank, layout.tensor.size)
    boxes = {}
    for name, param in model.named_parameters():
        part, offset = tuple(param.shape), [0] * param.dim()
        placement = placements[name]
        if isinstance(placement, Shard):
            offset[placement.dim] = rank * part[placement.dim]
        boxes[name] = Box(whole[name], part, tuple(offset), name in partial)
    return boxes


def _require_grad(module: nn.Module, args: Any, out: Tensor) -> None:
    """Give frozen embeddings a gradient, which nobody reads.

    ZeRO 3 takes a block's gradients for complete once that of its input is there, and of an input
    without one at the beginning of the block's backward.
    """
    if torch.is_grad_enabled():
        out.requires_grad_()


def _declare_gathering(deepspeed: Any, model: Decoder) -> None:
    """Tell ZeRO 3 what is gathered when, where it differs from one module at a time."""
    # A block is gathered and released as one; what it calls inside need not be a module's forward.
    deepspeed.utils.set_z3_leaf_modules(model, [Block])
    # The loss reads the head's weight inside the root's forward.
    owner = model.embedding if model.cfg.tie_embeddings else model.head.projection
    deepspeed.zero.register_external_parameter(model, owner.weight)
