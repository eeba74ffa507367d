"""Diagonal Fisher information of a trained model, by a pass over sequences of its training data."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from llmtrain.checkpoint.export import export_model
from llmtrain.data.batch import Batch
from llmtrain.data.loader import Loader
from llmtrain.data.plan import build_plan
from llmtrain.errors import CheckpointError
from llmtrain.eval.checkpoint import Alone
from llmtrain.eval.loading import load_trained, require_plain
from llmtrain.parallel.world import pick_device
from llmtrain.train.clockwork import Clockwork


def add_squares(params: dict[str, nn.Parameter], into: dict[str, Tensor]) -> None:
    """Add the squared gradients of one sequence."""
    for name, param in params.items():
        if param.grad is not None:
            into[name].addcmul_(param.grad, param.grad)


def empirical_fisher(model: Alone, batches: list[Batch]) -> dict[str, Tensor]:
    """Mean over sequences of the squared gradient of a sequence's summed loss, by parameter.

    The empirical Fisher information: targets are those of the data, not drawn from the model
    (Kirkpatrick et al. 2017, 1612.00796, use it for EWC; Matena and Raffel 2022, 2111.09832, for
    merging). One backward pass per sequence.
    """
    params = dict(model.trained.model.named_parameters())
    found = {name: torch.zeros_like(p) for name, p in params.items()}
    count = 0
    for batch in batches:
        for row in range(len(batch)):
            model.trained.model.zero_grad(set_to_none=True)
            output = model.loss(model.receive(batch[row : row + 1]), 1.0)
            output.loss.backward()  # type: ignore[no-untyped-call]
            add_squares(params, found)
            count += 1
    for value in found.values():
        value.div_(max(count, 1))
    return found


def write_fisher(path: Path, out: Path, samples: int, device: str) -> None:
    """Estimate the Fisher information of a checkpoint on the first ``samples`` of its data.

    out: a new folder with ``model.safetensors``. Raises CheckpointError for folders that are not
    llmtrain's, whose training data nobody knows.
    """
    if not path.expanduser().is_dir():
        raise CheckpointError(f"{path} is not a folder; give a checkpoint or a run")
    place = pick_device(device, 0)
    trained = require_plain(load_trained(path, place), "fisher information")
    cfg = trained.cfg
    total = Clockwork.from_config(cfg).total * cfg.train.global_batch_size
    plan = build_plan(cfg, total)
    number = min(samples, total)
    loader = Loader(plan, number, 0, 1)
    values = empirical_fisher(Alone(trained, place), [loader.batch_at(0)])
    notes = {"fisher.json": json.dumps({"of": str(trained.path), "samples": number}).encode()}
    export_model({f"model.{k}": v for k, v in values.items()}, out, files=notes)
