"""A tiny model with adapters that do something, and the same function without them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from llmtrain.config.adapters import AdapterConfig
from llmtrain.config.schema import ModelConfig
from llmtrain.linear import Change, Linear, LowRank, adapted_weight
from llmtrain.model import Decoder, build_model, complete

VOCAB = 61


def shape(adapters: AdapterConfig | None, **changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    sizes |= {"d_ff": 48, "vocab_size": VOCAB, "vocab_multiple": 8, **changes}
    return complete(ModelConfig(adapters=adapters, **sizes), None, 32)


def built(adapters: AdapterConfig | None, **changes: Any) -> Decoder:
    """A model whose adapters do something: B is random too."""
    cfg = shape(adapters, **changes)
    model = build_model(cfg, seed=1, device="cpu", compute_dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("adapter.b.weight"):
                param.copy_(torch.randn(param.shape, generator=generator) * 0.1)
            if name.endswith("magnitude.weight"):
                param.mul_(1 + 0.1 * torch.randn(param.shape, generator=generator))
    return model


def merged(model: Decoder) -> Decoder:
    """The same function without adapters: every weight with its change added."""
    plain = build_model(
        dataclasses.replace(model.cfg, adapters=None),
        seed=1,
        device="cpu",
        compute_dtype=torch.float32,
    )
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, Linear) and isinstance(layer.adapter, LowRank):
                side = layer.adapter
                length = None if side.magnitude is None else side.magnitude.weight
                change = Change(side.a.weight, side.b.weight, side.scales, side.pattern, length)
                weight = weights[f"{name}.weight"]
                weight.copy_(adapted_weight(weight, change))
    return plain


TOKENS = torch.randint(0, VOCAB, (3, 17), generator=torch.Generator().manual_seed(0))
