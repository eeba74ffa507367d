"""A suspicious step is made again: was it the machine or the data?

Before the update of a step whose loss or gradient norm is not finite or spikes, nothing has
changed yet: weights, samples and dropout (whose masks are a function of seed and sample) are
those of the first time. So the step is computed a second time, and a third time with every data
rank computing its neighbour's samples:

- **transient**: the second time it is not suspicious. The machine erred once; the second result
  is used and the run goes on.
- **persistent**: what is wrong stays with the rank and does not go with its samples. That
  machine errs every time; the run stops and names the rank.
- **genuine**: it goes with the samples, or all ranks agree. The guard decides as ever.

With one data rank persistent and genuine cannot be told apart. The samples are written to
``RUN/suspicious`` either way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmtrain.data.batch import Batch
from llmtrain.errors import GuardStop
from llmtrain.train.module import StepSums

if TYPE_CHECKING:
    from llmtrain.train.trainer import Trainer

# Losses of the same samples on other ranks agree so far, whatever order their sums are made in.
_AGREE = 1e-3
_MOST_KEPT = 16


@dataclass(frozen=True)
class Measured:
    """A step's forward and backward. sums: of this rank. loss, norm (0-dim): global."""

    sums: StepSums
    loss: float
    norm: Tensor


def judge_again(
    trainer: Trainer, batch: Batch, first: Measured, compute: Callable[[Batch], Measured]
) -> tuple[Measured, str]:
    """Repeat a suspicious step; the result to go on with and what was found out. Collective.

    batch: as this rank received it. compute: forward and backward of a batch, the gradients of
    before forgotten. Raises GuardStop naming the rank whose machine errs every time.
    """
    layout = trainer.module.layout
    ranks, own = layout.degrees.data, layout.data_rank
    before = _parts(trainer, first, own)
    second = compute(batch)
    losses = _parts(trainer, second, own)
    if not trainer.guard.suspects(second.loss, float(second.norm)):
        return second, (
            f"transient: made again, its loss is {second.loss:.4g} and its gradient norm "
            f"{float(second.norm):.4g}, which are used; watch the machine of "
            f"{_blame(before, losses)}"
        )
    if ranks == 1:
        return second, "made again with the same result: not transient"
    third = compute(_shifted(trainer, batch))
    elsewhere = _parts(trainer, third, (own + 1) % ranks)
    guilty = [
        rank
        for rank in range(ranks)
        # Its samples were computed by the rank before it the third time.
        if not _agree(losses[rank], elsewhere[rank]) and _worse(losses[rank], elsewhere[rank])
    ]
    if guilty:
        raise GuardStop(
            f"stopped at step {trainer.step_done + 1}: persistent: data rank {guilty[0]} computes "
            f"a loss of {losses[guilty[0]]:.4g} from samples that give "
            f"{elsewhere[guilty[0]]:.4g} elsewhere; nothing was updated. Leave its node out and "
            "run the same command again"
        )
    # The samples go back to where they belong, and with them the gradient to judge.
    return compute(batch), "genuine: other ranks compute the same from the same samples"


def keep_samples(trainer: Trainer, batch: Batch, folder: Path) -> None:
    """Write this rank's samples of the step, to look at or to compute again elsewhere."""
    step = trainer.step_done + 1
    layout = trainer.module.layout
    if layout.tensor_rank or layout.pipeline_rank or layout.context_rank:
        return
    # What a full disk does not take is no reason to stop.
    with suppress(OSError, SafetensorError):
        _write(trainer, batch, folder, step, layout.data_rank)


def _write(trainer: Trainer, batch: Batch, folder: Path, step: int, rank: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if len(list(folder.glob("step-*-0.safetensors"))) >= _MOST_KEPT:
        return
    found = {f.name: getattr(batch, f.name) for f in fields(batch)}
    tensors = {name: x.cpu().contiguous() for name, x in found.items() if x is not None}
    tensors["rng_state"] = torch.get_rng_state()
    facts = {"step": str(step), "seed": str(trainer.cfg.seed)}
    save_file(tensors, folder / f"step-{step:08d}-{rank}.safetensors", facts)


def _agree(a: float, b: float) -> bool:
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.isfinite(a) == math.isfinite(b)
    return abs(a - b) <= _AGREE * max(abs(a), abs(b), 1e-12)


def _worse(a: float, b: float) -> bool:
    """Whether ``a`` is the odd one: not finite, or larger."""
    return not math.isfinite(a) or (math.isfinite(b) and a > b)


def _parts(trainer: Trainer, measured: Measured, whose: int) -> list[float]:
    """The loss of each data rank's samples. whose: those that this rank has computed."""
    slots = [0.0] * trainer.module.layout.degrees.data
    slots[whose] = float(measured.sums.loss)
    return trainer.world.sum(slots)


def _blame(before: list[float], again: list[float]) -> str:
    pairs = zip(before, again, strict=True)
    differ = [rank for rank, (a, b) in enumerate(pairs) if not _agree(a, b)]
    if not differ:
        return "all ranks: the losses agree, the gradients did not"
    return "data rank " + ", ".join(map(str, differ[:8]))


def _shifted(trainer: Trainer, batch: Batch) -> Batch:
    """The samples of the next data rank; this rank's go to the one before."""
    layout, world = trainer.module.layout, trainer.world
    degrees = layout.degrees
    stride, ranks, own = degrees.tensor * degrees.context, degrees.data, layout.data_rank
    source = world.rank + ((own + 1) % ranks - own) * stride
    target = world.rank + ((own - 1) % ranks - own) * stride
    changed: dict[str, Tensor] = {}
    for f in fields(batch):
        value = getattr(batch, f.name)
        if value is None:
            continue
        sent = value.cpu().contiguous()
        got = torch.empty_like(sent)
        message = dist.isend(sent, target, group=world.cpu_group)
        dist.recv(got, source, group=world.cpu_group)
        assert message is not None
        message.wait()
        changed[f.name] = got.to(value.device)
    return replace(batch, **changed)
