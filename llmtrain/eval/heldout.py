"""Held-out loss, perplexity and bits per byte for each domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from llmtrain.data.batch import Batch
from llmtrain.data.loader import HeldoutSet
from llmtrain.loss import LossOutput
from llmtrain.parallel import World


@torch.no_grad()
def evaluate_domains(
    loss: Callable[[Batch, float], LossOutput],
    sets: Sequence[HeldoutSet],
    micro_batch_size: int,
    world: World,
) -> dict[str, dict[str, float]]:
    """Evaluate every set over all ranks.

    loss: forward of a micro-batch given a denominator. Returns domain -> ``loss`` (nats per
    token), ``perplexity``, ``tokens`` and, where the set knows its bytes per token,
    ``bits_per_byte`` = loss / (ln 2 x bytes per token).
    """
    out: dict[str, dict[str, float]] = {}
    for heldout in sets:
        nll = weight = 0.0
        for batch in heldout.batches(micro_batch_size, world.rank, world.size):
            moved = batch.to(world.device)
            output = loss(moved, 1.0)
            nll += float((output.nll * moved.weights).sum(dtype=torch.float64))
            weight += float(moved.weights.sum(dtype=torch.float64))
        nll, weight = world.sum([nll, weight])
        mean = nll / weight if weight else math.nan
        metrics = {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "tokens": weight}
        if heldout.bytes_per_token is not None:
            metrics["bits_per_byte"] = mean / (math.log(2) * heldout.bytes_per_token)
        out[heldout.name] = metrics
    return out
