"""Starting DeepSpeed (ZeRO, Rajbhandari et al. 2020, 1910.02054) on a model and an optimizer.

``zero_state`` is what a step needs of the running engine.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from llmtrain.config.schema import RunConfig
from llmtrain.errors import EnvironmentFault
from llmtrain.parallel.hardware import Precision
from llmtrain.parallel.mesh import Layout

VERSION = "0.19"
# Elements of the buffer in which gradients are collected for one reduction.
BUCKET = 50_000_000


def import_deepspeed(device: torch.device) -> Any:
    """The package, quiet; EnvironmentFault with the command that installs it when absent."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed

        backend: Any = importlib.import_module("deepspeed.comm.torch")
        _import_muon(importlib.import_module("deepspeed.runtime.compiler"))
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
    # Sums through shared memory on one node of CPUs: would need a compiler at run time, print its
    # messages and leave segments behind. gloo does the same.
    backend.build_shm_op = lambda: None
    return deepspeed


def _import_muon(compiler: Any) -> None:
    """DeepSpeed's Muon, which each of its engines imports, without compiling it.

    It is not used here, and would load all of torch's compiler: two seconds of every process.
    """
    compile_, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_


def settings(
    cfg: RunConfig, precision: Precision, micro_batches: tuple[int, int]
) -> dict[str, Any]:
    """DeepSpeed's own config for a run. micro_batches: (sequences in each, number per step)."""
    size, count = micro_batches
    stage = cfg.parallel.zero_stage or 3
    names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": BUCKET,
        # As FSDP2 does: what forward has gathered is freed, and gathered again in backward.
        "stage3_max_reuse_distance": 0,
        # Blocks are gathered whole, so keeping their small parameters gathered gains nothing.
        "stage3_param_persistence_threshold": 0,
        # Would replace torch.nn.functional.linear for the whole process.
        "memory_efficient_linear": False,
    }
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
class Groups:
    """The process groups of a layout under the names that DeepSpeed asks a client for ("mpu")."""

    layout: Layout

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that share a matrix."""
        assert self.layout.tensor is not None
        return self.layout.tensor.group

    def get_model_parallel_rank(self) -> int:
        """Place among the ranks that share a matrix."""
        return self.layout.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        """Number of ranks that share a matrix."""
        return self.layout.degrees.tensor

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that read different samples."""
        return data_group(self.layout)

    def get_data_parallel_rank(self) -> int:
        """Place among the ranks that read different samples."""
        return self.layout.data_rank

    def get_data_parallel_world_size(self) -> int:
        """Number of ranks that read different samples."""
        return self.layout.degrees.data

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


def data_group(layout: Layout) -> dist.ProcessGroup:
    """The ranks that read different samples; ``ensure_group`` must have been called."""
    if layout.tensor is None:
        group = dist.group.WORLD
        assert group is not None
        return group
    assert layout.state is not None
    return layout.state.get_group("shard")


def ensure_group(layout: Layout) -> None:
    """DeepSpeed wants a launcher's mark and a process group even when there is one process."""
    world = layout.world
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def partition_parameters(
    deepspeed: Any, model: nn.Module, layout: Layout, config: dict[str, Any], dtype: torch.dtype
) -> None:
    """Turn a model on the meta device into one whose parameters are partitioned (ZeRO 3).

    One module at a time becomes real, so no rank ever holds the whole model. The parameters are
    uninitialised and of ``dtype``.
    """
    partition = None
    for module in model.modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        module.to_empty(device=layout.world.device, recurse=False)
        for param in module.parameters(recurse=False):
            param.data = param.data.to(dtype)
        if partition is None:
            partition = deepspeed.zero.Init(
                module=module,
                data_parallel_group=data_group(layout),
                config_dict_or_path=config,
            )
        partition._convert_to_zero_parameters(module.parameters(recurse=False))


def start_engine(
    deepspeed: Any,
    model: nn.Module,
    optimizer: Optimizer,
    config: dict[str, Any],
    layout: Layout,
) -> Any:
    """The DeepSpeed engine around ``model``; its parameters are partitioned afterwards."""
    with redirect_stdout(StringIO()):  # one of its optimizers prints memory readings
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=list(model.parameters()),
            config=config,
            mpu=None if layout.tensor is None else Groups(layout),
            dist_init_required=False,
        )
    return engine
