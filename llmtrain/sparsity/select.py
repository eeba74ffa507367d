"""Which hidden linear layers are sparse, how, and how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmtrain.config.schema import ModelConfig
from llmtrain.config.sparsity import SparsityConfig
from llmtrain.errors import ConfigError
from llmtrain.model import (
    check_patterns,
    cut_dim,
    layer_names,
    layer_shape,
    named_by,
    split_factor,
)
from llmtrain.sparsity.granularity import Granularity, parse_granularity


@dataclass(frozen=True)
class Sparse:
    """One sparse layer: its name, (outputs, inputs) of the whole weight, and its mask's kind."""

    name: str
    shape: tuple[int, int]
    granularity: Granularity
    density: float


def sparse_layers(model_cfg: ModelConfig, section: SparsityConfig) -> dict[str, Sparse]:
    """The sparse layers of a whole model by name; those of density 1 are left out.

    Raises ConfigError naming the rule whose patterns match no layer, a density that a
    granularity cannot meet, N:M that does not divide, or that nothing is sparse.
    """
    names = layer_names(model_cfg)
    _check_rules(section, names)
    found = {}
    for name in names:
        layer = _choose(name, layer_shape(model_cfg, name), section)
        if layer.density < 1.0:
            layer.granularity.check(layer.shape, layer.density, name)
            found[name] = layer
    if not found:
        raise ConfigError("sparsity: every layer is dense; lower a density, or take it away")
    return found


def packed_dim(name: str) -> int:
    """The dimension along which a layer's mask is packed: not the one that tensor parallelism
    splits, so that its parts are whole bytes."""
    return 1 if cut_dim(name) == 0 else 0


def check_cuts(
    sparse: Mapping[str, Sparse], model_cfg: ModelConfig, ranks: int, double: bool = False
) -> None:
    """Raise ConfigError where one of ``ranks`` tensor-parallel parts of a layer would cut a block.

    double: groups of M outputs stay together as well.
    """
    if ranks == 1:
        return
    for name, layer in sparse.items():
        dim = cut_dim(name)
        if dim is None:
            continue
        column = dim == 0
        if split_factor(name)[0].endswith("attention.qkv") and (model_cfg.n_kv_heads or 1) < ranks:
            raise ConfigError(
                f"parallel.tensor: {name} shares a key/value head between ranks, which masks "
                f"cannot; use at most n_kv_heads = {model_cfg.n_kv_heads}, or leave the layer dense"
            )
        granularity = layer.granularity
        unit = granularity.m if column and double else granularity.unit[0 if column else 1]
        size = layer.shape[0 if column else 1] // ranks
        if size % unit:
            raise ConfigError(
                f"parallel.tensor: {ranks} ranks cut {name} into parts of {size} "
                f"{'outputs' if column else 'inputs'}, through blocks of {granularity.text}; use "
                "another sparsity.granularity or fewer ranks"
            )


def mean_density(model_cfg: ModelConfig, section: SparsityConfig) -> float:
    """Kept share of all weights of the hidden linear layers."""
    sparse = sparse_layers(model_cfg, section)
    kept = total = 0.0
    for name in layer_names(model_cfg):
        rows, columns = layer_shape(model_cfg, name)
        total += rows * columns
        kept += rows * columns * (sparse[name].density if name in sparse else 1.0)
    return kept / total


def _check_rules(section: SparsityConfig, names: list[str]) -> None:
    note = " (embedding and head are always dense)"
    for i, rule in enumerate(section.rules):
        check_patterns(f"sparsity.rules.{i}.layers", rule.layers, names, note)


def _choose(name: str, shape: tuple[int, int], section: SparsityConfig) -> Sparse:
    text, wanted, where = section.granularity, section.density, "sparsity"
    for i, rule in enumerate(section.rules):
        if named_by(name, rule.layers):
            where = f"sparsity.rules.{i}"
            # N:M of a rule has its own density, not the section's.
            if rule.density is not None or rule.granularity is not None:
                wanted = rule.density
            text = rule.granularity or text
    granularity = parse_granularity(text, f"{where}.granularity")
    return Sparse(name, shape, granularity, granularity.density(wanted, f"{where}.density"))
