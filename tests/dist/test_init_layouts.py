"""Initial weights on every rank of every layout are the parts of the same whole."""

from __future__ import annotations

import pytest
import torch
from helpers.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from llmtrain.config.schema import ModelConfig
from llmtrain.model import Decoder, build_model, complete, init_weights

pytestmark = pytest.mark.dist

CFG = complete(
    ModelConfig(vocab_size=300, d_model=40, n_layers=2, n_heads=4, norm_bias=True), None, 16
)
LAYOUTS = [
    ((3,), [Shard(0)]),
    ((3,), [Shard(1)]),
    ((2, 2), [Replicate(), Shard(0)]),
    ((2, 2), [Shard(1), Shard(0)]),
    ((3,), "fsdp"),
    ((2, 2), "fsdp"),
]
Part = tuple[tuple[slice, ...], Tensor]


def _distribute(model: nn.Module, mesh: DeviceMesh, placements: list[Replicate | Shard]) -> None:
    for module in model.modules():
        for key, param in list(module.named_parameters(recurse=False)):
            wanted = [
                Replicate() if isinstance(p, Shard) and p.dim >= param.dim() else p
                for p in placements
            ]
            setattr(module, key, nn.Parameter(distribute_tensor(param.detach(), mesh, wanted)))


def _parts(
    rank: int, sizes: tuple[int, ...], placements: list[Replicate | Shard] | str
) -> dict[str, Part]:
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("a", "b")[: len(sizes)])
    with torch.device("meta"):
        model = Decoder(CFG)
    if isinstance(placements, str):
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        _distribute(model, mesh, placements)
    model.to_empty(device="cpu")
    init_weights(model, 4)
    parts: dict[str, Part] = {}
    for name, param in model.named_parameters():
        assert isinstance(param, DTensor)
        shape, offset = compute_local_shape_and_global_offset(
            param.shape, param.device_mesh, param.placements
        )
        where = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
        parts[name] = where, param.to_local().detach().clone()
    return parts


@pytest.mark.parametrize(("sizes", "placements"), LAYOUTS)
def test_parts_are_of_the_same_whole(
    sizes: tuple[int, ...], placements: list[Replicate | Shard] | str
) -> None:
    model = build_model(CFG, seed=4, device="cpu", compute_dtype=torch.float32)
    world = sizes[0] * (sizes[1] if len(sizes) == 2 else 1)
    ranks = run_ranks(world, _parts, sizes, placements)
    for name, param in model.named_parameters():
        covered = torch.zeros_like(param)
        for parts in ranks:
            where, values = parts[name]
            assert torch.equal(values, param[where]), name
            covered[where] = 1
        assert covered.all(), name
