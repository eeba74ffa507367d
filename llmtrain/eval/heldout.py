"""Held-out loss, perplexity and bits per byte for each domain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from llmtrain.data.batch import Batch
from llmtrain.data.loader import HeldoutSet
from llmtrain.loss import LossOutput
from llmtrain.parallel import Layout


class Evaluated(Protocol):
    """A model as evaluation uses it."""

    def receive(self, batch: Batch) -> Batch:
        """This rank's part of a batch of its data rank, on its device."""
        ...

    def loss(self, batch: Batch, denominator: float) -> LossOutput:
        """Forward of a received micro-batch."""
        ...


@torch.no_grad()
def evaluate_domains(
    model: Evaluated, sets: Sequence[HeldoutSet], micro_batch_size: int, layout: Layout
) -> dict[str, dict[str, float]]:
    """Evaluate every set over all ranks.

    Returns domain -> ``loss`` (nats per
    token), ``perplexity``, ``tokens`` and, where the set knows its bytes per token,
    ``bits_per_byte`` = loss / (ln 2 x bytes per token).
    """
    out: dict[str, dict[str, float]] = {}
    for heldout in sets:
        nll = weight = 0.0
        for batch in heldout.batches(micro_batch_size, layout.data_rank, layout.degrees.data):
            own = model.receive(batch)
            output = model.loss(own, 1.0)
            if layout.counts_losses:
                nll += float((output.nll * own.weights).sum(dtype=torch.float64))
            if layout.counts_tokens:
                weight += float(own.weights.sum(dtype=torch.float64))
        nll, weight = layout.world.sum([nll, weight])
        mean = nll / weight if weight else math.nan
        metrics = {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "tokens": weight}
        if heldout.bytes_per_token is not None:
            metrics["bits_per_byte"] = mean / (math.log(2) * heldout.bytes_per_token)
        out[heldout.name] = metrics
    return out
