"""A trained model back from a checkpoint of any layout, on one process or on tensor ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llmtrain.checkpoint import HOOK_PREFIX, OPTIM_PREFIX, read_files
from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.finding import find
from llmtrain.checkpoint.loading import load_into
from llmtrain.checkpoint.rows import RowReader
from llmtrain.config import load_config
from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.convert.masks import live_masks
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.errors import CheckpointError
from llmtrain.model import (
    Decoder,
    apply_formats,
    check_tensor_degree,
    fill_packed,
    packed_names,
    packed_weights,
    resolve_model,
    shard_over_tensor,
)
from llmtrain.ops import kernels_warning
from llmtrain.parallel import Layout
from llmtrain.parallel.hardware import resolve_precision
from llmtrain.sparsity import zero_outside


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode, with what is needed to use it.

    step: updates it was trained for. warnings: a sentence for each newer checkpoint passed over,
    and when compiled kernels are there but not in use.
    """

    model: Decoder
    model_cfg: ModelConfig
    cfg: RunConfig
    tokenizer: Tokenizer | None
    step: int
    path: Path
    warnings: list[str]


def load_trained(
    path: Path,
    device: torch.device,
    overrides: Sequence[str] = (),
    layout: Layout | None = None,
) -> Trained:
    """Load the model of a checkpoint folder, or of a run's newest good checkpoint.

    overrides: changes to the stored config, whose ``precision`` says the dtype of the matmuls;
    the weights stay float32. Layers compute in the number formats of the run at that step, and with
    its masks.
    layout: its tensor ranks, if any, share the matrices, each reading its own part. Optimizer
    state is neither read nor verified. Raises CheckpointError naming what is missing or damaged,
    ConfigError where the tensor ranks do not fit the model.
    """
    alone = Ranks(None)
    found, faults = find(alone, path.expanduser(), "model.")
    warnings = [f"{fault}; {found.name} is used instead" for fault in faults]
    if device.type == "cpu" and (out_of_date := kernels_warning()) is not None:
        warnings.append(out_of_date)
    files = read_files(found)
    missing = next((name for name in ("config.yaml", "data.json") if name not in files), None)
    if missing is not None:
        raise CheckpointError(f"{found} has no {missing}: it was not saved by llmtrain train")
    cfg = load_config(found / "config.yaml", overrides)
    model_cfg = resolve_model(cfg, json.loads(files["data.json"])["vocab_size"])
    tensor = None if layout is None else layout.tensor
    check_tensor_degree(model_cfg, 1 if tensor is None else tensor.size)
    with torch.device("meta"):
        model = Decoder(model_cfg, resolve_precision(cfg.precision, device).compute, tensor)
    if layout is not None and layout.tensor is not None:
        assert layout.state is not None
        shard_over_tensor(model, layout.state["tensor"])
    model.to_empty(device=device)
    packed = packed_names(model)
    tensors = {f"model.{n}": p for n, p in model.named_parameters() if n not in packed}
    apart = tuple(f"model.{name}" for name in packed_weights(model_cfg))
    load_into(alone, found, tensors, (OPTIM_PREFIX, HOOK_PREFIX, *apart), False)
    for name, mask in live_masks(found, cfg, model_cfg).items():
        zero_outside(mask, tensors[f"model.{name}.weight"])
    if packed:
        fill_packed(model, RowReader(found))
    tokenizer_file = found / "tokenizer.json"
    tokenizer = load_tokenizer(tokenizer_file) if tokenizer_file.exists() else None
    step = int(json.loads(files["meta.json"])["step"])
    apply_formats(model, model_cfg, cfg, device, step)
    return Trained(model.eval(), model_cfg, cfg, tokenizer, step, found, warnings)


def require_plain(trained: Trained, what: str) -> Trained:
    """``trained``; CheckpointError where its frozen weights are packed, for those who work on the
    weights themselves. what: who."""
    if packed_names(trained.model):
        raise CheckpointError(
            f"{trained.path} has packed weights (model.adapters.base), which {what} cannot work "
            "on; merge them with convert to-hf and from-hf first"
        )
    return trained
