"""Adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.checkpoint import MODEL_PREFIX
from llmtrain.checkpoint.export import read_tensor
from llmtrain.checkpoint.layout import TensorLayout, read_layout
from llmtrain.checkpoint.safefile import write_small
from llmtrain.checkpoint.store import new_folder
from llmtrain.config.schema import ModelConfig
from llmtrain.convert.names import Rule
from llmtrain.convert.outgoing import open_checkpoint
from llmtrain.convert.writing import Converted, Target, in_blocks, write_file
from llmtrain.errors import CheckpointError
from llmtrain.model import adapted_parts

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def to_peft(src: Path, dst: Path, *, base: str | None = None) -> Converted:
    """Write the adapters of a checkpoint (or of a run's newest good one) for ``peft`` and vLLM.

    base: name or folder of the model in Hugging Face's format that the adapters belong to; None:
    the one the run's own was converted from, if that is known. Raises CheckpointError when there
    are no adapters, or the architecture keeps q, k and v in one matrix (gpt2).
    """
    opened = open_checkpoint(src)
    cfg = opened.cfg
    if cfg.adapters is None:
        raise CheckpointError(f"{opened.path} has no adapters (model.adapters); use convert to-hf")
    if not cfg.adapters.freeze:
        raise CheckpointError(
            f"{opened.path} trained the model's own weights beside its adapters "
            "(model.adapters.freeze: false), which an adapter does not hold; use convert to-hf"
        )
    if opened.architecture.name == "gpt2":
        raise CheckpointError(
            f"{opened.path}: GPT-2 keeps q, k and v in one matrix, for which PEFT has one adapter "
            "and llmtrain three; use convert to-hf, which merges them"
        )
    layout = read_layout(opened.path)
    pairs = list(_pairs(opened.path, layout, opened.rules, cfg))
    targets = [Target(name, torch.float32, tuple(value.shape)) for name, value in pairs]
    with new_folder(dst) as temporary:
        values = (in_blocks(value) for _, value in pairs)
        size = write_file(temporary / WEIGHTS, targets, values).bytes
        text = json.dumps(_config(cfg, pairs, base or opened.source), indent=2) + "\n"
        write_small(temporary / CONFIG, text.encode())
    n_params = sum(value.numel() for _, value in pairs)
    return Converted(dst, f"adapters for {opened.architecture.name}", n_params, size, opened.notes)


def _pairs(
    path: Path, layout: dict[str, TensorLayout], rules: list[Rule], cfg: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """PEFT's name and values of every A and B."""
    for rule in rules:
        layer, _, leaf = rule.ours.rpartition(".")
        keys = {side: f"{MODEL_PREFIX}{layer}.adapter.{side}.weight" for side in "ab"}
        if leaf != "weight" or keys["a"] not in layout:
            continue
        a, b = (read_tensor(path, keys[side], layout[keys[side]]) for side in "ab")
        chosen = adapted_parts(cfg, layer)
        rows = rule.split(b, cfg)
        for theirs, out in zip(rule.theirs, rows, strict=True):
            part = _part(rule, theirs)
            if part not in chosen:
                continue
            at = chosen.index(part) * b.shape[1]
            name = _PREFIX + theirs.removesuffix(".weight")
            yield f"{name}.lora_A.weight", a[at : at + b.shape[1]].contiguous()
            yield f"{name}.lora_B.weight", out.contiguous()


def _part(rule: Rule, theirs: str) -> str:
    """Our name of the matrix that transformers calls ``...self_attn.q_proj.weight``."""
    leaf = theirs.split(".")[-2].removesuffix("_proj")
    return {"o": "out"}.get(leaf, leaf)


def _config(cfg: ModelConfig, pairs: list[tuple[str, Tensor]], base: str | None) -> dict[str, Any]:
    section = cfg.adapters
    assert section is not None
    alpha = 2.0 * section.rank if section.alpha is None else section.alpha
    modules = [name.removeprefix(_PREFIX).rsplit(".", 2)[0] for name, _ in pairs]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": section.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "use_rslora": section.kind == "rslora",
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        # Where not every layer is adapted, whole names say which.
        "target_modules": _targets(modules, cfg.n_layers),
    }


def _targets(modules: list[str], n_layers: int) -> list[str]:
    whole = sorted(set(modules))
    leaves = sorted({module.rsplit(".", 1)[1] for module in whole})
    return leaves if len(whole) == n_layers * len(leaves) else whole
