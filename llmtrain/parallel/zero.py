"""DeepSpeed's ZeRO (Rajbhandari et al. 2020, 1910.02054) behind the few operations a step needs.

``start`` builds the DeepSpeed engine around a model and an optimizer; ``Zero`` reaches into it for
what llmtrain does by its own rules: the gradient norm, clipping, dropping a step, and the float32
state by parameter. DeepSpeed keeps partitioning, communication, offloading and the order of it
all. It is written against DeepSpeed 0.19, whose three optimizers store their shards under other
names; ``_Shards`` is the one place that knows them.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from llmtrain.config.schema import RunConfig
from llmtrain.errors import EnvironmentFault
from llmtrain.parallel.fragment import Fragment
from llmtrain.parallel.hardware import Precision
from llmtrain.parallel.world import World

VERSION = "0.19"


def import_deepspeed(device: torch.device) -> Any:
    """The package, quiet; EnvironmentFault with the command that installs it when absent."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        from deepspeed.utils import logger
    except ImportError as error:
        raise EnvironmentFault(
            f"parallel.engine: deepspeed was asked for but does not import ({error}); "
            "run DS_BUILD_OPS=0 pip install 'llmtrain[deepspeed]', or set parallel.engine=native"
        ) from error
    if not deepspeed.__version__.startswith(f"{VERSION}."):
        raise EnvironmentFault(
            f"parallel.engine: deepspeed {deepspeed.__version__} is installed and llmtrain is "
            f"written for {VERSION}; run pip install 'deepspeed~={VERSION}.8'"
        )
    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device.type == "cpu":
        # Sums through shared memory on one node: would need a compiler at run time, and leaves
        # segments behind. gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def join_alone(world: World) -> None:
    """What DeepSpeed wants even when there is one process: a process group, and a launcher's mark."""
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def settings(
    cfg: RunConfig, precision: Precision, micro_batches: tuple[int, int]
) -> dict[str, Any]:
    """DeepSpeed's own config for a run. micro_batches: (sequences in each, number per step)."""
    size, count = micro_batches
    stage = cfg.parallel.zero_stage or 3
    names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    # Blocks are gathered whole, so keeping their small parameters gathered would gain nothing.
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if cfg.parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": size,
        "gradient_accumulation_steps": count,
        "gradient_clipping": 0.0,
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",
        "bf16": {"enabled": precision.compute == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": names[precision.reduce],
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


@dataclass(frozen=True)
class Place:
    """Where a parameter's float32 elements lie on this rank.

    flat: index of the flat tensor; at: the run's start in it; start, length: the run within the
    row-major parameter. length 0: this rank holds none of it.
    """

    flat: int
    at: int
    start: int
    length: int


class _Shards:
    """The local shards of one of DeepSpeed's optimizers, whichever it is."""

    def __init__(self, optimizer: Any, params: Mapping[str, nn.Parameter]) -> None:
        self.optimizer, self.params = optimizer, params
        self.stage3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
        self.bf16 = hasattr(optimizer, "fp32_groups_flat_partition")

    def masters(self) -> list[Tensor]:
        """The flat float32 parameters of this rank, live."""
        if self.stage3:
            return list(self.optimizer.fp32_partitioned_groups_flat)
        if self.bf16:
            return list(self.optimizer.fp32_groups_flat_partition)
        return list(self.optimizer.single_partition_of_fp32_groups)

    def gradients(self) -> list[Tensor]:
        """This rank's part of the reduced gradients, live, between backward and step."""
        optimizer = self.optimizer
        if self.bf16:
            return list(optimizer.fp32_groups_gradient_flat_partition)
        if getattr(optimizer, "offload_optimizer", False) or getattr(
            optimizer, "cpu_offload", False
        ):
            return [master.grad for master in self.masters() if master.grad is not None]
        return [
            grad
            for index in range(len(self.masters()))
            for grad in optimizer.averaged_gradients[index]
        ]

    def places(self) -> dict[str, Place]:
        """Where each parameter's elements are."""
        if self.stage3:
            return {name: self._place3(param) for name, param in self.params.items()}
        groups = self.optimizer.bf16_groups if self.bf16 else self.optimizer.bit16_groups
        index = {id(param): i for i, group in enumerate(groups) for param in group}
        return {name: self._place(param, index[id(param)]) for name, param in self.params.items()}

    def _place(self, param: Any, flat: int) -> Place:
        mapping = param._hp_mapping
        if mapping is None:
            return Place(flat, 0, 0, 0)
        high, low = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Place(flat, high.start, low.start, high.numel)

    def _place3(self, param: Any) -> Place:
        flat, at, padded = self.optimizer.grad_position[self.optimizer.get_param_id(param)]
        start = padded * self.optimizer._get_param_partition_rank(param)
        length = max(0, min(padded, param.ds_numel - start))
        return Place(flat, at, min(start, param.ds_numel), length)

    def publish(self) -> None:
        """Copy the float32 masters into the parameters that forward reads, on all ranks."""
        optimizer = self.optimizer
        if not self.stage3:
            optimizer.update_lp_params()
            return
        optimizer._partition_all_parameters()
        for index in range(len(self.masters())):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        kept = optimizer.persistent_parameters
        if kept:
            kept[0].all_gather(kept)

    def report_norm(self, value: float) -> None:
        """Make DeepSpeed's step believe ``value`` instead of computing a norm of its own.

        A negative one is its sign for a norm that is not finite, upon which it drops the
        gradients and leaves parameters and optimizer as they are.
        """
        optimizer = self.optimizer
        norm = torch.tensor(value)
        if self.stage3:
            optimizer._get_norm_groups = lambda: [norm]
        elif not self.bf16:
            optimizer.scaled_global_norm = lambda norm_type=2: norm


class Zero:
    """A running DeepSpeed engine, and the state of this rank in it.

    optimizer: the one passed to ``start``, whose parameters DeepSpeed has replaced by flat ones.
    """

    def __init__(self, engine: Any, optimizer: Optimizer, params: Mapping[str, nn.Parameter]):
        self.engine, self.optimizer = engine, optimizer
        self._shards = _Shards(engine.optimizer, params)
        self._stage = engine.zero_optimization_stage()
        self._group = engine.seq_data_parallel_group
        self.masters = self._shards.masters()
        self.places = self._shards.places()
        self._shapes = {
            name: tuple(getattr(param, "ds_shape", param.shape)) for name, param in params.items()
        }

    def backward(self, loss: Tensor) -> None:
        """Backward of one micro-batch; gradients are *summed* over ranks.

        ZeRO 3 can only average, so the loss is multiplied by what the gradients will be divided
        by, exactly for powers of two and to one rounding otherwise.
        """
        factor = dist.get_world_size(self._group) if self._stage == 3 else 1
        # A new tensor in any case: on the one that forward returned, DeepSpeed's hook would divide
        # by the number of micro-batches.
        self.engine.backward(loss * factor, scale_wrt_gas=False)

    def gradient_norm(self) -> Tensor:
        """Global L2 norm (0-dim float32); squares are summed in float64 as in ``optim.clip``."""
        device = next(iter(self.engine.module.parameters())).device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for grad in self._shards.gradients():
            norm = torch.linalg.vector_norm(grad, dtype=torch.float64)
            total += norm.square().to(device)
        dist.all_reduce(total, group=self._group)
        return total.sqrt().float()

    def step(self, scale: float = 1.0) -> None:
        """One update with the gradients times ``scale``; they are freed."""
        if scale != 1.0:
            torch._foreach_mul_(self._shards.gradients(), scale)
        self._shards.report_norm(0.0)
        self.engine.step()

    def drop(self) -> None:
        """Forget the gradients of this step, accumulated ones too; nothing else changes."""
        optimizer = self.engine.optimizer
        if self._shards.bf16:
            optimizer.clear_hp_grads()
            optimizer.clear_lp_grads()
            return
        self._shards.report_norm(-1.0)
        # A bfloat16 run under ZeRO 2 looks at the norm only when told to check for overflow.
        optimizer.check_grad_overflow = True
        self.engine.step()
        optimizer.check_grad_overflow = False
        if not self._shards.stage3:
            # Left standing by DeepSpeed where the optimizer is offloaded in bfloat16.
            optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)

    def publish(self) -> None:
        """Bring the parameters up to date after the float32 state was written in place."""
        self._shards.publish()

    def named(self, flats: Iterable[Tensor]) -> dict[str, Tensor]:
        """Flat tensors laid out like ``masters``, by parameter: live ``Fragment``s."""
        listed = list(flats)
        return {
            name: Fragment(
                listed[p.flat].detach()[p.at : p.at + p.length], self._shapes[name], p.start
            )
            for name, p in self.places.items()
        }


def start(
    deepspeed: Any,
    model: nn.Module,
    optimizer: Optimizer,
    config: dict[str, Any],
    mpu: object | None = None,
) -> Any:
    """The DeepSpeed engine around ``model``; its parameters are partitioned afterwards."""
    with redirect_stdout(StringIO()):  # one of its optimizers prints memory readings
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=list(model.parameters()),
            config=config,
            mpu=mpu,
            dist_init_required=False,
        )
    return engine
