"""The sharded model of one rank of a world that need not exist.

The model is built on the meta device by the code that builds it in the run, on a fake process
group of any size that never communicates. A degree that does not fit fails as it would there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from llmtrain.model import (
    Decoder,
    check_tensor_degree,
    limit_training,
    packed_names,
    param_roles,
    partial_parameters,
    shard_over_tensor,
)
from llmtrain.parallel import World, apply_fsdp, build_layout
from llmtrain.parallel.pipeline import Part as Stage
from llmtrain.planner.setting import Setting
from llmtrain.sparsity import sparse_layers, why_dense

TABLE = "embedding.weight"


@dataclass(frozen=True)
class Part:
    """One parameter as a rank holds it.

    shape: of the whole parameter; split: of the tensor-parallel part that forward reads; local:
    of the shard that this rank stores. block: number of the block it belongs to, None outside.
    partial: its gradient is a summand that tensor-parallel ranks still have to add up. trained:
    it has a gradient at all. packed: bytes of an element where it is (part of) a frozen weight kept
    packed, which travels and is stored as it is; 0: a float32. kept: share of its elements that is
    held at all.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    split: tuple[int, ...]
    local: tuple[int, ...]
    block: int | None
    partial: bool
    trained: bool = True
    packed: int = 0
    kept: float = 1.0

    def stored(self, shards: int) -> int:
        """Elements in this rank's memory: FSDP2 pads every shard to the largest, which is
        ceil(rows / shards) rows."""
        return round(self.kept * -(-self.split[0] // shards) * math.prod(self.split[1:]))

    @property
    def elements(self) -> int:
        """Elements of the tensor-parallel part."""
        return round(self.kept * math.prod(self.split))


@dataclass(frozen=True)
class Blueprint:
    """All parameters of a rank. rank: its number in the world."""

    rank: int
    parts: tuple[Part, ...]

    def units(self, stages: Iterable[Stage]) -> list[list[Part]]:
        """What FSDP2 gathers and reduces together: of each stage its blocks one by one, then all
        that is outside of them, embeddings in the first and final norm and head in the last (a
        tied embedding is both)."""
        found = []
        tied = not any(p.role == "head" for p in self.parts)
        for stage in stages:
            found += [[p for p in self.parts if p.block == i] for i in stage.blocks]
            outside = []
            for part in self.parts:
                is_input = part.role == "embedding"
                is_output = not is_input or (tied and part.name == TABLE)
                here = (stage.first and is_input) or (stage.last and is_output)
                if part.block is None and here:
                    outside.append(part)
            if outside:
                found.append(outside)
        return found


def draw(setting: Setting, rank: int = 0) -> Blueprint:
    """The parameters of ``rank``. Needs a process without a process group.

    Raises ConfigError or EnvironmentFault where the model does not fit the degrees.
    """
    cfg, model_cfg, degrees = setting.cfg, setting.model, setting.degrees
    check_tensor_degree(model_cfg, degrees.tensor)
    assert model_cfg.n_kv_heads is not None
    compute, reduce = setting.precision.compute, setting.precision.reduce
    with fake_world(rank, degrees.world) as world:
        layout = build_layout(cfg.parallel, world, model_cfg.n_kv_heads)
        with torch.device("meta"):
            model = Decoder(model_cfg, compute, layout.tensor)
        limit_training(model, model_cfg, cfg)
        roles, partial = param_roles(model), set(partial_parameters(model))
        packed, kept = packed_names(model), kept_shares(setting)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        if layout.tensor is not None:
            assert layout.state is not None
            shard_over_tensor(model, layout.state["tensor"])
        splits = {name: _local_shape(p) for name, p in model.named_parameters()}
        if layout.fsdp is not None:
            apart = [p for name, p in model.named_parameters() if name in kept]
            apply_fsdp(model, model.blocks, layout.fsdp, cfg.parallel, (compute, reduce), apart)
        parts = tuple(
            Part(
                name,
                roles[name],
                shapes[name],
                splits[name],
                _local_shape(param),
                _block_of(name),
                name in partial,
                param.requires_grad,
                param.element_size() if name in packed else 0,
                kept.get(name, 1.0),
            )
            for name, param in model.named_parameters()
        )
    return Blueprint(rank, parts)


def kept_shares(setting: Setting) -> dict[str, float]:
    """Densities of the parameters of which kept values are held alone, by name."""
    section = setting.cfg.sparsity
    if section is None or why_dense(setting.cfg, setting.degrees, setting.on_cpu) is not None:
        return {}
    sparse = sparse_layers(setting.model, section)
    return {f"{name}.weight": layer.density for name, layer in sparse.items()}


@contextmanager
def fake_world(rank: int, size: int) -> Iterator[World]:
    """This process as ``rank`` of ``size`` that never communicate: results of collectives are
    whatever the memory holds."""
    cpu = torch.device("cpu")
    if size == 1:
        yield World(0, 1, 0, cpu, None)
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized()
    store = FakeStore()
    dist.init_process_group("fake", rank=rank, world_size=size, store=store)
    try:
        yield World(rank, size, rank, cpu, None)
    finally:
        dist.destroy_process_group()
        # DTensor remembers results by mesh, and a later mesh of the same ranks is an equal one,
        # which would get tensors back whose groups are those of the fake world.
        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]


def _local_shape(param: torch.Tensor) -> tuple[int, ...]:
    return tuple((param.to_local() if isinstance(param, DTensor) else param).shape)


def _block_of(name: str) -> int | None:
    found = re.match(r"blocks\.(\d+)\.", name)
    return int(found[1]) if found else None
