"""The train module on DeepSpeed: ZeRO 1, 2 or 3 holds the state instead of FSDP2.

Same interface and same arithmetic as ``TrainModule``: gradients summed over ranks, one global
norm, the same optimizers with the same groups. State is named as there and kept as ``Fragment``s,
so checkpoints are the same files whichever engine wrote them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.loss import LossOutput
from llmtrain.model import Decoder, apply_recompute, init_weights, param_roles
from llmtrain.model.block import Block
from llmtrain.optim import build_groups, build_optimizer, create_state, set_learning_rate
from llmtrain.parallel import World
from llmtrain.parallel.hardware import Precision
from llmtrain.parallel.zero import Zero, import_deepspeed, join_alone, settings, start
from llmtrain.train.module import TrainModule


class DeepSpeedModule(TrainModule):
    """Owns the DeepSpeed engine, which is ``model`` to the outside.

    ``params`` are the parameters that forward reads: compute dtype, and empty between forwards
    under ZeRO 3. The float32 masters are in ``tensors``; who writes these calls ``restore``.
    """

    def __init__(
        self, cfg: RunConfig, model_cfg: ModelConfig, precision: Precision, world: World
    ) -> None:
        self.cfg, self.model_cfg, self.device = cfg, model_cfg, world.device
        deepspeed = import_deepspeed(world.device)
        join_alone(world)
        config = settings(cfg, precision, self._micro_batch_counts(world))
        model = _construct(deepspeed, config, (model_cfg, precision), world.device)
        apply_recompute(model, cfg.train.recompute)
        self.roles = param_roles(model)
        self.params: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.groups = build_groups(self.params, self.roles, cfg.optim)
        self.optimizer = build_optimizer(self.groups, cfg.optim)
        engine = start(deepspeed, model, self.optimizer, config)
        self.model = engine
        self.zero = Zero(engine, self.optimizer, self.params)
        create_state(self.optimizer, self.zero.masters)
        init_weights(model, cfg.seed, self.zero.named(self.zero.masters))
        self.zero.publish()

    def _micro_batch_counts(self, world: World) -> tuple[int, int]:
        """(sequences per micro-batch, micro-batches per step) of a rank."""
        rows = self.cfg.train.global_batch_size // world.size
        size = self.cfg.train.micro_batch_size or rows
        return size, -(-rows // size)

    def _forward(self, tokens: Tensor, **options: Any) -> LossOutput:
        head_fn = options.pop("head_fn")

        def as_tuple(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
            # DeepSpeed hangs its hooks on the tensors of plain containers.
            output: LossOutput = head_fn(*args)
            return output.loss, output.nll, output.z

        return LossOutput(*self.model(tokens, head_fn=as_tuple, **options))

    def _begin_micro_batch(self, last: bool) -> None:
        self.zero.engine.set_gradient_accumulation_boundary(last)

    def _backward(self, loss: Tensor) -> None:
        self.zero.backward(loss)

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


def _construct(
    deepspeed: Any,
    config: dict[str, Any],
    shape: tuple[ModelConfig, Precision],
    device: torch.device,
) -> Decoder:
    """The model with uninitialised parameters; under ZeRO 3 no rank ever holds all of it."""
    model_cfg, precision = shape
    if config["zero_optimization"]["stage"] < 3:
        with torch.device("meta"):
            model = Decoder(model_cfg, precision.compute)
        model.to_empty(device=device)
        return model
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = Decoder(model_cfg, precision.compute)
    # A block is gathered and released as one; what it calls inside need not be a module's forward.
    deepspeed.utils.set_z3_leaf_modules(model, [Block])
    # The loss reads the head's weight inside the root's forward.
    deepspeed.zero.register_external_parameter(model, model.head.weight)
    return model
