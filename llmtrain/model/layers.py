"""The hidden linear layers of a model: their names, their shapes, and where they are cut."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase

from llmtrain.config.schema import ModelConfig
from llmtrain.errors import ConfigError

KINDS = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
# Kinds of which tensor parallelism splits the outputs; of the others it splits the inputs.
_COLUMN = ("attention.qkv", "mlp.up")
# What a layer consists of under ``model.factorized``, in the order in which they run.
FACTORS = ("u", "v")


def widths(cfg: ModelConfig) -> tuple[int, int, int]:
    """Widths of all query heads, of all key (or value) heads, and of the MLP."""
    assert cfg.n_kv_heads is not None and cfg.d_head is not None and cfg.d_ff is not None
    return cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head, cfg.d_ff


def whole_shape(cfg: ModelConfig, kind: str) -> tuple[int, int]:
    """(outputs, inputs) of the layers of a kind of a resolved ``cfg``, factorized or not."""
    q, kv, ff = widths(cfg)
    up = 2 * ff if cfg.activation == "swiglu" else ff
    shapes = {
        "attention.qkv": (q + 2 * kv, cfg.d_model),
        "attention.out": (cfg.d_model, q),
        "mlp.up": (up, cfg.d_model),
        "mlp.down": (cfg.d_model, ff),
    }
    return shapes[kind]


def whole_layers(cfg: ModelConfig) -> list[str]:
    """Names of all hidden linear layers of a model as if none were factorized."""
    return [f"blocks.{block}.{kind}" for block in range(cfg.n_layers) for kind in KINDS]


def block_layers(cfg: ModelConfig, block: int) -> list[str]:
    """Names of the hidden linear layers of a block; factors instead of a factorized one."""
    found = []
    for layer in (f"blocks.{block}.{kind}" for kind in KINDS):
        whole = inner_width(cfg, layer) is None
        found += [layer] if whole else [f"{layer}.{factor}" for factor in FACTORS]
    return found


def layer_names(cfg: ModelConfig) -> list[str]:
    """Names of all hidden linear layers of a model, whatever part of it this rank has."""
    return [name for block in range(cfg.n_layers) for name in block_layers(cfg, block)]


def layer_shape(cfg: ModelConfig, name: str) -> tuple[int, int]:
    """(outputs, inputs) of a hidden linear layer of a resolved ``cfg`` by its name."""
    layer, factor = split_factor(name)
    rows, columns = whole_shape(cfg, layer.split(".", 2)[2])
    if not factor:
        return rows, columns
    inner = inner_width(cfg, layer)
    assert inner is not None
    return (inner, columns) if factor == "u" else (rows, inner)


def split_factor(name: str) -> tuple[str, str]:
    """("blocks.3.mlp.up", "u") of blocks.3.mlp.up.u; a layer that is no factor has ""."""
    stem, _, leaf = name.rpartition(".")
    return (stem, leaf) if leaf in FACTORS else (name, "")


def is_hidden_layer(name: str) -> bool:
    """Whether a module of this name is a hidden linear layer."""
    return split_factor(name)[0].endswith(KINDS)


def inner_width(cfg: ModelConfig, layer: str) -> int | None:
    """Outputs of u, which are the inputs of v, of a layer; None where it is not factorized.

    in out / (d_u in + d_v out), rounded up: u and v of these densities together have as many kept
    weights as the layer (2303.11525, section 3; 1 / (1 - s) in out / (in + out) for equal ones).
    """
    section = cfg.factorized
    if section is None or not named_by(layer, section.layers):
        return None
    rows, columns = whole_shape(cfg, layer.split(".", 2)[2])
    cost = section.density_u * columns + section.density_v * rows
    # Densities such as 0.1 are not exact: 64.00000000000001 is 64.
    exact = math.ceil(rows * columns / cost * (1 - 1e-12))
    return -(-exact // section.multiple_of) * section.multiple_of


def cut_dim(name: str) -> int | None:
    """The dimension of a layer's weight that tensor parallelism splits: 0 outputs, 1 inputs; None:
    each rank has all of it, as it has of the factor that lies towards the residual stream."""
    layer, factor = split_factor(name)
    column = layer.endswith(_COLUMN)
    if factor == ("u" if column else "v"):
        return None
    return 0 if column else 1


def whole_weights(cfg: ModelConfig) -> int:
    """Elements of the hidden weights that every tensor-parallel rank has all of."""
    return sum(
        count * math.prod(layer_shape(cfg, name))
        for block, count in count_alike(cfg, range(cfg.n_layers)).items()
        for name in block_layers(cfg, block)
        if cut_dim(name) is None
    )


def query_inputs(cfg: ModelConfig, block: int) -> int:
    """Inputs of the product that makes queries, keys and values of a block."""
    return inner_width(cfg, f"blocks.{block}.attention.qkv") or cfg.d_model


def count_alike(cfg: ModelConfig, blocks: Collection[int]) -> dict[int, int]:
    """Block -> how many of ``blocks`` have layers of its shapes: without factors all of them, so
    that closed forms of a model look at one block."""
    if cfg.factorized is not None:
        return dict.fromkeys(blocks, 1)
    return {block: len(blocks) for block in list(blocks)[:1]}


def named_by(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns of a config (``*.mlp.*``) names a layer."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(key: str, patterns: Iterable[str], names: Sequence[str], note: str = "") -> None:
    """Raise ConfigError naming the ``key`` of a pattern that names none of the layers ``names``."""
    for pattern in patterns:
        if not any(named_by(name, [pattern]) for name in names):
            raise ConfigError(
                f"{key}: {pattern!r} matches no hidden linear layer; they are called {names[0]} to "
                f"{names[-1]}{note}"
            )


def check_factorized(cfg: ModelConfig) -> None:
    """Raise ConfigError where ``model.factorized`` of a resolved ``cfg`` cannot be."""
    section = cfg.factorized
    if section is None:
        return
    if cfg.adapters is not None:
        raise ConfigError(
            "model.adapters: adapters and packed weights are of whole matrices, which "
            "model.factorized replaces; take one of the two away"
        )
    check_patterns("model.factorized.layers", section.layers, whole_layers(cfg))
    if not section.layers:
        raise ConfigError("model.factorized.layers: is empty; name layers, or take it away")
