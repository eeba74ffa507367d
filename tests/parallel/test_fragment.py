"""Runs of a tensor's elements: the boxes they fall into, and checkpoints of them."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest
import torch
from helpers.ranks import run_ranks

from llmtrain.checkpoint import Checkpointer, load_checkpoint, verify
from llmtrain.config.upkeep import CheckpointConfig
from llmtrain.parallel.fragment import Fragment, boxes_of_run

SHAPES = [(), (7,), (3, 5), (4, 1), (1, 6), (2, 3, 4), (3, 1, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boxes_put_end_to_end_are_the_run(shape: tuple[int, ...]) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    for start, stop in itertools.combinations(range(whole.numel() + 1), 2):
        boxes = list(boxes_of_run(shape, start, stop))
        parts = []
        for offset, size in boxes:
            box = whole
            for dim, (o, n) in enumerate(zip(offset, size, strict=True)):
                box = box.narrow(dim, o, n)
            parts.append(box.flatten())
        assert torch.equal(torch.cat(parts), torch.arange(start, stop))
        assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert list(boxes_of_run(shape, 1, 1)) == []


def test_pieces_are_live_and_other_operations_are_refused() -> None:
    run = torch.arange(9.0)
    fragment = Fragment(run, (8, 10), 4, local_shape=(4, 5), offset=(4, 5))
    assert (fragment.shape, fragment.dtype) == (torch.Size((8, 10)), torch.float32)
    assert [p.offset for p in fragment.pieces] == [(4, 9), (5, 5), (6, 5)]
    fragment.pieces[1].values.mul_(-1)
    assert run.tolist() == [0, -1, -2, -3, -4, -5, 6, 7, 8]
    assert fragment.detach() is fragment
    with pytest.raises(NotImplementedError, match="use its pieces"):
        fragment + 1
    assert "3 pieces" in repr(fragment)


def cuts(world: int, numel: int) -> list[int]:
    draw = random.Random(numel)
    return [0, *sorted(draw.randint(0, numel) for _ in range(world - 1)), numel]


def fragments(rank: int, world: int, fill: bool) -> dict[str, torch.Tensor]:
    """A rank's run of each shape; one tensor is split in halves of columns first."""
    out: dict[str, torch.Tensor] = {}
    for i, shape in enumerate([s for s in SHAPES if s]):
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        low, high = cuts(world, whole.numel())[rank : rank + 2]
        run = whole.flatten()[low:high].clone()
        out[f"model.{i}"] = Fragment(run if fill else torch.zeros_like(run), shape, low)
    half = torch.arange(60.0).view(6, 10)[:, 5 * (rank % 2) :][:, :5].reshape(-1)
    low, high = (0, 15) if rank < 2 else (15, 30)
    run = half[low:high].clone()
    run = run if fill else torch.zeros_like(run)
    out["model.split"] = Fragment(run, (6, 10), low, (6, 5), (0, 5 * (rank % 2)))
    return out


@pytest.mark.dist
def test_saved_by_four_ranks_and_read_by_one_and_back(tmp_path: Path) -> None:
    def save(rank: int) -> None:
        group = torch.distributed.group.WORLD
        with Checkpointer(tmp_path, CheckpointConfig(), group) as saver:
            saver.save(1, fragments(rank, 4, True))

    run_ranks(4, save)
    path = tmp_path / "step-00000001"
    assert verify(path) == []
    whole = {f"model.{i}": torch.zeros(s) for i, s in enumerate([s for s in SHAPES if s])}
    whole["model.split"] = torch.zeros(6, 10)
    load_checkpoint(path, whole)
    assert torch.equal(whole["model.split"], torch.arange(60.0).view(6, 10))
    for i in range(len(whole) - 1):
        wanted = torch.randn(whole[f"model.{i}"].shape, generator=torch.Generator().manual_seed(i))
        assert torch.equal(whole[f"model.{i}"], wanted)

    def load(rank: int) -> bool:
        ours, wanted = fragments(rank, 4, False), fragments(rank, 4, True)
        load_checkpoint(path, ours, torch.distributed.group.WORLD)
        return all(
            torch.equal(a.values, b.values)
            for key, value in ours.items()
            for a, b in zip(value.pieces, wanted[key].pieces, strict=True)  # type: ignore[attr-defined]
        )

    assert run_ranks(4, load) == [True] * 4
