"""The processes of a run: joining, small reductions between them, and leaving cleanly."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from llmtrain.errors import EnvironmentFault
from llmtrain.parallel.rendezvous import attempt_store, restarts_possible


@dataclass(frozen=True)
class World:
    """What this process knows of the run's processes.

    rank, size: among all processes; local_rank: on this node. device: where tensors live.
    cpu_group: a gloo group over all ranks for decisions and metrics, None when alone.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    cpu_group: dist.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise float64 sum over all ranks; every rank gets the same numbers."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        """Element-wise maximum over all ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return [float(v) for v in values]
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=op, group=self.cpu_group)
        return [float(v) for v in tensor.tolist()]


def pick_device(wanted: str, local_rank: int) -> torch.device:
    """The device for ``device: auto|cpu|cuda``; raises EnvironmentFault without a wanted GPU."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFault(
            "device: cuda was asked for but torch sees no CUDA device; "
            "use device: cpu, or install a CUDA build of torch and check `llmtrain doctor`"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise EnvironmentFault(
            f"local rank {local_rank} has no GPU: this node shows {torch.cuda.device_count()}; "
            "start at most one process per GPU"
        )
    return torch.device("cuda", local_rank)


def init_world(device: str = "auto", timeout_minutes: float = 30.0) -> World:
    """Join the processes that torchrun started (or be alone without it).

    device: the config's ``device``. Raises EnvironmentFault when the rendezvous fails.
    """
    rank = int(os.environ.get("RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    place = pick_device(device, local_rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size == 1:
        return World(rank, size, local_rank, place, None)
    timeout = timedelta(minutes=timeout_minutes)
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    try:
        if not dist.is_initialized():
            own: dict[str, Any] = {}
            if restarts_possible():
                own = {"store": attempt_store(timeout), "rank": rank, "world_size": size}
            dist.init_process_group(
                backend, timeout=timeout, device_id=place if place.type == "cuda" else None, **own
            )
    except (RuntimeError, ValueError) as error:
        raise EnvironmentFault(
            f"rank {rank} of {size} could not join the others ({error}); start the run with "
            "torchrun, or unset RANK and WORLD_SIZE to run alone"
        ) from error
    return World(rank, size, local_rank, place, dist.new_group(backend="gloo", timeout=timeout))


def close_world() -> None:
    """Leave the process group.

    Call it when models, optimizers and pending collectives are out of scope: a gloo worker that
    still holds a tensor owned by Python aborts the interpreter on its way out, so garbage is
    collected first.
    """
    gc.collect()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
