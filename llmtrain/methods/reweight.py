"""Reweighting of samples and tokens by their losses: the hook of the config section ``reweight``.

Losses are needed before the weights are, and the weights before the backward pass: the step's
micro-batches go through the model once more, without gradients, at the parameters of the step.
So the weights are those of the whole global batch, whatever the accumulation and the layout. They
go into ``batch.weights``, whose global sum is the loss's denominator.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.config.data_methods import ReweightConfig
from llmtrain.data.batch import Batch
from llmtrain.errors import ConfigError
from llmtrain.loss.reweight import by_surprise, excess_threshold, sample_weights
from llmtrain.methods.reference import load_reference, losses_of
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
        self.last: Tensor | None = None

    def on_run_start(self, trainer: Trainer) -> None:
        """Resolve the warmup and load the reference. Raises ConfigError, CheckpointError."""
        times = trainer.clockwork
        self.warmup = self.cfg.warmup.steps(times.tokens_per_step, times.total)
        if self.cfg.tokens in ("prior", "rho"):
            self.reference = _load_reference(self.cfg, trainer)

    def before_batch(self, trainer: Trainer, batch: Batch) -> None:
        """Change ``batch.weights`` in place; collective."""
        warm = trainer.step_done >= self.warmup
        temperature = self.cfg.temperature if warm else self.cfg.warmup_temperature
        strategy = self.cfg.samples if temperature is not None else "uniform"
        own = strategy not in ("none", "uniform") or self.cfg.tokens in ("focal", "rho")
        nll = token_losses(trainer.module, batch) if own else None
        before = batch.weights.double()
        if self.cfg.tokens != "none":
            self._weigh_tokens(trainer, batch, nll)
        if self.cfg.samples != "none":
            self._weigh_samples(trainer, batch, nll, before, (strategy, temperature or 1.0))

    def _weigh_tokens(self, trainer: Trainer, batch: Batch, nll: Tensor | None) -> None:
        if self.cfg.tokens == "focal":
            assert nll is not None
            batch.weights *= by_surprise(nll, self.cfg.gamma)
            return
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


def _load_reference(cfg: ReweightConfig, trainer: Trainer) -> Trained:
    degrees = trainer.module.layout.degrees
    if degrees.context > 1 or degrees.pipeline > 1:
        raise ConfigError(
            f"reweight.tokens: {cfg.tokens} reads a reference model on whole sequences and does "
            "not run with parallel.context or parallel.pipeline above 1; use parallel.shard or "
            "parallel.tensor"
        )
    assert cfg.reference is not None
    return load_reference(Path(cfg.reference), trainer, "reweight.reference")


@torch.no_grad()
def _reference_losses(reference: Trained, module: TrainModule, batch: Batch) -> Tensor:
    """``token_losses`` of the reference, which this rank holds whole."""
    return torch.cat([losses_of(reference, module, m) for m in module.micro_batches(batch)])
