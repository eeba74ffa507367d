"""The device mesh: where a process stands in pipeline x replicate x shard x context x tensor.

Ranks are numbered with ``tensor`` fastest and ``pipeline`` slowest: the heaviest traffic stays
between neighbours, inside a node. State (parameters, optimizer) lies on one four-dimensional
mesh whose ``shard`` dimension includes the context ranks: they hold the same weights, so FSDP2
shards over them as well and sums their gradients with everybody else's.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llmtrain.config.parallel import ParallelConfig
from llmtrain.errors import EnvironmentFault
from llmtrain.parallel.context import ContextParallel
from llmtrain.parallel.tensor import TensorParallel
from llmtrain.parallel.world import World

STATE_DIMS = ("pipeline", "replicate", "shard", "tensor")


@dataclass(frozen=True)
class Degrees:
    """How many ranks share what. Their product is the number of processes."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def data(self) -> int:
        """Ranks that read different samples."""
        return self.replicate * self.shard

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.pipeline * self.data * self.context * self.tensor

    def __str__(self) -> str:
        parts = [f"{n} {name}" for name, n in vars(self).items() if n > 1]
        return " x ".join(parts) or "1 process"


def resolve_degrees(cfg: ParallelConfig, world_size: int) -> Degrees:
    """The degrees of ``world_size`` processes; parallel.shard fills what the others leave.

    Raises EnvironmentFault when they do not fit.
    """
    fixed = cfg.pipeline * cfg.replicate * cfg.context * cfg.tensor
    shard = cfg.shard if cfg.shard is not None else world_size // fixed
    if shard * fixed != world_size or shard == 0:
        raise EnvironmentFault(
            f"parallel: pipeline {cfg.pipeline} x replicate {cfg.replicate} x shard "
            f"{cfg.shard if cfg.shard is not None else '?'} x context {cfg.context} x tensor "
            f"{cfg.tensor} must equal the number of processes ({world_size}); "
            "leave parallel.shard null to fill up"
        )
    return Degrees(cfg.pipeline, cfg.replicate, shard, cfg.context, cfg.tensor)


@dataclass(frozen=True)
class Layout:
    """Where this process stands, and the groups it talks to.

    state: mesh over ``STATE_DIMS``, None for a single process. context: the ranks that share
    this rank's sequences. tensor: those that share its matrices. Both None at degree 1.
    """

    world: World
    degrees: Degrees
    state: DeviceMesh | None = None
    context: ContextParallel | None = None
    tensor: TensorParallel | None = None

    def _index(self, stride: int, size: int) -> int:
        return self.world.rank // stride % size

    @property
    def tensor_rank(self) -> int:
        """Place among the ranks that share a matrix."""
        return self._index(1, self.degrees.tensor)

    @property
    def context_rank(self) -> int:
        """Place among the ranks that share a sequence."""
        return self._index(self.degrees.tensor, self.degrees.context)

    @property
    def data_rank(self) -> int:
        """Place among the ranks that read different samples."""
        return self._index(self.degrees.tensor * self.degrees.context, self.degrees.data)

    @property
    def pipeline_rank(self) -> int:
        """Place among the ranks that share the layers; 0 holds the embedding."""
        d = self.degrees
        return self._index(d.tensor * d.context * d.data, d.pipeline)

    @property
    def counts_tokens(self) -> bool:
        """Whether this rank's tokens enter global sums: tensor and pipeline ranks see the same
        tokens, and only the first of each counts them."""
        return self.tensor_rank == 0 and self.pipeline_rank == 0

    @property
    def counts_losses(self) -> bool:
        """Whether this rank's losses enter global sums: the last of a pipeline knows them."""
        return self.tensor_rank == 0 and self.pipeline_rank == self.degrees.pipeline - 1

    @property
    def counts_samples(self) -> bool:
        """Whether this rank's samples enter global sums; context ranks share them."""
        return self.counts_tokens and self.context_rank == 0

    @property
    def fsdp(self) -> DeviceMesh | None:
        """The (replicate, shard) part of the mesh where it has more than one rank."""
        if self.state is None or self.degrees.data * self.degrees.context == 1:
            return None
        return self.state["replicate", "shard"]


def build_layout(cfg: ParallelConfig, world: World, n_kv_heads: int) -> Layout:
    """The mesh of a run and this process's place in it. Collective.

    n_kv_heads: when tensor ranks outnumber them, several ranks share a head and get a group of
    their own.
    """
    degrees = resolve_degrees(cfg, world.size)
    if world.size == 1:
        return Layout(world, degrees)
    device = world.device.type
    sizes = (degrees.pipeline, degrees.replicate, degrees.shard * degrees.context, degrees.tensor)
    state = init_device_mesh(device, sizes, mesh_dim_names=STATE_DIMS)
    context = None
    if degrees.context > 1:
        group = _groups(world, degrees.context, degrees.tensor)
        context = ContextParallel(group, group.rank(), degrees.context, cfg.context_method)
    tensor = None
    if degrees.tensor > 1:
        sharing = degrees.tensor // gcd(degrees.tensor, n_kv_heads)
        tensor = TensorParallel(
            group=state.get_group("tensor"),
            rank=state.get_local_rank("tensor"),
            size=degrees.tensor,
            sequence=cfg.sequence,
            keep_gathered=cfg.keep_gathered,
            kv_group=_groups(world, sharing, 1) if sharing > 1 else None,
        )
    return Layout(world, degrees, state, context, tensor)


def _groups(world: World, size: int, stride: int) -> dist.ProcessGroup:
    """This rank's group of ``size`` ranks that lie ``stride`` apart."""
    sizes = (world.size // (size * stride), size, stride)
    mesh = init_device_mesh(world.device.type, sizes, mesh_dim_names=("outer", "group", "inner"))
    return mesh.get_group("group")
