"""Sparse-IFT: as many kept weights as the dense model, and branches that are one wider MLP."""

from __future__ import annotations

import pytest
import torch

from llmtrain.config import from_dict
from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.linear import FP32
from llmtrain.model import complete, param_counts
from llmtrain.model.mlp import MLP
from llmtrain.recipes import sparse_ift
from llmtrain.sparsity import mean_density


def sections() -> dict[str, RunConfig]:
    return {
        trial.label: from_dict(
            {key: trial.config[key] for key in ("model", "sparsity") if key in trial.config}
        )
        for trial in sparse_ift.EXPERIMENT.trials("mini")
    }


def kept(cfg: RunConfig) -> float:
    model = complete(cfg.model, 257, 64)
    density = 1.0 if cfg.sparsity is None else mean_density(model, cfg.sparsity)
    beside = sparse_ift._adapter_weights(model)
    return density * param_counts(model)["hidden"] + beside


@pytest.mark.parametrize(
    ("label", "room"),
    [
        (sparse_ift.WIDE, 0.06),
        (sparse_ift.WIDER, 0.06),
        (sparse_ift.PARALLEL, 0.0),
        (sparse_ift.DOPED, 0.11),
    ],
)
def test_as_many_weights_as_the_dense_model(label: str, room: float) -> None:
    """room: widths are multiples of 8, and the low rank is that of a square layer."""
    found = sections()
    dense = kept(found[sparse_ift.DENSE])
    assert abs(kept(found[label]) / dense - 1) <= room
    assert kept(found[sparse_ift.NARROW]) == dense / 2


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_parallel_branches_are_one_wider_mlp(activation: str) -> None:
    """sum_j down_j(act(up_j(x))) of two MLPs, against one with both weights side by side."""
    width, inner = 16, 24
    one = ModelConfig(d_model=width, n_heads=2, d_ff=inner, activation=activation)
    torch.manual_seed(0)
    branches = [MLP(complete(one, 257, 64), FP32, None) for _ in range(2)]
    for param in (p for branch in branches for p in branch.parameters()):
        torch.nn.init.normal_(param, std=0.3)
    factor = sparse_ift.parallel(0.5)
    both = MLP(
        complete(
            ModelConfig(d_model=width, n_heads=2, d_ff=factor * inner, activation=activation),
            257,
            64,
        ),
        FP32,
        None,
    )
    with torch.no_grad():
        both.up.weight.copy_(torch.cat([b.up.weight for b in branches]))
        both.down.weight.copy_(torch.cat([b.down.weight for b in branches], dim=1))
    x = torch.randn(5, width)
    torch.testing.assert_close(both(x), branches[0](x) + branches[1](x), rtol=1e-5, atol=1e-5)
