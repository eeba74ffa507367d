"""One-shot magnitude pruning of a trained model: its held-out loss by density, without training.

Jaiswal et al. 2023 (2306.03805) call the sparsity up to which a pretrained model loses nearly
nothing, and after which it falls off sharply, its essential sparsity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llmtrain.data.loader import heldout_sets
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.eval.checkpoint import Alone
from llmtrain.eval.heldout import evaluate_domains
from llmtrain.eval.loading import load_trained
from llmtrain.model import hidden_layers
from llmtrain.parallel import Degrees, Layout, World
from llmtrain.parallel.world import pick_device
from llmtrain.sparsity import best_kept, block_scores, parse_granularity

DENSITIES = tuple(i / 10 for i in range(9, 0, -1))
# A rise of the mean loss up to this share counts as none.
NEARLY = 0.01


@dataclass(frozen=True)
class Pruned:
    """density: kept share of every hidden layer; losses: held-out, by domain."""

    density: float
    losses: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean loss over domains."""
        return sum(self.losses.values()) / len(self.losses)


def density_sweep(
    path: Path,
    densities: Sequence[float] | None = None,
    granularity: str = "unstructured",
    *,
    overrides: Sequence[str] = (),
    device: str = "auto",
) -> list[Pruned]:
    """Held-out losses of a checkpoint's model whole, and with the largest magnitudes of every
    hidden layer kept at each of ``densities`` (None: 0.9 down to 0.1); N:M has its own alone.

    Raises LlmtrainError for a checkpoint without held-out text, or what cannot be pruned so.
    """
    kind = parse_granularity(granularity, "--granularity")
    kind.check_search("--granularity")
    if densities is None:
        densities = [kind.density(None, "--densities")] if kind.m else DENSITIES
    for density in densities:
        if not 0.0 <= density <= 1.0:
            raise ConfigError(f"--densities: {density:g} is not between 0 and 1")
        kind.density(density, "--densities")
    place = pick_device(device, 0)
    trained = load_trained(path, place, overrides)
    sets, cfg = heldout_sets(trained.cfg), trained.cfg
    if not sets:
        raise CheckpointError(
            f"{trained.path} has no held-out text; prepare it with heldout_fraction above 0"
        )
    layers = dict(hidden_layers(trained.model))
    whole = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    alone = Layout(World(0, 1, 0, place, None), Degrees())
    micro = cfg.eval.micro_batch_size or cfg.train.micro_batch_size or 16
    found = []
    for density in [1.0, *sorted((d for d in densities if d < 1.0), reverse=True)]:
        for name, layer in layers.items():
            weight = whole[name]
            if density < 1.0:
                rows, columns = weight.shape
                kind.check((rows, columns), density, name)
                kept = best_kept(kind, block_scores(weight, kind.block), density)
                high, wide = kind.block
                mask = kept.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)
                weight = weight.masked_fill(~mask[:, :columns], 0.0)
            with torch.no_grad():
                layer.weight.copy_(weight)
        domains = evaluate_domains(Alone(trained, place), sets, micro, alone)
        found.append(Pruned(density, {n: values["loss"] for n, values in domains.items()}))
    return found


def essential(found: Sequence[Pruned]) -> float:
    """The lowest density whose mean loss, and that of all higher ones, is within ``NEARLY`` of the
    whole model's."""
    lowest = 1.0
    for one in found:
        if one.mean > (1 + NEARLY) * found[0].mean:
            break
        lowest = one.density
    return lowest
