"""The device mesh: replicate x shard."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llmtrain.config.schema import ParallelConfig
from llmtrain.errors import EnvironmentFault
from llmtrain.parallel.world import World


def resolve_shard(cfg: ParallelConfig, world_size: int) -> int:
    """Ranks that share one copy of the state; raises EnvironmentFault when degrees do not fit."""
    shard = cfg.shard if cfg.shard is not None else world_size // cfg.replicate
    if shard * cfg.replicate != world_size:
        raise EnvironmentFault(
            f"parallel.shard ({shard}) x parallel.replicate ({cfg.replicate}) must equal the "
            f"number of processes ({world_size}); leave parallel.shard null to fill up"
        )
    return shard


def build_mesh(cfg: ParallelConfig, world: World) -> DeviceMesh | None:
    """Mesh with dimensions ("replicate", "shard"); None for a single process.

    Neighbouring ranks shard, so that the heavier traffic stays inside a node.
    """
    shard = resolve_shard(cfg, world.size)
    if world.size == 1:
        return None
    return init_device_mesh(
        world.device.type, (cfg.replicate, shard), mesh_dim_names=("replicate", "shard")
    )
