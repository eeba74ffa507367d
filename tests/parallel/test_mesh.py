"""Degrees, and where a rank stands."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers.ranks import run_ranks

from llmtrain.config.parallel import ParallelConfig
from llmtrain.errors import EnvironmentFault
from llmtrain.parallel import Degrees, Layout, World, build_layout, resolve_degrees


def test_shard_fills_the_world() -> None:
    cfg = ParallelConfig(tensor=2, context=2, pipeline=2, replicate=2)
    assert resolve_degrees(cfg, 64) == Degrees(2, 2, 4, 2, 2)
    assert resolve_degrees(ParallelConfig(), 1) == Degrees()
    assert str(resolve_degrees(cfg, 64)) == (
        "2 pipeline x 2 replicate x 4 shard x 2 context x 2 tensor"
    )


@pytest.mark.parametrize(
    ("cfg", "world"),
    [
        (ParallelConfig(tensor=4), 2),
        (ParallelConfig(tensor=3), 4),
        (ParallelConfig(shard=2), 4),
        (ParallelConfig(pipeline=2, shard=4), 4),
    ],
)
def test_degrees_that_do_not_fit(cfg: ParallelConfig, world: int) -> None:
    with pytest.raises(EnvironmentFault, match=rf"must equal the number of processes \({world}\)"):
        resolve_degrees(cfg, world)


def _layout(rank: int, degrees: Degrees) -> Layout:
    return Layout(World(rank, degrees.world, rank, torch.device("cpu"), None), degrees)


def test_tensor_ranks_are_neighbours_and_pipeline_ranks_are_far() -> None:
    degrees = Degrees(pipeline=2, replicate=1, shard=2, context=2, tensor=2)
    places = [_layout(r, degrees) for r in range(16)]
    assert [p.tensor_rank for p in places[:4]] == [0, 1, 0, 1]
    assert [p.context_rank for p in places[:8:2]] == [0, 1, 0, 1]
    assert [p.data_rank for p in places[:8]] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [p.pipeline_rank for p in places] == [0] * 8 + [1] * 8


def test_every_token_and_sample_counts_once() -> None:
    degrees = Degrees(pipeline=2, replicate=2, shard=2, context=2, tensor=2)
    tokens, losses = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    samples = Counter[int]()
    for rank in range(degrees.world):
        place = _layout(rank, degrees)
        tokens[place.data_rank, place.context_rank] += place.counts_tokens
        losses[place.data_rank, place.context_rank] += place.counts_losses
        samples[place.data_rank] += place.counts_samples
        assert not place.counts_losses or place.pipeline_rank == 1
    assert set(tokens.values()) == set(losses.values()) == {1} and len(tokens) == 8
    assert set(samples.values()) == {1} and len(samples) == 4


def test_groups_of_a_real_mesh() -> None:
    """Each group holds the ranks that differ in its coordinate alone."""

    def body(rank: int) -> tuple[list[int], list[int], list[int], tuple[int, ...]]:
        world = World(rank, 4, rank, torch.device("cpu"), None)
        layout = build_layout(ParallelConfig(tensor=2, context=2), world, n_kv_heads=1)
        import torch.distributed as dist

        assert layout.tensor is not None and layout.tensor.kv_group is not None
        assert layout.context is not None and layout.fsdp is not None
        ranks = dist.get_process_group_ranks
        assert layout.tensor.rank == layout.tensor_rank == layout.tensor.group.rank()
        return (
            ranks(layout.tensor.group),
            ranks(layout.tensor.kv_group),
            ranks(layout.context.group),
            tuple(layout.fsdp.shape),
        )

    for rank, (tensor, kv, context, fsdp) in enumerate(run_ranks(4, body)):
        pair = [rank // 2 * 2, rank // 2 * 2 + 1]
        assert tensor == pair and kv == pair
        assert context == [rank % 2, rank % 2 + 2]
        assert fsdp == (1, 2)
