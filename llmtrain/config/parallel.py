"""The section ``parallel``: how a run is laid out over processes."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.config.fields import key


@dataclass(frozen=True)
class ParallelConfig:
    """Layout over processes: pipeline x replicate x shard x context x tensor = world size."""

    tensor: int = key(1, "tensor-parallel degree: ranks that share every matrix of a block", ge=1)
    sequence: bool = key(
        True, "tensor > 1: norms and residual stream split by tokens over the tensor ranks"
    )
    keep_gathered: bool = key(
        False, "sequence: keep gathered inputs for backward; more memory, one gather less"
    )
    context: int = key(1, "context-parallel degree: ranks that share every sequence", ge=1)
    context_method: str = key(
        "allgather",
        "context > 1: gather keys and values, or pass them around a ring",
        choices=("allgather", "ring"),
    )
    pipeline: int = key(1, "pipeline-parallel degree: ranks that share the layers", ge=1)
    pipeline_schedule: str = key(
        "1f1b",
        "order of micro-batches in a pipeline",
        choices=("gpipe", "1f1b", "interleaved", "zero_bubble"),
    )
    pipeline_stages: int | None = key(
        None, "stages of each pipeline rank; null: 1, or 2 when interleaved or zero_bubble", ge=1
    )
    shard: int | None = key(None, "FSDP2 shards; null: what is left of the world", ge=1)
    replicate: int = key(1, "replicas of the shards (HSDP); world size: plain data parallel", ge=1)
    reduce_every_micro_batch: bool = key(
        False,
        "reduce gradients after each micro-batch: no full gradient on a rank, more traffic",
    )
    reshard_after_forward: bool = key(True, "free gathered weights between forward and backward")
    prefetch: int = key(
        1,
        "blocks whose weights are gathered while an earlier one computes",
        ge=0,
        le=1024,
    )
    engine: str = key(
        "native", "what shards state: FSDP2, or DeepSpeed (extra)", choices=("native", "deepspeed")
    )
    zero_stage: int | None = key(
        None, "engine deepspeed: ZeRO stage; null: 3", choices=(1, 2, 3, None)
    )
    offload_optimizer: bool = key(False, "engine deepspeed: optimizer state and step on the CPU")
