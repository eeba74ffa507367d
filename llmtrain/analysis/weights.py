"""The single matrices of a model, read one at a time from a checkpoint or a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmtrain.checkpoint import MODEL_PREFIX, read_files
from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.finding import find
from llmtrain.checkpoint.layout import TensorLayout, read_layout
from llmtrain.checkpoint.tensors import read_tensor
from llmtrain.config import load_config
from llmtrain.config.schema import ModelConfig
from llmtrain.convert.folder import CONFIG, ModelFolder
from llmtrain.convert.incoming import open_huggingface
from llmtrain.convert.names import Rule
from llmtrain.convert.scaling import fold_factor
from llmtrain.errors import CheckpointError
from llmtrain.linear import adapted_weight
from llmtrain.model import ADAPTER, PARTS, complete, whole_change

_FUSED = {"attention.qkv": ("qkv", PARTS["attention.qkv"]), "mlp.up": ("gated", PARTS["mlp.up"])}


@dataclass(frozen=True)
class Matrices:
    """A model as its matrices: ``blocks.3.attention.q``, ``blocks.0.mlp.gate``, ``embedding`` ...

    What lies in one tensor here (q, k and v; gate and up) is taken apart; adapters and the
    multipliers of a parametrisation are part of the weights. path: the checkpoint or
    folder; warnings: newer checkpoints passed over.
    """

    path: Path
    cfg: ModelConfig
    names: dict[str, tuple[int, ...]]
    warnings: list[str]
    read_layer: Callable[[str], Tensor]

    def layers(self) -> dict[str, tuple[str, ...]]:
        """The tensors, and the names of the matrices in each."""
        return {name: _members(name, self.cfg) for name in self.names}

    def read(self, layer: str) -> dict[str, Tensor]:
        """The matrices [out, in] in one tensor, float32. Rows of padding are left out."""
        whole = self.read_layer(layer).float()
        members = _members(layer, self.cfg)
        if len(members) == 1:
            if layer in ("embedding", "head.projection"):
                whole = whole[: self.cfg.vocab_size]
            return {members[0]: whole}
        kind, _ = _FUSED[layer.split(".", 2)[2]]
        parts = Rule("", (), kind).split(whole, self.cfg)
        return dict(zip(members, parts, strict=True))


def open_matrices(path: str | Path) -> Matrices:
    """Open a checkpoint, a run's newest good one, or a Hugging Face folder.

    Raises CheckpointError naming what is missing, damaged or of an unknown architecture.
    """
    place = Path(path).expanduser()
    if (place / CONFIG).exists() and not (place / "config.yaml").exists():
        folder, cfg, rules = open_huggingface(place)
        return _of_folder(folder, cfg, rules)
    found, faults = find(Ranks(None), place, MODEL_PREFIX)
    files = read_files(found)
    if "config.yaml" not in files or "data.json" not in files:
        raise CheckpointError(f"{found} has no config.yaml: it was not saved by llmtrain")
    run = load_config(found / "config.yaml")
    cfg = complete(run.model, json.loads(files["data.json"])["vocab_size"], run.data.seq_len)
    layout = read_layout(found)
    names: dict[str, tuple[int, ...]] = {
        key.removeprefix(MODEL_PREFIX).removesuffix(".weight"): entry.shape
        for key, entry in layout.items()
        if key.startswith(MODEL_PREFIX) and len(entry.shape) == 2 and ADAPTER not in key
    }
    warnings = [f"{fault}; {found.name} is used instead" for fault in faults]
    return Matrices(found, cfg, names, warnings, _Ours(found, layout, cfg))


class _Ours:
    """Reads a tensor of a checkpoint, the change of its adapter added."""

    def __init__(self, path: Path, layout: dict[str, TensorLayout], cfg: ModelConfig) -> None:
        self._path, self._layout, self._cfg = path, layout, cfg

    def __call__(self, layer: str) -> Tensor:
        name = f"{layer}.weight"
        whole = self._tensor(name).float() * fold_factor(self._cfg, name)
        change = whole_change(self._cfg, layer, lambda side: self._tensor(f"{layer}.{side}"))
        return whole if change is None else adapted_weight(whole, change)

    def _tensor(self, name: str) -> Tensor:
        key = MODEL_PREFIX + name
        return read_tensor(self._path, key, self._layout[key])


def _of_folder(folder: ModelFolder, cfg: ModelConfig, rules: list[Rule]) -> Matrices:
    by_layer = {r.ours.removesuffix(".weight"): r for r in rules if r.ours.endswith(".weight")}

    def read(layer: str) -> Tensor:
        rule = by_layer[layer]
        return rule.join([folder.read(name) for name in rule.theirs], cfg)

    names: dict[str, tuple[int, ...]] = {}
    for layer, rule in by_layer.items():
        shapes = [torch.empty(folder.shape(name), device="meta") for name in rule.theirs]
        if shapes[0].dim() == 2:
            names[layer] = tuple(rule.join(shapes, cfg).shape)
    return Matrices(folder.path, cfg, names, [], read)


def _members(layer: str, cfg: ModelConfig) -> tuple[str, ...]:
    """Names of the matrices in a tensor, in the order of its parts."""
    if not layer.startswith("blocks."):
        return (layer.removesuffix(".projection"),)
    stem, kind = layer.rpartition(".")[0], layer.split(".", 2)[2]
    if kind not in _FUSED or (kind == "mlp.up" and cfg.activation != "swiglu"):
        return (layer,)
    return tuple(f"{stem}.{part}" for part in _FUSED[kind][1])


def check_same(a: Matrices, b: Matrices) -> None:
    """Raise CheckpointError naming a matrix that two models do not have alike."""
    for first, second in ((a, b), (b, a)):
        lacking = sorted(first.names.keys() - second.names.keys())
        if lacking:
            raise CheckpointError(
                f"{second.path} has no {lacking[0]}, which {first.path} has: they are models of "
                "different shapes"
            )
    for name, shape in a.names.items():
        # The vocabulary may be padded on one side only.
        start = 1 if _members(name, a.cfg)[0] in ("embedding", "head") else 0
        if shape[start:] != b.names[name][start:] or a.cfg.vocab_size != b.cfg.vocab_size:
            raise CheckpointError(
                f"{name} is {list(shape)} in {a.path} and {list(b.names[name])} in {b.path}: they "
                "are models of different shapes"
            )
