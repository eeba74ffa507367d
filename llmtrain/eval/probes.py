"""Scores of samples by a trained model: EL2N, GraNd, perplexity, influence.

EL2N and GraNd: Paul, Ganguli and Dziugaite 2021, 2107.07075 (see ``loss.scores``). Influence:
the one-step probe of MATES (Yu, Das and Xiong 2024, 2406.06046, section 3.1), and its first-order
part. Dropout is off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmtrain.config.schema import DataConfig, LossConfig
from llmtrain.data.batch import Batch
from llmtrain.data.scores import LOSSES
from llmtrain.errors import ConfigError
from llmtrain.eval.loading import Trained
from llmtrain.loss import LossOutput, head_loss
from llmtrain.loss.scores import head_gradient_norms, token_errors
from llmtrain.model import Head

INFLUENCE = ("influence", "influence-gradient")
# Scores that need forward passes only; the others make gradients of the whole model.
FORWARD = ("el2n", "grand", "perplexity", LOSSES)
METHODS = (*FORWARD, "grand-full", *INFLUENCE)

# Scores [b] float64 of the samples of a batch, NaN where no token counts; or the losses [b, s] of
# their tokens.
Scorer = Callable[[Batch], Tensor]


def scorer(
    method: str, trained: Trained, data: DataConfig, target: Sequence[Batch], lr: float
) -> Scorer:
    """The scores that ``method`` means. target: held-out batches whose loss influence is on;
    lr: of influence's one step. Raises ConfigError where influence has no held-out data."""
    model = _Model(trained, data)
    if method == "grand-full":
        return lambda batch: _row_by_row(batch, lambda row: _norm(model.gradient([row])))
    if method in INFLUENCE:
        if not target:
            raise ConfigError(
                f"--method {method}: needs held-out data, whose loss it is about; set "
                "data.heldout, or prepare the corpus with heldout_fraction above 0"
            )
        probe = _Probe(model, target, lr if method == "influence" else None)
        return lambda batch: _row_by_row(batch, probe.influence)
    return lambda batch: _from_head(model, method, batch)


class _Model:
    """A loaded model as the probes use it."""

    def __init__(self, trained: Trained, data: DataConfig) -> None:
        self.model, self.data = trained.model, data
        self.loss_cfg = LossConfig(chunk_tokens=trained.cfg.loss.chunk_tokens)
        self.params = list(trained.model.parameters())

    def __call__(self, batch: Batch, head_fn: Callable[[Tensor, Head], Any]) -> Any:
        return self.model(
            batch.tokens,
            positions=batch.positions if self.data.reset_positions else None,
            doc_ids=batch.doc_ids if self.data.document_mask else None,
            head_fn=head_fn,
        )

    def output(self, batch: Batch, weight: float) -> LossOutput:
        """Token losses of a batch; ``loss`` is their weighted sum over ``weight``."""

        def head_fn(hidden: Tensor, head: Head) -> LossOutput:
            return head_loss(hidden, head, batch.targets, batch.weights, self.loss_cfg, weight)

        output: LossOutput = self(batch, head_fn)
        return output

    def gradient(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Of the mean loss over the weights of ``batches``, by parameter."""
        weight = _weight(batches)
        for batch in batches:
            self.output(batch, weight).loss.backward()  # type: ignore[no-untyped-call]
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        for p in self.params:
            p.grad = None
        return found


def _weight(batches: Sequence[Batch]) -> float:
    return float(sum(float(batch.weights.sum(dtype=torch.float64)) for batch in batches))


def _norm(gradient: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradient))


def _from_head(model: _Model, method: str, batch: Batch) -> Tensor:
    """Scores that one forward pass gives."""
    mean = batch.weights.double() / batch.weights.sum(1, keepdim=True, dtype=torch.float64)
    chunk = model.loss_cfg.chunk_tokens

    def head_fn(hidden: Tensor, head: Head) -> Tensor:
        if method == "grand":
            return head_gradient_norms(hidden, head, batch.targets, mean, chunk)
        errors = token_errors(hidden, head, batch.targets, chunk)
        if method == LOSSES:
            return errors.nll.double()
        if method == "el2n":
            return (mean * errors.error).sum(1)
        return (mean * errors.nll).sum(1).clamp(max=700.0).exp()

    with torch.no_grad():
        scores: Tensor = model(batch, head_fn)
    return scores


def _row_by_row(batch: Batch, score: Callable[[Batch], float]) -> Tensor:
    rows = [batch[i : i + 1] for i in range(len(batch))]
    values = [score(row) if _weight([row]) else math.nan for row in rows]
    return torch.tensor(values, dtype=torch.float64)


class _Probe:
    """What a plain gradient step on one sample does to the loss of ``target``.

    lr: the step; the score is then how far the loss falls, measured. None: to first order and
    without the factor lr, which is the product of the two gradients. Both are positive for samples
    that help.
    """

    def __init__(self, model: _Model, target: Sequence[Batch], lr: float | None) -> None:
        self.model, self.target, self.lr = model, target, lr
        self.weight = _weight(target)
        self.start = [p.detach().clone() for p in model.params] if lr else []
        self.before = self._loss() if lr else 0.0
        self.gradient = [] if lr else model.gradient(target)

    @torch.no_grad()
    def _loss(self) -> float:
        total = 0.0
        for batch in self.target:
            nll = self.model.output(batch, 1.0).nll
            # In float64: what is wanted is a small difference of two such sums.
            total += float((nll.double() * batch.weights).sum())
        return total / self.weight

    def influence(self, sample: Batch) -> float:
        """The score of one sample (a batch of one)."""
        own = self.model.gradient([sample])
        if self.lr is None:
            pairs = zip(own, self.gradient, strict=True)
            return sum(float((a.double() * b.double()).sum()) for a, b in pairs)
        with torch.no_grad():
            for p, g in zip(self.model.params, own, strict=True):
                p.sub_(g, alpha=self.lr)
            fall = self.before - self._loss()
            for p, start in zip(self.model.params, self.start, strict=True):
                p.copy_(start)
        return fall
