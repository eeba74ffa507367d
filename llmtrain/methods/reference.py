"""A reference model beside the one in training, whole on every rank, and its losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmtrain.checkpoint import MODEL_PREFIX, read_files
from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.finding import find
from llmtrain.config import RunConfig, load_config
from llmtrain.data.batch import Batch
from llmtrain.data.plan import DataPlan
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.loss import LossOutput, head_loss
from llmtrain.model import Head, resolve_model

if TYPE_CHECKING:
    from llmtrain.eval.loading import Trained
    from llmtrain.train.module import TrainModule
    from llmtrain.train.trainer import Trainer


def check_reference(path: Path, cfg: RunConfig, plan: DataPlan, key: str) -> None:
    """Whether a checkpoint or run can be the reference of a run; nothing is loaded.

    key: where the config names it. Raises ConfigError where there is none that can be used, or it
    reads other tokens or shorter sequences.
    """
    try:
        found, _ = find(Ranks(None), path.expanduser(), MODEL_PREFIX)
        files = read_files(found)
        missing = next((name for name in ("config.yaml", "data.json") if name not in files), None)
        if missing is not None:
            raise CheckpointError(
                f"{found} has no {missing}; give a checkpoint that llmtrain train saved"
            )
    except CheckpointError as error:
        raise ConfigError(f"{key}: {error}") from error
    vocab_size = json.loads(files["data.json"])["vocab_size"]
    theirs = resolve_model(load_config(found / "config.yaml"), vocab_size)
    ours = resolve_model(cfg, plan.vocab_size)
    if ours.vocab_size != theirs.vocab_size:
        raise ConfigError(
            f"{key}: {found} has a vocabulary of {theirs.vocab_size} tokens and "
            f"the model of {ours.vocab_size}; take a reference trained with the same tokenizer"
        )
    longest = theirs.max_seq_len or 0
    if longest < cfg.data.seq_len:
        raise ConfigError(
            f"{key}: {found} reads at most {longest} tokens and data.seq_len is "
            f"{cfg.data.seq_len}; take another reference or shorten the samples"
        )


def load_reference(path: Path, trainer: Trainer, key: str) -> Trained:
    """The model of a checkpoint or run, on this rank's device.

    key: where the config names it. Raises ConfigError where there is none that can be used; that
    it fits, ``check_reference`` says.
    """
    from llmtrain.eval.loading import load_trained

    try:
        return load_trained(path, trainer.module.device)
    except CheckpointError as error:
        raise ConfigError(f"{key}: {error}") from error


@torch.no_grad()
def losses_of(reference: Trained, module: TrainModule, batch: Batch) -> Tensor:
    """Cross-entropy in nats of every token of whole sequences, [b, s] float32."""
    data, batch = module.cfg.data, batch.to(module.device)

    def head_fn(hidden: Tensor, head: Head) -> LossOutput:
        return head_loss(hidden, head, batch.targets, batch.weights, reference.cfg.loss, 1.0)

    output = reference.model(
        batch.tokens,
        positions=batch.positions if data.reset_positions else None,
        doc_ids=batch.doc_ids if data.document_mask else None,
        head_fn=head_fn,
    )
    assert isinstance(output, LossOutput)
    return output.nll
