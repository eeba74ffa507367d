"""Permutations that bring a model's hidden units and heads into the order of another's.

Weight matching of Git Re-Basin (Ainsworth et al. 2023, 2209.04836, eq. 2): the units of one model
are put in the order in which they lie nearest to another's, in the sum of squares over all weights
that touch them. What may be permuted without changing the function of a decoder here:

- the hidden units of an MLP: rows of gate and up with columns of down;
- key/value heads with all of their query heads, and the query heads of one key/value head among
  each other: rows of the projections with columns of the output projection. The order within a
  head stays, since rotary positions rely on it.

The residual stream keeps its order, which every norm and both embeddings share. Hence layers do not
depend on each other and each match is one linear assignment, solved exactly, where the paper, which
permutes the stream as well, has to iterate.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmtrain.config import load_config
from llmtrain.config.schema import ModelConfig
from llmtrain.errors import CheckpointError
from llmtrain.merge.assignment import assign
from llmtrain.merge.sources import Move, Source
from llmtrain.model import resolve_model

# Hugging Face architectures whose layers have Llama's names.
_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "olmo2")


@dataclass(frozen=True)
class _Cut:
    """Where units lie in a tensor: along ``dim``, the places ``at`` [groups, (heads,) places]."""

    name: str
    dim: int
    at: NDArray[np.int64]


@dataclass
class _Units:
    """Units that are permuted together. shared: what a group has once; heads: of its heads."""

    groups: int
    shared: list[_Cut] = field(default_factory=list)
    heads: list[_Cut] = field(default_factory=list)


@dataclass(frozen=True)
class _Shape:
    """What must be known of an architecture."""

    layers: int
    heads: int
    kv_heads: int
    d_head: int
    d_ff: int


def align(
    reference: Mapping[str, Tensor], tensors: Mapping[str, Tensor], cfg: ModelConfig
) -> dict[str, Tensor]:
    """``tensors`` of an llmtrain decoder, units and heads in the order of ``reference``'s.

    The function of the model is the same. Both by parameter name, equal shapes.
    """
    found = _match(_our_units(cfg, set(tensors)), reference.__getitem__, tensors.__getitem__)
    return {
        name: tensors[name].index_select(*found[name]) if name in found else tensors[name]
        for name in tensors
    }


def moves(reference: Source, model: Source) -> dict[str, Move]:
    """What has to be permuted in a model that is merged with ``reference``, layer by layer.

    Raises CheckpointError for an architecture whose units are not known.
    """
    names = set(model.shapes)
    return _match(_units_of(model, names), reference.whole, model.whole)


def _match(
    units: list[_Units], first: Callable[[str], Tensor], second: Callable[[str], Tensor]
) -> dict[str, Move]:
    """By name of a tensor: along which dimension, and which old place comes to each new one."""
    found: dict[str, Move] = {}
    for group in units:
        pairs = {
            cut.name: (first(cut.name), second(cut.name)) for cut in group.shared + group.heads
        }
        by_group, by_head = _best(group, pairs)
        for cut in group.shared + group.heads:
            size = pairs[cut.name][0].shape[cut.dim]
            _, index = found.setdefault(cut.name, (cut.dim, torch.arange(size)))
            old = cut.at[by_group]
            if cut.at.ndim == 3:
                old = np.take_along_axis(old, by_head[:, :, None], axis=1)
            index[torch.from_numpy(cut.at.reshape(-1))] = torch.from_numpy(old.reshape(-1))
    same = {name for name, (_, index) in found.items() if torch.equal(index, index.sort().values)}
    return {name: move for name, move in found.items() if name not in same}


def _best(
    units: _Units, pairs: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each group of the first model the second's, and for each head that of the group's."""
    n = units.groups
    worth = sum((_products(cut, *pairs[cut.name]) for cut in units.shared), np.zeros((n, n)))
    if not units.heads:
        return assign(worth), np.zeros((n, 0), dtype=np.int64)
    per = units.heads[0].at.shape[1]
    both = sum(
        (_products(cut, *pairs[cut.name]) for cut in units.heads), np.zeros((n * per, n * per))
    ).reshape(n, per, n, per)
    inner = np.zeros((n, n, per), dtype=np.int64)
    for i in range(n):
        for j in range(n):
            inner[i, j] = assign(both[i, :, j])
            worth[i, j] += both[i, np.arange(per), j, inner[i, j]].sum()
    chosen = assign(worth)
    return chosen, inner[np.arange(n), chosen]


def _products(cut: _Cut, first: Tensor, second: Tensor) -> NDArray[np.float64]:
    """Inner products of all units of one model with all of the other: [units, units]."""
    places = torch.from_numpy(cut.at.reshape(-1))
    count = int(np.prod(cut.at.shape[:-1]))

    def rows(tensor: Tensor) -> Tensor:
        moved = tensor.detach().movedim(cut.dim, 0).cpu()[places]
        return moved.reshape(count, -1).to(torch.float32)

    return (rows(first) @ rows(second).T).double().numpy()


def _range(*shape: int) -> NDArray[np.int64]:
    return np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)


def _our_units(cfg: ModelConfig, names: set[str]) -> list[_Units]:
    """Units of an llmtrain decoder; see ``model.attention`` and ``model.mlp`` for the order.

    Raises CheckpointError for factors, whose orders depend on each other.
    """
    if cfg.factorized is not None:
        raise CheckpointError(
            "--align: orders units of whole matrices, which model.factorized replaces; leave it out"
        )
    assert cfg.n_kv_heads is not None and cfg.d_head is not None and cfg.d_ff is not None
    groups, per = cfg.n_kv_heads, cfg.n_heads // cfg.n_kv_heads
    rows = _range(groups, per + 2, cfg.d_head)
    gated = 2 if cfg.activation == "swiglu" else 1
    found = []
    for i in range(cfg.n_layers):
        stem = f"blocks.{i}"
        heads = _Units(groups)
        for kind in ("weight", "bias"):
            name = f"{stem}.attention.qkv.{kind}"
            heads.heads.append(_Cut(name, 0, rows[:, :per]))
            heads.shared.append(_Cut(name, 0, rows[:, per:].reshape(groups, -1)))
        heads.heads.append(_Cut(f"{stem}.attention.out.weight", 1, _range(groups, per, cfg.d_head)))
        if cfg.qk_norm == "full":
            for kind in ("weight", "bias"):
                query = _range(groups, per, cfg.d_head)
                heads.heads.append(_Cut(f"{stem}.attention.q_norm.{kind}", 0, query))
                shared = _range(groups, cfg.d_head)
                heads.shared.append(_Cut(f"{stem}.attention.k_norm.{kind}", 0, shared))
        hidden = _Units(cfg.d_ff)
        for kind in ("weight", "bias"):
            hidden.shared.append(_Cut(f"{stem}.mlp.up.{kind}", 0, _range(cfg.d_ff, gated)))
        hidden.shared.append(_Cut(f"{stem}.mlp.down.weight", 1, _range(cfg.d_ff, 1)))
        found += [_present(heads, names), _present(hidden, names)]
    return found


def _their_units(shape: _Shape, names: set[str], sizes: Callable[[str], int]) -> list[_Units]:
    """Units of a Hugging Face model with Llama's names."""
    groups, per, d = shape.kv_heads, shape.heads // shape.kv_heads, shape.d_head
    query, shared, unit = _range(groups, per, d), _range(groups, d), _range(shape.d_ff, 1)
    found = []
    for i in range(shape.layers):
        stem, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        heads, hidden = _Units(groups), _Units(shape.d_ff)
        for kind in ("weight", "bias"):
            heads.heads.append(_Cut(f"{stem}.q_proj.{kind}", 0, query))
            heads.shared += [_Cut(f"{stem}.{p}_proj.{kind}", 0, shared) for p in "kv"]
            hidden.shared += [_Cut(f"{mlp}.{p}_proj.{kind}", 0, unit) for p in ("gate", "up")]
        heads.heads.append(_Cut(f"{stem}.o_proj.weight", 1, query))
        hidden.shared.append(_Cut(f"{mlp}.down_proj.weight", 1, unit))
        norm = f"{stem}.q_norm.weight"
        if norm in names and sizes(norm) == query.size != d:
            heads.heads.append(_Cut(norm, 0, query))
            heads.shared.append(_Cut(f"{stem}.k_norm.weight", 0, shared))
        found += [_present(heads, names), _present(hidden, names)]
    return found


def _present(units: _Units, names: set[str]) -> _Units:
    """Without the biases and norms that a model has not."""
    return _Units(
        units.groups,
        [cut for cut in units.shared if cut.name in names],
        [cut for cut in units.heads if cut.name in names],
    )


def _units_of(model: Source, names: set[str]) -> list[_Units]:
    if model.ours:
        vocab = json.loads(model.files["data.json"])["vocab_size"]
        return _our_units(resolve_model(load_config(model.path / "config.yaml"), vocab), names)
    config = json.loads(model.files.get("config.json", b"{}"))
    kind = config.get("model_type")
    if kind not in _LIKE_LLAMA:
        raise CheckpointError(
            f"align: {model.path} is of model_type {kind!r}, whose heads and hidden units are not "
            f"known ({', '.join(_LIKE_LLAMA)} are); merge without it"
        )
    heads = int(config["num_attention_heads"])
    shape = _Shape(
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        d_head=int(config.get("head_dim") or config["hidden_size"] // heads),
        d_ff=int(config["intermediate_size"]),
    )
    return _their_units(shape, names, lambda name: model.shapes[name][0])
