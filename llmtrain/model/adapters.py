"""Adapters of a decoder, and which of its parameters train."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from llmtrain.config.adapters import AdapterConfig
from llmtrain.config.schema import ModelConfig
from llmtrain.errors import ConfigError
from llmtrain.linear import Change, Linear, LowRank
from llmtrain.model.layers import whole_layers
from llmtrain.model.packing import freeze_layer
from llmtrain.parallel import local_boxes
from llmtrain.parallel.collectives import all_reduce

ADAPTER = ".adapter."
MAGNITUDE = ".adapter.magnitude.weight"
# The matrices of the linear layers, in the order in which their rows of A come.
PARTS = {
    "attention.qkv": ("q", "k", "v"),
    "attention.out": ("out",),
    "mlp.up": ("gate", "up"),
    "mlp.down": ("down",),
}
GROUPS = {"attention": ("q", "k", "v", "out"), "mlp": ("gate", "up", "down")}


@dataclass(frozen=True)
class AdaptedPart:
    """One adapted matrix of a layer: its name, its rank, and the factor on its B A."""

    name: str
    rank: int
    alpha: float
    scale: float


def is_directed(section: AdapterConfig) -> bool:
    """Whether lengths of rows train too (DoRA)."""
    return section.kind.endswith("dora")


def adapted_parts(cfg: ModelConfig, layer: str) -> list[AdaptedPart]:
    """Matrices of a layer (``blocks.3.mlp.up``) that have an adapter, in the order of ``PARTS``."""
    section = cfg.adapters
    assert section is not None
    return [
        _adapted(section, layer, name)
        for name in part_names(cfg, layer)
        if any(_names(target, layer, name) for target in section.targets)
    ]


def part_names(cfg: ModelConfig, layer: str) -> tuple[str, ...]:
    """Matrices of a layer, adapted or not."""
    kind = layer.split(".", 2)[2]
    return PARTS[kind] if kind != "mlp.up" or cfg.activation == "swiglu" else ("up",)


def _names(target: str, layer: str, part: str) -> bool:
    """Whether a target of the config names a matrix."""
    if "." in target or "*" in target:
        return fnmatchcase(layer, target) or fnmatchcase(f"{layer}.{part}", target)
    return part in GROUPS.get(target, (target,))


def _adapted(section: AdapterConfig, layer: str, part: str) -> AdaptedPart:
    ranks = [r for target, r in section.rank_pattern.items() if _names(target, layer, part)]
    alphas = [a for target, a in section.alpha_pattern.items() if _names(target, layer, part)]
    rank = ranks[-1] if ranks else section.rank
    # As in PEFT, a rank of its own does not change a layer's alpha.
    common = 2.0 * section.rank if section.alpha is None else section.alpha
    alpha = alphas[-1] if alphas else common
    root = section.kind.startswith("rs")
    return AdaptedPart(part, rank, alpha, alpha / (math.sqrt(rank) if root else rank))


def row_parts(cfg: ModelConfig, layer: str) -> list[str]:
    """Which matrix each row of a fused layer belongs to (q, k, v; gate, up), repeated over the
    rows; nothing for a layer of one matrix."""
    if layer.endswith("attention.qkv"):
        assert cfg.n_kv_heads is not None and cfg.d_head is not None
        slots = ["q"] * (cfg.n_heads // cfg.n_kv_heads) + ["k", "v"]
        return [slot for slot in slots for _ in range(cfg.d_head)]
    if layer.endswith("mlp.up") and cfg.activation == "swiglu":
        return ["gate", "up"]
    return []


def row_pattern(cfg: ModelConfig, layer: str) -> list[int]:
    """Which adapted matrix each row of a fused layer belongs to, see ``linear.adapter.Spread``."""
    chosen = [part.name for part in adapted_parts(cfg, layer)]
    rows = row_parts(cfg, layer)
    return [chosen.index(part) if part in chosen else -1 for part in rows] or [0]


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
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, Linear)]
    shared = [name for name, layer in layers if not layer.adaptable]
    if any(section.base is not None or adapted_parts(cfg, name) for name in shared):
        raise ConfigError(
            f"parallel.tensor: {shared[0]} shares a key/value head between ranks, which adapters "
            f"and a packed base cannot; use at most n_kv_heads = {cfg.n_kv_heads}"
        )
    for name, layer in layers:
        if section.base is not None and layer.role == "hidden":
            freeze_layer(layer, name, section.base)
        if layer.role == "hidden" and adapted_parts(cfg, name):
            parts = adapted_parts(cfg, name)
            ranks, scales = [part.rank for part in parts], [part.scale for part in parts]
            pattern = row_pattern(cfg, name)
            layer.adapter = LowRank(layer, ranks, scales, pattern, is_directed(section))


@torch.no_grad()
def frozen_lengths(layer: Linear, first: int, n: int) -> torch.Tensor:
    """What DoRA's lengths [n] begin as, from row ``first`` of the whole layer on: those of the
    frozen rows, 0 where a row is not adapted. The rows are those of the layer's weight in this
    rank's memory. Collective over the ranks of a row-parallel layer."""
    assert isinstance(layer.adapter, LowRank)
    read = layer.rows() * layer.plan.scale
    square = (read * read).sum(1)
    if layer.plan.row is not None:
        square = all_reduce(square, layer.plan.row.group)
    own = torch.tensor(layer.adapter.pattern, device=square.device) >= 0
    # A shard of FSDP2 may begin and end anywhere in the pattern.
    rows = torch.arange(first, first + n, device=square.device)
    return square.sqrt() * own[rows % len(own)]


@torch.no_grad()
def set_magnitudes(model: nn.Module) -> None:
    """Set the lengths that DoRA trains to those of the frozen rows, in place.

    For adapters that change nothing yet. Collective over tensor-parallel ranks.
    """
    for layer in model.modules():
        if isinstance(layer, Linear) and isinstance(layer.adapter, LowRank):
            side = layer.adapter
            if side.magnitude is not None:
                length = _stored(side.magnitude.weight)
                _, first = local_boxes(side.magnitude.weight)[0]
                length.copy_(frozen_lengths(layer, first[0], len(length)))


def clear_unused(model: nn.Module, name: str, rows: torch.Tensor, first: int) -> None:
    """Zero the rows of A beyond the rank of their own matrix, in place.

    name: of the parameter; rows: of it, from number ``first``.
    """
    side = model.get_submodule(name.rsplit(".", 2)[0])
    assert isinstance(side, LowRank)
    if name.endswith(".a.weight") and min(side.ranks) < side.rank:
        place = torch.arange(first, first + len(rows), device=rows.device)
        ranks = torch.tensor(side.ranks, device=rows.device)[place // side.rank]
        rows[place % side.rank >= ranks] = 0.0


def _stored(param: torch.Tensor) -> torch.Tensor:
    """The part of a parameter in this rank's memory."""
    return param.to_local() if isinstance(param, DTensor) else param


def whole_change(
    cfg: ModelConfig, layer: str, read: Callable[[str], torch.Tensor]
) -> Change | None:
    """The adapter of a layer from its stored tensors, None where it has none.

    read: a tensor by its name behind the layer's, such as ``adapter.a.weight``.
    """
    parts = [] if cfg.adapters is None else adapted_parts(cfg, layer)
    if not parts or cfg.adapters is None:
        return None
    magnitude = read("adapter.magnitude.weight") if is_directed(cfg.adapters) else None
    a, b = read("adapter.a.weight").float(), read("adapter.b.weight").float()
    return Change(a, b, [part.scale for part in parts], row_pattern(cfg, layer), magnitude)


def check_targets(cfg: ModelConfig) -> None:
    """Raise ConfigError for a target that names no matrix of the model, or a rank or alpha of one
    that is not adapted."""
    section = cfg.adapters
    assert section is not None
    layers = whole_layers(cfg)
    matrices = [(layer, part) for layer in layers for part in part_names(cfg, layer)]
    if not section.targets:
        raise ConfigError("model.adapters.targets: is empty; name what is adapted: attention, mlp")
    for target in section.targets:
        if not any(_names(target, *matrix) for matrix in matrices):
            raise ConfigError(f"model.adapters.targets: {_none(target, cfg, layers)}")
    adapted = [m for m in matrices if any(_names(target, *m) for target in section.targets)]
    for key in ("rank_pattern", "alpha_pattern"):
        for target in getattr(section, key):
            if not any(_names(target, *matrix) for matrix in adapted):
                raise ConfigError(
                    f"model.adapters.{key}: {target!r} names nothing that model.adapters.targets "
                    "adapts; take it away, or add it there"
                )


def unlike(theirs: AdapterConfig, cfg: ModelConfig) -> str | None:
    """The first matrix that adapters of ``theirs`` adapt otherwise than those of ``cfg`` do, in
    words; None where both compute the same from the same values. Shapes alone would not tell."""
    other = replace(cfg, adapters=theirs)
    for layer in whole_layers(cfg):
        pairs = [{p.name: p for p in adapted_parts(c, layer)} for c in (other, cfg)]
        for name in part_names(cfg, layer):
            there, here = (_words(pair.get(name)) for pair in pairs)
            if there != here:
                return f"{layer} ({name}) has {there} there and {here} in this run"
    return None


def _words(part: AdaptedPart | None) -> str:
    if part is None:
        return "no adapter"
    return f"an adapter of rank {part.rank} with alpha {part.alpha:g} (factor {part.scale:.4g})"


def _none(target: str, cfg: ModelConfig, layers: list[str]) -> str:
    if "." in target or "*" in target:
        return f"{target!r} matches no layer; they are {layers[0]} to {layers[-1]}"
    known = {name for layer in layers for name in part_names(cfg, layer)} | GROUPS.keys()
    return f"{target!r} is no matrix of this model; there are {', '.join(sorted(known))}"
