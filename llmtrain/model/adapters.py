"""Adapters of a decoder, and which of its parameters train."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase

from torch import nn

from llmtrain.config.adapters import AdapterConfig
from llmtrain.config.schema import ModelConfig
from llmtrain.errors import ConfigError
from llmtrain.linear import Linear, LowRank

ADAPTER = ".adapter."
# The matrices of the linear layers, in the order in which their rows of A come.
PARTS = {
    "attention.qkv": ("q", "k", "v"),
    "attention.out": ("out",),
    "mlp.up": ("gate", "up"),
    "mlp.down": ("down",),
}
GROUPS = {"attention": ("q", "k", "v", "out"), "mlp": ("gate", "up", "down")}


def adapter_scale(section: AdapterConfig) -> float:
    """The factor on B A: alpha / rank, or alpha / sqrt(rank) for rslora."""
    alpha = 2.0 * section.rank if section.alpha is None else section.alpha
    return alpha / (section.rank if section.kind == "lora" else math.sqrt(section.rank))


def adapted_parts(cfg: ModelConfig, layer: str) -> tuple[str, ...]:
    """Matrices of a layer (``blocks.3.mlp.up``) that have an adapter, by their names."""
    assert cfg.adapters is not None
    kind = layer.split(".", 2)[2]
    names = PARTS[kind] if kind != "mlp.up" or cfg.activation == "swiglu" else ("up",)
    chosen: list[str] = []
    for target in cfg.adapters.targets:
        if "." in target or "*" in target:
            chosen += names if fnmatchcase(layer, target) else ()
        else:
            chosen += [name for name in GROUPS.get(target, (target,)) if name in names]
    return tuple(name for name in names if name in chosen)


def row_pattern(cfg: ModelConfig, layer: str) -> list[int]:
    """Which adapted matrix each row of a fused layer belongs to, see ``linear.adapter.Spread``."""
    chosen = adapted_parts(cfg, layer)
    if layer.endswith("attention.qkv"):
        assert cfg.n_kv_heads is not None and cfg.d_head is not None
        queries = cfg.n_heads // cfg.n_kv_heads
        slots = ["q"] * queries + ["k", "v"]
        return [chosen.index(s) if s in chosen else -1 for s in slots for _ in range(cfg.d_head)]
    if layer.endswith("mlp.up") and cfg.activation == "swiglu":
        return [chosen.index(s) if s in chosen else -1 for s in ("gate", "up")]
    return [0]


def add_adapters(model: nn.Module, cfg: ModelConfig) -> None:
    """Give the layers that ``cfg.adapters.targets`` names an adapter and, unless ``freeze`` is
    false, freeze all else.

    model: a decoder on the meta device. Raises ConfigError for a layer that cannot have one.
    """
    section = cfg.adapters
    assert section is not None
    if section.freeze:
        for param in model.parameters():
            param.requires_grad_(False)
    scale = adapter_scale(section)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, Linear)]
    for name, layer in layers:
        if layer.role == "hidden" and adapted_parts(cfg, name):
            if not layer.adaptable:
                raise ConfigError(
                    f"parallel.tensor: {name} shares a key/value head between ranks, which "
                    f"adapters cannot; use at most n_kv_heads = {cfg.n_kv_heads}"
                )
            layer.adapter = LowRank(layer, section.rank, scale, row_pattern(cfg, name))


def check_targets(cfg: ModelConfig) -> None:
    """Raise ConfigError for one of ``cfg.adapters.targets`` that names no layer of the model."""
    assert cfg.adapters is not None
    layers = [f"blocks.{i}.{kind}" for i in range(cfg.n_layers) for kind in PARTS]
    known = {part for parts in PARTS.values() for part in parts} | GROUPS.keys()
    if cfg.activation != "swiglu":
        known.discard("gate")
    if not cfg.adapters.targets:
        raise ConfigError("model.adapters.targets: is empty; name what is adapted: attention, mlp")
    for target in cfg.adapters.targets:
        pattern = "." in target or "*" in target
        if pattern and not any(fnmatchcase(layer, target) for layer in layers):
            raise ConfigError(
                f"model.adapters.targets: {target!r} matches no layer; they are {layers[0]} to "
                f"{layers[-1]}"
            )
        if not pattern and target not in known:
            raise ConfigError(
                f"model.adapters.targets: {target!r} is no matrix of this model; there are "
                f"{', '.join(sorted(known))}"
            )
