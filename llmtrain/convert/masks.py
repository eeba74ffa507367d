"""Masks of sparse checkpoints, and how they leave with the weights.

An exported folder of a sparse model has zeros in its weights and a file ``masks.safetensors``
beside them: for every sparse matrix, by the name of its weight there, the mask packed to bits
(``sparsity.storage``). Fused layers are split as their weights are, so masks there are of single
weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmtrain.checkpoint import HOOK_PREFIX, MODEL_PREFIX
from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.finding import find
from llmtrain.checkpoint.layout import read_json, read_layout
from llmtrain.checkpoint.tensors import read_tensor
from llmtrain.config import load_config
from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.config.sparsity import LIVE
from llmtrain.convert.names import Rule
from llmtrain.errors import ConfigError
from llmtrain.linear import Mask
from llmtrain.model import complete
from llmtrain.sparsity import packed_dim, sparse_layers, unpack_bits
from llmtrain.sparsity.storage import write_masks

MASKS = "masks.safetensors"
_PREFIX = f"{HOOK_PREFIX}sparsity."


def checkpoint_masks(path: Path) -> dict[str, Mask]:
    """The masks of a checkpoint, or of a run's newest good one, by layer.

    Raises CheckpointError, and ConfigError where it is not sparse (any more).
    """
    found, _ = find(Ranks(None), Path(path).expanduser(), MODEL_PREFIX)
    run = load_config(found / "config.yaml")
    vocabulary = read_json(found / "data.json")["vocab_size"]
    masks = _stored(found, complete(run.model, vocabulary, run.data.seq_len))
    if not masks:
        raise ConfigError(f"sparsity.masks: {found} is not sparse; name another checkpoint")
    return masks


def _stored(found: Path, cfg: ModelConfig) -> dict[str, Mask]:
    layout, section = read_layout(found), load_config(found / "config.yaml").sparsity
    if section is None:
        return {}
    masks = {}
    for name, layer in sparse_layers(cfg, section).items():
        entry = layout.get(_PREFIX + name)
        if entry is not None:
            bits = read_tensor(found, _PREFIX + name, entry)
            dim, grid = packed_dim(name), layer.granularity.grid(layer.shape)
            masks[name] = Mask(
                unpack_bits(bits, grid[dim], dim), layer.granularity.block, layer.shape
            )
    return masks


def live_masks(found: Path, run: RunConfig, cfg: ModelConfig) -> dict[str, Mask]:
    """The masks by layer of a checkpoint whose weights live on outside them, and whose run computed
    with zeros there; {} for all others. run: its config."""
    section = run.sparsity
    return {} if section is None or section.method not in LIVE else _stored(found, cfg)


def export_masks(found: Path, rules: Sequence[Rule], cfg: ModelConfig, file: Path) -> None:
    """Write the masks of the checkpoint ``found`` to ``file`` by their names in transformers;
    nothing where it is not sparse."""
    masks = _stored(found, cfg)
    exported = {}
    for rule in rules:
        layer, _, leaf = rule.ours.rpartition(".")
        if leaf == "weight" and layer in masks:
            whole = masks[layer].box((0, 0), masks[layer].shape)
            for name, part in zip(rule.theirs, rule.split(whole, cfg), strict=True):
                rows, columns = part.shape
                exported[name] = Mask(part.contiguous(), (1, 1), (rows, columns))
    if exported:
        write_masks(file, exported)
