"""A reference model beside the one in training, whole on every rank, and its losses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmtrain.data.batch import Batch
from llmtrain.errors import ConfigError
from llmtrain.loss import LossOutput, head_loss
from llmtrain.model import Head

if TYPE_CHECKING:
    from llmtrain.eval.loading import Trained
    from llmtrain.train.module import TrainModule
    from llmtrain.train.trainer import Trainer


def load_reference(path: Path, trainer: Trainer, key: str) -> Trained:
    """The model of a checkpoint or run, on this rank's device.

    key: where the config names it. Raises ConfigError where it reads other tokens or shorter
    sequences, CheckpointError where there is none.
    """
    from llmtrain.eval.loading import load_trained

    found = load_trained(path, trainer.module.device)
    ours, theirs = trainer.module.model_cfg, found.model_cfg
    if ours.vocab_size != theirs.vocab_size:
        raise ConfigError(
            f"{key}: {found.path} has a vocabulary of {theirs.vocab_size} tokens and "
            f"the model of {ours.vocab_size}; take a reference trained with the same tokenizer"
        )
    longest = theirs.max_seq_len or 0
    if longest < trainer.cfg.data.seq_len:
        raise ConfigError(
            f"{key}: {found.path} reads at most {longest} tokens and data.seq_len is "
            f"{trainer.cfg.data.seq_len}; take another reference or shorten the samples"
        )
    return found


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
