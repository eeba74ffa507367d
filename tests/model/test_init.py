"""Initial weights: what they are, and what they do not depend on."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from llmtrain.config.schema import ModelConfig
from llmtrain.model import Decoder, build_model, complete, init, param_roles

CFG = complete(
    ModelConfig(
        vocab_size=300,
        d_model=64,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        norm_bias=True,
        attention_bias=True,
        position="learned",
        qk_norm="head",
    ),
    None,
    32,
)


def _built(cfg: ModelConfig = CFG, seed: int = 0) -> dict[str, torch.Tensor]:
    model = build_model(cfg, seed=seed, device="cpu", compute_dtype=torch.float32)
    return {name: p.detach() for name, p in model.named_parameters()}


def test_roles_and_their_values() -> None:
    roles = param_roles(Decoder(CFG))
    for name, value in _built().items():
        if roles[name] == "norm":
            assert torch.equal(value, torch.ones_like(value)), name
        elif roles[name] == "bias":
            assert not value.any(), name
        else:
            small = name.endswith(("attention.out.weight", "mlp.down.weight"))
            std = 0.02 / (6**0.5 if small else 1)
            # Six standard errors of a standard deviation and of a mean.
            assert abs(value.std().item() / std - 1) < 6 / (2 * value.numel()) ** 0.5, name
            assert abs(value.mean().item() / std) < 6 / value.numel() ** 0.5, name
    assert {roles[n] for n in roles} == {"embedding", "hidden", "norm", "head", "bias"}
    assert roles["embedding.weight"] == roles["position_embedding.weight"] == "embedding"
    assert roles["head.projection.weight"] == "head"
    assert roles["blocks.1.attention.q_norm.weight"] == "norm"
    assert roles["blocks.1.attention.qkv.bias"] == roles["final_norm.bias"] == "bias"
    assert roles["blocks.2.mlp.up.weight"] == "hidden"


def test_values_are_normal_and_rows_and_names_differ() -> None:
    weights = _built()
    up = weights["blocks.0.mlp.up.weight"] / 0.02
    n = up.numel()
    # Kolmogorov-Smirnov distance to the normal distribution; beyond 2.2 / sqrt(n): p < 1e-4.
    below = torch.special.ndtr(up.flatten().double().sort().values)
    assert (below - (torch.arange(n) + 0.5) / n).abs().max() < 2.2 / n**0.5
    other = weights["blocks.1.mlp.up.weight"] / 0.02
    assert abs(np.corrcoef(up.flatten(), other.flatten())[0, 1]) < 0.05
    assert len({tuple(row[:4].tolist()) for row in up}) == len(up)


def test_seed_and_name_decide() -> None:
    first, again, other = _built(seed=1), _built(seed=1), _built(seed=2)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        if value.dim() == 2:
            assert not torch.equal(value, other[name])
    deeper = _built(replace(CFG, n_layers=5, init_depth_scale=False), seed=1)
    same = "blocks.2.attention.qkv.weight"
    assert torch.equal(first[same], deeper[same])
    wider = _built(replace(CFG, vocab_size=600), seed=1)["embedding.weight"]
    assert torch.equal(first["embedding.weight"][:300], wider[:300])


def test_pieces_join_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "CHUNK_VALUES", 100)
    whole = init.normal_rows(3, "x", (37, 5, 3), 0, 37)
    assert whole.shape == (37, 5, 3)
    for bounds in ([0, 1, 5, 6, 7, 12, 36, 37], [0, 19, 37]):
        parts = [init.normal_rows(3, "x", (37, 5, 3), a, b) for a, b in pairwise(bounds)]
        assert torch.equal(torch.cat(parts), whole)
