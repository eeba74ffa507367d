"""FSDP2 and replication sum gradients over ranks exactly like one process with the whole batch."""

import pytest
import torch
from helpers.ranks import run_ranks
from torch import nn

from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.schema import OptimConfig
from llmtrain.optim import (
    build_groups,
    build_optimizer,
    clip_gradients,
    create_state,
    gradient_norm,
    state_tensors,
)
from llmtrain.parallel import World, apply_fsdp, build_layout, set_gradient_sync

LAYOUTS = [(2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 7)) for _ in range(3)
        )
        self.norm = nn.LayerNorm(7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, 8, 7), torch.randn(3, 8, 7)


def train(rank: int, world: int, shard: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Three steps of two micro-batches; random upstream gradients; clipping in between."""
    torch.manual_seed(0)
    model = Toy()
    cfg = ParallelConfig(shard=shard, replicate=world // shard)
    layout = build_layout(cfg, World(rank, world, rank, torch.device("cpu"), None), 1)
    if layout.fsdp is not None:
        apply_fsdp(model, model.blocks, layout.fsdp, cfg, (torch.float32, torch.float32))
    params = dict(model.named_parameters())
    optim = OptimConfig(lr=0.05, clip_norm=0.3)
    groups = build_groups(params, dict.fromkeys(params, "hidden"), optim)
    optimizer = build_optimizer(groups, optim)
    create_state(optimizer)
    inputs, upstream = data()
    norms = []
    for x, g in zip(inputs, upstream, strict=True):
        rows = x.shape[0] // world
        mine = slice(rank * rows, (rank + 1) * rows)
        half = rows // 2
        for i, part in enumerate((slice(0, half), slice(half, rows))):
            set_gradient_sync(model, last=i == 1)
            (model(x[mine][part]) * g[mine][part]).sum().backward()
        norm = gradient_norm(params.values(), layout)
        norms.append(float(norm))
        clip_gradients(params.values(), norm, 0.3)
        optimizer.step()
        optimizer.zero_grad()
    tensors = {**params, **state_tensors(optimizer, params)}
    full = {
        k: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()
        for k, t in tensors.items()
    }
    return norms, full


@pytest.mark.dist
@pytest.mark.parametrize(("shard", "replicate"), LAYOUTS)
def test_any_layout_is_the_same_run(shard: int, replicate: int) -> None:
    world = shard * replicate
    alone_norms, alone = train(0, 1, 1)
    for norms, tensors in run_ranks(world, lambda rank: train(rank, world, shard)):
        assert norms == pytest.approx(alone_norms, rel=1e-6)
        assert tensors.keys() == alone.keys()
        for key, value in tensors.items():
            torch.testing.assert_close(value, alone[key], atol=2e-6, rtol=1e-5)
