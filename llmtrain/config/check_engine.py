"""Rules of ``parallel.engine``: what DeepSpeed is told, and what it cannot be asked for here."""

from __future__ import annotations

from llmtrain.config.faults import Collector
from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.schema import RunConfig

_NATIVE = "use parallel.engine: native"


def check_engine(cfg: RunConfig, faults: Collector) -> None:
    """Add a fault for every key that the engine does not read or cannot serve."""
    parallel = cfg.parallel
    if parallel.engine == "native":
        for key in ("zero_stage", "offload_optimizer"):
            if getattr(parallel, key) != ParallelConfig.__dataclass_fields__[key].default:
                faults.add(
                    f"parallel.{key}",
                    "is read by DeepSpeed only; set parallel.engine: deepspeed or remove it",
                    "parallel.engine",
                )
        return
    for key in ("pipeline", "context"):
        if getattr(parallel, key) > 1:
            faults.add(
                f"parallel.{key}",
                f"{getattr(parallel, key)} does not go together with engine: deepspeed; {_NATIVE}",
                "parallel.engine",
            )
    fsdp = ("shard", "replicate", "reduce_every_micro_batch", "reshard_after_forward")
    for key in fsdp:
        if getattr(parallel, key) != ParallelConfig.__dataclass_fields__[key].default:
            faults.add(
                f"parallel.{key}",
                "steers FSDP2, and engine: deepspeed shards by parallel.zero_stage over all "
                f"data-parallel ranks; remove it or {_NATIVE}",
                "parallel.engine",
            )
    if cfg.penalty is not None:
        faults.add(
            "penalty",
            "adds to the gradients of each rank's own parts, and engine: deepspeed keeps them to "
            f"itself; {_NATIVE}",
            "parallel.engine",
        )
    if cfg.model.adapters is not None:
        _check_adapters(cfg, faults)
    if cfg.checkpoint.snapshot_every is not None:
        faults.add(
            "checkpoint.snapshot_every",
            f"does not go together with parallel.engine: deepspeed; remove it or {_NATIVE}",
            "parallel.engine",
        )
    if cfg.train.verify_replicas is not None:
        faults.add(
            "train.verify_replicas",
            f"compares FSDP2's copies, which engine: deepspeed has not; remove it or {_NATIVE}",
            "parallel.engine",
        )
    if cfg.train.compile:
        faults.add(
            "train.compile",
            f"does not go together with parallel.engine: deepspeed; set it to false or {_NATIVE}",
            "parallel.engine",
        )


def _check_adapters(cfg: RunConfig, faults: Collector) -> None:
    """DeepSpeed keeps no float32 of weights that do not train, so they are never saved."""
    section = cfg.model.adapters
    if section is None or not section.freeze:
        return
    if cfg.init is None:
        faults.add(
            "model.adapters",
            "beside parallel.engine: deepspeed, which keeps frozen weights in the compute dtype, "
            f"needs the checkpoint that holds them; set init.path, or {_NATIVE}",
            "parallel.engine",
            "init.path",
        )
    if cfg.checkpoint.save == "all":
        faults.add(
            "checkpoint.save",
            "all does not go together with model.adapters and parallel.engine: deepspeed, which "
            f"keeps frozen weights in the compute dtype; write auto, or {_NATIVE}",
            "parallel.engine",
        )
    if cfg.average is not None:
        faults.add(
            "average",
            f"does not go together with model.adapters under parallel.engine: deepspeed; {_NATIVE}",
            "parallel.engine",
        )
