"""The factors m / |V| of DoRA in bf16: against float64, and under FSDP2 against one process."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.layout_runs import add_whole, build, case, rank_batch
from helpers.ranks import run_ranks
from torch import Tensor

from llmtrain.config.adapters import AdapterConfig
from llmtrain.linear import Linear, LowRank, adapter
from llmtrain.train.module import TrainModule

pytestmark = pytest.mark.dist

# Rows of q and gate are not adapted; ranks and scales of their own.
SECTION = AdapterConfig(
    "dora",
    rank=3,
    targets=["k", "v", "out", "up", "down"],
    rank_pattern={"v": 2},
    alpha_pattern={"up": 3.0},
)
LAYERS = 2
CASE = dataclasses.replace(case(n_layers=LAYERS, adapters=SECTION), compute=torch.bfloat16)
ROUND = torch.finfo(torch.bfloat16).eps / 2


def directed(rank: int, world: int) -> TrainModule:
    """A module whose adapters do something."""
    module = build(rank, world, CASE, {})
    with torch.no_grad():
        for i, (name, param) in enumerate(module.params.items()):
            if name.endswith("adapter.b.weight"):
                draw = torch.Generator().manual_seed(i)
                add_whole(param, 0.1 * torch.randn(param.shape, generator=draw))
    return module


def factors(module: TrainModule, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What a forward pass multiplies the rows of each adapted layer by, in the model's order."""
    seen: list[Tensor] = []
    real = adapter._ScaleRows

    class Seen:
        @staticmethod
        def apply(z: Tensor, factor: Tensor) -> Tensor:
            assert z.dtype == torch.bfloat16
            seen.append(factor.detach().clone())
            out: Tensor = real.apply(z, factor)  # type: ignore[no-untyped-call]
            return out

    with monkeypatch.context() as patch:
        patch.setattr(adapter, "_ScaleRows", Seen)
        module.forward_backward(rank_batch(module, 0), 1.0, 2)
    # Each micro-batch multiplies by the same.
    count = 4 * LAYERS
    assert len(seen) > count and all(map(torch.equal, seen[count:], seen))
    return seen[:count]


def exact(layer: Linear, side: LowRank) -> tuple[Tensor, Tensor]:
    """Of the stored float32 numbers, in float64: m / |V| of each row, and how far the relative
    error of a factor may be.

    With the unit roundoff u each weight, A and B are rounded to bf16 once, so that a row of V is
    off by at most |u |W| + (2 u + u^2) s |B| |A|| = d |V|; m and |V| are rounded once more. The
    sums of squares are float32: n terms of a size that may cancel.
    """
    assert side.magnitude is not None
    weight, a, b = (x.detach().double() for x in (layer.weight, side.a.weight, side.b.weight))
    own = torch.tensor(side.pattern).repeat(len(weight) // len(side.pattern))
    change, size = torch.zeros_like(weight), torch.zeros_like(weight)
    for part, scale in enumerate(side.scales):
        mine, rows = own == part, a[part * side.rank : (part + 1) * side.rank]
        change[mine] = scale * (b[mine] @ rows)
        size[mine] = scale * (b[mine].abs() @ rows.abs())
    length = (weight + change).norm(dim=1)
    off = (ROUND * weight.abs() + (2 * ROUND + ROUND**2) * size).norm(dim=1) / length
    terms = weight.shape[1] + 3 * side.rank
    off += terms * 2**-24 * ((weight.abs() + size).norm(dim=1) / length) ** 2
    bound = (1 + ROUND) / ((1 - ROUND) * (1 - off)) - 1
    adapted = own >= 0
    factor = torch.where(adapted, side.magnitude.weight.detach().double() / length, 1.0)
    return factor, torch.where(adapted, bound, 0.0)


def test_factors_are_those_of_float64_and_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 gathers bf16, one process keeps float32: both compute with the same bits."""
    alone = directed(0, 1)
    layers = [m for m in alone.model.modules() if isinstance(m, Linear)]
    sides = [(m, m.adapter) for m in layers if isinstance(m.adapter, LowRank)]
    expected = [exact(layer, side) for layer, side in sides]
    ours = factors(alone, monkeypatch)
    for factor, (true, bound) in zip(ours, expected, strict=True):
        assert bound.max() < 6 * ROUND
        assert ((factor.double() - true).abs() <= bound * true.abs()).all()
        assert (factor - 1).abs().max() > 0.05
    for sharded in run_ranks(2, lambda rank: factors(directed(rank, 2), monkeypatch)):
        assert all(map(torch.equal, sharded, ours))
