"""bf16 training under FSDP2 equals the same on one process; recomputation under FSDP2 too."""

from __future__ import annotations

import pytest
import torch
from helpers.ranks import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.schema import LossConfig, ModelConfig
from llmtrain.loss import head_loss
from llmtrain.model import Decoder, apply_recompute, complete, init_weights
from llmtrain.parallel import apply_fsdp

pytestmark = pytest.mark.dist

STEPS, BATCH, SEQ = 4, 4, 24


def _train(world: int, rank: int, dtype: torch.dtype, recompute: str, tied: bool) -> list[float]:
    cfg = complete(
        ModelConfig(
            vocab_size=97,
            d_model=64,
            n_layers=2,
            n_heads=2,
            init_std=0.05,
            tie_embeddings=tied,
        ),
        None,
        SEQ,
    )
    with torch.device("meta"):
        model = Decoder(cfg, dtype)
    apply_recompute(model, recompute)
    if world > 1:
        mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("replicate", "shard"))
        apply_fsdp(model, model.blocks, mesh, ParallelConfig(), (dtype, torch.float32))
    model.to_empty(device="cpu")
    init_weights(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 97, (BATCH, SEQ + 1), generator=generator)
        tokens = tokens.chunk(world)[rank]
        inputs, targets = tokens[:, :-1], tokens[:, 1:]

        def head_fn(hidden: Tensor, head: object, targets: Tensor = targets) -> Tensor:
            weights = torch.ones(targets.shape)
            loss_cfg = LossConfig(chunk_tokens=17)
            return head_loss(hidden, head, targets, weights, loss_cfg, BATCH * SEQ).loss  # type: ignore[arg-type]

        loss = model(inputs, head_fn=head_fn)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world > 1:
            torch.distributed.all_reduce(total)
        losses.append(float(total))
    return losses


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("dtype", "recompute", "tolerance"),
    [
        (torch.float32, "none", 2e-6),
        (torch.bfloat16, "none", 2e-3),
        (torch.bfloat16, "selective", 2e-3),
        (torch.bfloat16, "full", 2e-3),
    ],
)
def test_sharded_training_equals_one_process(
    dtype: torch.dtype, recompute: str, tolerance: float, tied: bool
) -> None:
    alone = _train(1, 0, dtype, recompute, tied)
    assert alone[0] != alone[-1]
    ranks = run_ranks(2, lambda rank: _train(2, rank, dtype, recompute, tied))
    assert ranks[0] == ranks[1]
    assert torch.allclose(torch.tensor(ranks[0]), torch.tensor(alone), rtol=0, atol=tolerance)
