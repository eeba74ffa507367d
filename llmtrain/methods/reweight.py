"""Reweighting of samples and tokens by their losses: the hook of the config section ``reweight``.

Losses are needed before the weights are, and the weights before the backward pass. So all
micro-batches of the step but one go through the model once more, without gradients; the last one's
own forward pass stops at its losses, until the weights are known, and is kept for its backward. The
weights are those of the whole global batch, whatever the accumulation and the layout. They go into
``batch.weights``, whose global sum is the loss's denominator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.config import RunConfig
from llmtrain.config.data_methods import ReweightConfig
from llmtrain.data.batch import Batch
from llmtrain.data.plan import DataPlan
from llmtrain.data.scores import TokenLosses, check_scores
from llmtrain.errors import ConfigError, DataError
from llmtrain.loss.reweight import by_surprise, excess_threshold, sample_weights
from llmtrain.methods.reference import check_reference, load_reference, losses_of
from llmtrain.parallel import release_gathered
from llmtrain.train.hooks import Hook

if TYPE_CHECKING:
    from llmtrain.eval.loading import Trained
    from llmtrain.train.module import TrainModule
    from llmtrain.train.trainer import Trainer


class Reweight(Hook):
    """Sets ``batch.weights`` from losses, in every step.

    Token weights come first and multiply into those that are there. Then the tokens of sample i
    are scaled so that they sum to w_i, its weight in the global batch, times the mean weight its
    tokens came with: without static weights of sources all tokens together weigh 1. The sample
    losses l_i are means under the weights that came in. ``last``: the weights w_i of the latest
    global batch, [global batch] float64 on the CPU, the same on every rank.
    """

    def __init__(self, cfg: ReweightConfig) -> None:
        self.cfg = cfg
        self.warmup = 0
        self.reference: Trained | None = None
        self.losses: tuple[TokenLosses, list[str]] | None = None
        self.last: Tensor | None = None

    def check(self, cfg: RunConfig, plan: DataPlan) -> None:
        """Whether the losses or the reference fit. Raises ConfigError, DataError."""
        if self.cfg.losses is not None:
            _open_losses(self.cfg.losses, plan)
        elif self.cfg.reference is not None:
            if cfg.parallel.context > 1 or cfg.parallel.pipeline > 1:
                raise ConfigError(
                    f"reweight.tokens: {self.cfg.tokens} reads a reference model on whole "
                    "sequences and does not run with parallel.context or parallel.pipeline above "
                    "1; use parallel.shard or parallel.tensor"
                )
            check_reference(Path(self.cfg.reference), cfg, plan, "reweight.reference")

    def on_run_start(self, trainer: Trainer) -> None:
        """Resolve the warmup and load the reference. Raises ConfigError, DataError."""
        times = trainer.clockwork
        self.warmup = self.cfg.warmup.steps(times.tokens_per_step, times.total)
        if self.cfg.losses is not None:
            self.losses = _open_losses(self.cfg.losses, trainer.plan)
        elif self.cfg.reference is not None:
            self.reference = load_reference(Path(self.cfg.reference), trainer, "reweight.reference")

    def before_batch(self, trainer: Trainer, batch: Batch) -> None:
        """Change ``batch.weights`` in place; collective."""
        warm = trainer.step_done >= self.warmup
        temperature = self.cfg.temperature if warm else self.cfg.warmup_temperature
        strategy = self.cfg.samples if temperature is not None else "uniform"
        own = strategy not in ("none", "uniform") or self.cfg.tokens in ("focal", "rho")
        rule = (strategy, temperature or 1.0)
        if own:
            with_losses(trainer.module, batch, lambda nll: self._weigh(trainer, batch, nll, rule))
        else:
            self._weigh(trainer, batch, None, rule)

    def _weigh(
        self, trainer: Trainer, batch: Batch, nll: Tensor | None, rule: tuple[str, float]
    ) -> None:
        """Change ``batch.weights``; nll: [b, s] losses of its tokens, where the rules need them."""
        before = batch.weights.double()
        if self.cfg.tokens != "none":
            self._weigh_tokens(trainer, batch, nll)
        if self.cfg.samples != "none":
            self._weigh_samples(trainer, batch, nll, before, rule)

    def _weigh_tokens(self, trainer: Trainer, batch: Batch, nll: Tensor | None) -> None:
        if self.cfg.tokens == "focal":
            assert nll is not None
            batch.weights *= by_surprise(nll, self.cfg.gamma)
            return
        if self.losses is not None:
            theirs = _read_losses(*self.losses, trainer, batch)
        else:
            assert self.reference is not None
            theirs = _reference_losses(self.reference, trainer.module, batch)
        if self.cfg.tokens == "prior":
            batch.weights *= by_surprise(theirs, self.cfg.gamma)
            return
        assert nll is not None
        excess = nll - theirs
        counts = (batch.weights > 0) & trainer.module.layout.counts_tokens
        least = excess_threshold(excess, counts, self.cfg.keep, trainer.world.sum)
        batch.weights *= excess >= least

    def _weigh_samples(
        self,
        trainer: Trainer,
        batch: Batch,
        nll: Tensor | None,
        before: Tensor,
        rule: tuple[str, float],
    ) -> None:
        """before: [b, s] weights that came in, for the sample losses."""
        size = trainer.cfg.train.global_batch_size
        place = (batch.sample_ids - trainer.step_done * size).cpu()
        now = batch.weights.double()
        losses = torch.zeros_like(before) if nll is None else before * nll
        rows = torch.stack((losses.sum(1), before.sum(1), (before > 0).sum(1), now.sum(1)))
        table = torch.zeros(4, size, dtype=torch.float64)
        if trainer.module.layout.counts_tokens:
            table[:, place] = rows.cpu()
        # Sums over ranks put the samples together, and the parts of samples that ranks share.
        table = torch.tensor(trainer.world.sum(table.flatten().tolist())).view(4, size)
        loss, came, tokens, left = table.double()
        self.last = sample_weights(torch.where(left > 0, loss / came, torch.nan), *rule)
        scale = torch.where(left > 0, self.last * came / (tokens * left), 0.0)
        batch.weights *= scale[place].to(batch.weights)[:, None]


def with_losses(module: TrainModule, batch: Batch, weigh: Callable[[Tensor], None]) -> None:
    """Call weigh(nll) once with the losses of every token of a received batch, [b, s] float32.

    It may change ``batch.weights`` in place. Collective. What is computed last is kept for the
    step's own forward and backward, where the module can (no pipeline, no DeepSpeed).
    """
    if not module.begins:
        weigh(token_losses(module, batch))
        return
    with torch.no_grad():
        earlier = [module.loss(micro, 1.0).nll for micro in module.micro_batches(batch)[:-1]]
    if earlier:
        release_gathered(module.model)
    module.begin(batch, lambda nll: weigh(torch.cat([*earlier, nll])))


@torch.no_grad()
def token_losses(module: TrainModule, batch: Batch) -> Tensor:
    """Cross-entropy in nats of every token of a received batch, [b, s] float32; collective."""
    parts = [module.loss(micro, 1.0).nll for micro in module.micro_batches(batch)]
    release_gathered(module.model)
    nll, layout = torch.cat(parts), module.layout
    if layout.degrees.pipeline > 1:
        assert layout.state is not None
        # Known on the last rank of the pipeline, zero on the others.
        dist.all_reduce(nll, group=layout.state.get_group("pipeline"))
    return nll


def _open_losses(file: str, plan: DataPlan) -> tuple[TokenLosses, list[str]]:
    """The file of reference losses and the names of the plan's sources in it, by source index.

    Raises DataError where it does not fit the data.
    """
    try:
        losses = TokenLosses(Path(file))
    except DataError as error:
        raise DataError(f"reweight.losses: {error}") from error
    names = list(plan.names)
    total = plan.counts(plan.mixture.total)
    for label, source in enumerate(plan.sources):
        if total[label]:
            where = f"reweight.losses: {file}"
            facts = (source.name, source.fingerprint, plan.cfg.data.seq_len)
            names[label] = check_scores(where, losses.header, *facts)
    return losses, names


def _read_losses(
    losses: TokenLosses, names: Sequence[str], trainer: Trainer, batch: Batch
) -> Tensor:
    """The reference's losses of this rank's tokens, [b, s] float32, where the batch lies."""
    first = int(batch.sample_ids[0])
    labels, numbers, _ = trainer.plan.samples(first, first + len(batch))
    rows = [
        losses.read(names[label], number)
        for label, number in zip(labels.tolist(), numbers.tolist(), strict=True)
    ]
    table = torch.from_numpy(np.stack(rows))
    context = trainer.module.context
    if context is not None:
        table = table[:, context.positions(table.shape[1])]
    return table.to(batch.weights)


@torch.no_grad()
def _reference_losses(reference: Trained, module: TrainModule, batch: Batch) -> Tensor:
    """``token_losses`` of the reference, which this rank holds whole."""
    return torch.cat([losses_of(reference, module, m) for m in module.micro_batches(batch)])
