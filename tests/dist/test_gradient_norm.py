"""The gradient norm of sharded parameters is that of the whole gradient, on every rank."""

import pytest
import torch
from helpers.ranks import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from llmtrain.config.parallel import ParallelConfig
from llmtrain.optim import clip_gradients, gradient_norm
from llmtrain.parallel import World, build_layout

# Rows that no number of ranks divides, and fewer rows than ranks: some shards are empty.
SHAPES = [(7, 5), (1, 3), (11,), (2, 3, 2)]
BOUND = 0.25


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def norm_and_clipped(rank: int, shard: int, replicate: int) -> tuple[float, list[torch.Tensor]]:
    """The norm as this rank sees it, and its gradients, whole again, after clipping."""
    cfg = ParallelConfig(shard=shard, replicate=replicate)
    world = World(rank, shard * replicate, rank, torch.device("cpu"), None)
    layout = build_layout(cfg, world, 1)
    assert layout.state is not None
    names = layout.state.mesh_dim_names
    assert names is not None
    # The last row of each gradient is what the last shard alone holds.
    placements = [Shard(0) if name == "shard" else Replicate() for name in names]
    params = []
    for grad in gradients():
        param = nn.Parameter(
            DTensor.from_local(
                _part(torch.zeros_like(grad), layout, shard),
                layout.state, placements, run_check=False,
                shape=grad.shape, stride=grad.stride(),
            )
        )  # fmt: skip
        param.grad = DTensor.from_local(
            _part(grad, layout, shard),
            layout.state, placements, run_check=False,
            shape=grad.shape, stride=grad.stride(),
        )  # fmt: skip
        params.append(param)
    norm = gradient_norm(params, layout)
    clip_gradients(params, norm, BOUND)
    return float(norm), [p.grad.full_tensor() for p in params]  # type: ignore[union-attr]


def _part(whole: torch.Tensor, layout, shard: int) -> torch.Tensor:
    place = layout.state.get_local_rank("shard")
    parts = whole.chunk(shard, 0)
    return parts[place].clone() if place < len(parts) else whole.new_zeros(0, *whole.shape[1:])


@pytest.mark.dist
@pytest.mark.parametrize(("shard", "replicate"), [(2, 1), (3, 1), (4, 1), (2, 2), (1, 3)])
def test_the_norm_and_clipping_over_uneven_shards(shard: int, replicate: int) -> None:
    whole = torch.cat([g.double().flatten() for g in gradients()])
    expected = float(whole.norm())
    assert expected > BOUND
    ranks = shard * replicate
    for norm, clipped in run_ranks(ranks, lambda rank: norm_and_clipped(rank, shard, replicate)):
        assert norm == pytest.approx(expected, rel=2e-7)
        for ours, grad in zip(clipped, gradients(), strict=True):
            torch.testing.assert_close(ours, grad * (BOUND / expected), atol=0, rtol=1e-6)
