"""A decoder split over tensor-parallel ranks against the whole one: loss, logits, gradients.

Odd numbers of tokens (padding), fewer key/value heads than ranks, every norm, bias and
activation that a split touches, gathered inputs kept or not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.layout_runs import VOCAB, add_whole
from helpers.ranks import run_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.schema import LossConfig, ModelConfig
from llmtrain.loss import head_loss
from llmtrain.model import (
    Decoder,
    apply_recompute,
    complete,
    init_weights,
    shard_over_tensor,
)
from llmtrain.parallel import World, build_layout, finish_gradients

ALL_BIASES = {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"n_kv_heads": 4},
    "grouped": {"n_kv_heads": 2, "tie_embeddings": True},
    "one key head": {"n_kv_heads": 1, **ALL_BIASES},
    "olmo2": {"n_kv_heads": 2, "qk_norm": "full", "norm_placement": "post_branch"},
    "olmo2, one key head": {"n_kv_heads": 1, "qk_norm": "full", "norm_bias": True},
    "qwen3": {"n_kv_heads": 2, "qk_norm": "head", **ALL_BIASES},
    "gpt2": {
        "norm": "layernorm",
        "norm_bias": True,
        "position": "learned",
        "activation": "gelu",
        "tie_embeddings": True,
        **ALL_BIASES,
    },
}
LOSS = LossConfig(z_loss=1e-3, label_smoothing=0.1, chunk_tokens=20)
MODES = [
    ParallelConfig(),
    ParallelConfig(keep_gathered=True),
    ParallelConfig(sequence=False),
]


def _config(name: str) -> ModelConfig:
    shape = {"d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48, "vocab_multiple": 8}
    return complete(ModelConfig(**{**shape, **SHAPES[name], "vocab_size": VOCAB}), VOCAB, 17)


def _fill(model: Decoder) -> None:
    model.to_empty(device="cpu")
    init_weights(model, seed=3)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() == 1:
                draw = torch.Generator().manual_seed(len(name))
                add_whole(param, 0.1 * torch.randn(param.shape, generator=draw))


def _run(model: Decoder) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (backward done), nll and, without gradients, logits of an odd batch."""
    draw = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(0, VOCAB, (3, 17), generator=draw) for _ in range(2))
    weights = torch.rand(3, 17, generator=draw)
    docs = (torch.rand(3, 17, generator=draw) < 0.2).long().cumsum(1)
    out = model(
        tokens,
        doc_ids=docs,
        head_fn=lambda hidden, head: head_loss(hidden, head, targets, weights, LOSS, 7.0),
    )
    out.loss.backward()
    with torch.no_grad():
        logits = model(tokens[:1, :1])
    return out.loss.detach(), out.nll, logits


def _whole(name: str) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    with torch.device("meta"):
        model = Decoder(_config(name))
    _fill(model)
    out = _run(model)
    return out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _split(rank: int, world: int, name: str, parallel: dict[str, Any], recompute: str) -> Any:
    cfg = _config(name)
    place = World(rank, world, rank, torch.device("cpu"), None)
    assert cfg.n_kv_heads is not None
    layout = build_layout(ParallelConfig(tensor=world, **parallel), place, cfg.n_kv_heads)
    assert layout.tensor is not None and layout.state is not None
    with torch.device("meta"):
        model = Decoder(cfg, torch.float32, layout.tensor)
    apply_recompute(model, recompute)
    shard_over_tensor(model, layout.state["tensor"])
    _fill(model)
    out = _run(model)
    finish_gradients(list(model.parameters()), layout.tensor.group)
    grads = {}
    for key, param in model.named_parameters():
        assert isinstance(param.grad, DTensor) and param.grad.placements == param.placements
        grads[key] = param.grad.full_tensor()
    return out, grads


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 4])
def test_split_equals_whole(world: int) -> None:
    wanted = {name: _whole(name) for name in SHAPES}
    modes = [{"sequence": mode.sequence, "keep_gathered": mode.keep_gathered} for mode in MODES]

    def body(rank: int) -> list[Any]:
        return [
            _split(rank, world, name, mode, "none")
            for name in SHAPES
            for mode in (modes if world == 2 else modes[:1])
        ]

    for results in run_ranks(world, body, timeout=240):
        each = iter(results)
        for name in SHAPES:
            for mode in modes if world == 2 else modes[:1]:
                _compare(next(each), wanted[name], f"{name} {mode}")


@pytest.mark.dist
def test_recomputation_repeats_the_collectives() -> None:
    wanted = _whole("grouped")
    modes = ("selective", "full")

    def body(rank: int) -> list[Any]:
        return [_split(rank, 2, "grouped", {}, mode) for mode in modes]

    for results in run_ranks(2, body):
        for mode, result in zip(modes, results, strict=True):
            _compare(result, wanted, mode)


def _compare(result: Any, wanted: Any, what: str) -> None:
    (loss, nll, logits), grads = result
    (loss1, nll1, logits1), grads1 = wanted
    torch.testing.assert_close(loss, loss1, rtol=1e-6, atol=0, msg=what)
    torch.testing.assert_close(nll, nll1, rtol=0, atol=3e-6, msg=what)
    torch.testing.assert_close(logits, logits1, rtol=0, atol=3e-6, msg=what)
    assert grads.keys() == grads1.keys()
    scale = max(float(g.norm()) for g in grads1.values())
    for key, grad in grads1.items():
        # Round-off is that of the whole backward pass: gradients that cancel to nearly nothing
        # (key biases) are compared on the scale of the others.
        bound = 2e-6 * max(float(grad.norm()), 1e-2 * scale)
        assert float((grads[key] - grad).norm()) <= bound, f"{what}: {key}"
