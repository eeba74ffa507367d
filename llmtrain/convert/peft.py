"""Adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, float32

from llmtrain.checkpoint import MODEL_PREFIX
from llmtrain.checkpoint.layout import TensorLayout, read_layout
from llmtrain.checkpoint.safefile import write_small
from llmtrain.checkpoint.store import new_folder
from llmtrain.checkpoint.tensors import read_tensor
from llmtrain.config.schema import ModelConfig
from llmtrain.convert.names import Rule
from llmtrain.convert.outgoing import OpenedCheckpoint, open_checkpoint
from llmtrain.convert.writing import Converted, Target, in_blocks, write_file
from llmtrain.errors import CheckpointError
from llmtrain.model import PARTS, AdaptedPart, adapted_parts, is_directed, part_names

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector.weight"


@dataclass(frozen=True)
class Layer:
    """A linear layer of ours: its rule, and its matrices by the names of their modules in
    transformers; in order of the rows of A."""

    name: str
    rule: Rule
    modules: dict[str, str]


def adaptable_layers(opened: OpenedCheckpoint, cfg: ModelConfig) -> Iterator[Layer]:
    """The layers that adapters can stand beside here and there; whole weights of several matrices
    in transformers, as GPT-2 has them, are left out."""
    for rule in opened.rules:
        layer, _, leaf = rule.ours.rpartition(".")
        if leaf != "weight" or not layer.endswith(tuple(PARTS)):
            continue
        names = part_names(cfg, layer)
        if len(names) == len(rule.theirs) and rule.kind != "transposed":
            modules = [name.removesuffix(".weight") for name in rule.theirs]
            yield Layer(layer, rule, dict(zip(modules, names, strict=True)))


def to_peft(src: Path, dst: Path, *, base: str | None = None) -> Converted:
    """Write the adapters of a checkpoint (or of a run's newest good one) for ``peft`` and vLLM.

    base: name or folder of the model in Hugging Face's format that the adapters belong to; None:
    the one the run's own was converted from, if that is known. Raises CheckpointError when there
    are no adapters, or they stand beside a matrix that is none in the architecture.
    """
    opened = open_checkpoint(src)
    cfg = opened.cfg
    if cfg.adapters is None:
        raise CheckpointError(f"{opened.path} has no adapters (model.adapters); use convert to-hf")
    if not cfg.adapters.freeze:
        raise CheckpointError(
            f"{opened.path} has trained the model's own weights too "
            "(model.adapters.freeze: false), which PEFT's format does not hold; use convert to-hf"
        )
    if opened.run.sparsity is not None:
        raise CheckpointError(
            f"{opened.path} adapts masked weights (sparsity), which no base of PEFT holds; use "
            "convert to-hf"
        )
    _check_matrices(opened)
    layout = read_layout(opened.path)
    found = list(_tensors(opened, layout))
    targets = [Target(name, float32, tuple(value.shape)) for name, value, _ in found]
    parts = {_module(name): part for name, _, part in found}
    source = base or opened.origin.get("adapts") or opened.source
    with new_folder(dst) as temporary:
        values = (in_blocks(value) for _, value, _ in found)
        size = write_file(temporary / WEIGHTS, targets, values).bytes
        text = json.dumps(_config(cfg, parts, source), indent=2) + "\n"
        write_small(temporary / CONFIG, text.encode())
    n_params = sum(value.numel() for _, value, _ in found)
    return Converted(dst, f"adapters for {opened.architecture.name}", n_params, size, opened.notes)


def _check_matrices(opened: OpenedCheckpoint) -> None:
    """Raise CheckpointError for an adapted layer that is one matrix in transformers, several here,
    or lies transposed."""
    known = {layer.name for layer in adaptable_layers(opened, opened.cfg)}
    for rule in opened.rules:
        layer = rule.ours.removesuffix(".weight")
        if layer == rule.ours or not layer.endswith(tuple(PARTS)) or layer in known:
            continue
        if adapted_parts(opened.cfg, layer):
            raise CheckpointError(
                f"{opened.path}: {opened.architecture.name} keeps {layer} in one matrix of its own "
                "order, for which PEFT has one adapter and llmtrain several; use convert to-hf, "
                "which merges them, or adapt other matrices (model.adapters.targets)"
            )


def _tensors(
    opened: OpenedCheckpoint, layout: dict[str, TensorLayout]
) -> Iterator[tuple[str, Tensor, AdaptedPart]]:
    """PEFT's name, values and matrix of every A, B and magnitude."""
    cfg = opened.cfg
    assert cfg.adapters is not None

    def read(layer: Layer, name: str) -> Tensor:
        key = f"{MODEL_PREFIX}{layer.name}.adapter.{name}.weight"
        return read_tensor(opened.path, key, layout[key]).float()

    for layer in adaptable_layers(opened, cfg):
        chosen = {part.name: (i, part) for i, part in enumerate(adapted_parts(cfg, layer.name))}
        if not chosen:
            continue
        a, b = read(layer, "a"), read(layer, "b")
        rows = layer.rule.split(b, cfg)
        lengths: list[Tensor] = []
        if is_directed(cfg.adapters):
            lengths = layer.rule.split(read(layer, "magnitude"), cfg)
        for i, (module, name) in enumerate(layer.modules.items()):
            if name not in chosen:
                continue
            at, part = chosen[name]
            first = at * b.shape[1]
            yield PREFIX + module + A, a[first : first + part.rank].contiguous(), part
            yield PREFIX + module + B, rows[i][:, : part.rank].contiguous(), part
            if lengths:
                yield PREFIX + module + MAGNITUDE, lengths[i].contiguous(), part


def _module(name: str) -> str:
    for suffix in (A, B, MAGNITUDE):
        name = name.removesuffix(suffix)
    return name.removeprefix(PREFIX)


def _config(cfg: ModelConfig, parts: dict[str, AdaptedPart], base: str | None) -> dict[str, Any]:
    section = cfg.adapters
    assert section is not None
    alpha = 2.0 * section.rank if section.alpha is None else section.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": section.rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {m: p.rank for m, p in parts.items() if p.rank != section.rank},
        "alpha_pattern": {m: _number(p.alpha) for m, p in parts.items() if p.alpha != alpha},
        "use_rslora": section.kind.startswith("rs"),
        "use_dora": is_directed(section),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        # Where not every layer is adapted, whole names say which.
        "target_modules": _targets(list(parts), cfg.n_layers),
    }


def _number(value: float) -> float:
    return int(value) if value == int(value) else value


def _targets(modules: list[str], n_layers: int) -> list[str]:
    whole = sorted(set(modules))
    leaves = sorted({module.rsplit(".", 1)[1] for module in whole})
    return leaves if len(whole) == n_layers * len(leaves) else whole
