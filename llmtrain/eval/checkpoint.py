"""Held-out evaluation of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmtrain.data.batch import Batch
from llmtrain.data.loader import heldout_sets
from llmtrain.eval.heldout import evaluate_domains
from llmtrain.eval.loading import Trained, load_trained
from llmtrain.loss import LossOutput, head_loss
from llmtrain.model import Head
from llmtrain.parallel import Degrees, Layout, World
from llmtrain.parallel.world import pick_device


@dataclass(frozen=True)
class CheckpointMetrics:
    """domains: name -> loss, perplexity, tokens, bits_per_byte; warnings: for the user."""

    path: Path
    step: int
    domains: dict[str, dict[str, float]]
    warnings: list[str]


class Alone:
    """A loaded model, whole on this process, for ``evaluate_domains``."""

    def __init__(self, trained: Trained, device: torch.device) -> None:
        self.trained, self.device = trained, device

    def receive(self, batch: Batch) -> Batch:
        return batch.to(self.device)

    def loss(self, batch: Batch, denominator: float) -> LossOutput:
        cfg = self.trained.cfg

        def head_fn(hidden: Tensor, head: Head) -> LossOutput:
            return head_loss(hidden, head, batch.targets, batch.weights, cfg.loss, denominator)

        output = self.trained.model(
            batch.tokens,
            positions=batch.positions if cfg.data.reset_positions else None,
            doc_ids=batch.doc_ids if cfg.data.document_mask else None,
            head_fn=head_fn,
        )
        assert isinstance(output, LossOutput)
        return output


def evaluate_checkpoint(
    path: Path, overrides: Sequence[str], device: str, world: World | None = None
) -> CheckpointMetrics:
    """Evaluate a checkpoint, or a run's newest good one, on its held-out data.

    overrides: dotted changes to the config stored in the checkpoint. device: auto, cpu or cuda.
    world: the processes that share the samples, each with the whole model; None: this one alone.
    Raises LlmtrainError for what is missing, damaged or misspelt.
    """
    if world is None:
        world = World(0, 1, 0, pick_device(device, 0), None)
    trained = load_trained(path, world.device, overrides)
    cfg = trained.cfg

    micro = cfg.eval.micro_batch_size or cfg.train.micro_batch_size or 16
    layout = Layout(world, Degrees(shard=world.size))
    domains = evaluate_domains(Alone(trained, world.device), heldout_sets(cfg), micro, layout)
    return CheckpointMetrics(trained.path, trained.step, domains, trained.warnings)
