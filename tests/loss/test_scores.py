"""EL2N and last-layer GraNd against full logits and autograd in float64, whole and shared."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from llmtrain.linear import Matmul, matmul_for
from llmtrain.loss import scores
from llmtrain.loss.scores import head_gradient_norms, token_errors
from llmtrain.parallel.tensor import TensorParallel

VOCAB, PADDED, WIDTH = 53, 60, 24


@dataclass
class PlainHead:
    """A head over all words, or over one rank's rows of them."""

    weight: Tensor
    vocab_size: int = VOCAB
    tensor: TensorParallel | None = None
    matmul: Matmul = matmul_for(torch.float32)
    scale: float = 1.0

    def operand(self) -> Tensor:
        return self.weight


def inputs(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = scale * torch.randn(3, 11, WIDTH, generator=generator)
    weight = torch.randn(PADDED, WIDTH, generator=generator)
    targets = torch.randint(0, VOCAB, (3, 11), generator=generator)
    weights = torch.rand(3, 11, generator=generator)
    weights[1, 4:] = 0
    return hidden, weight, targets, weights


def expected(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, constant: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Errors, nll and gradient norms from the definitions in float64."""
    matrix = weight.double().requires_grad_()
    logits = constant * hidden.double() @ matrix[:VOCAB].T
    difference = logits.softmax(-1) - one_hot(targets, VOCAB)
    nll = cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    norms = []
    for i in range(len(hidden)):
        (gradient,) = torch.autograd.grad((weights[i] * nll[i]).sum(), matrix, retain_graph=True)
        norms.append(gradient.norm())
    return difference.norm(dim=-1).detach(), nll.detach(), torch.stack(norms)


@pytest.mark.parametrize("chunk", [1000, 7])
@pytest.mark.parametrize(("scale", "constant"), [(0.05, 1.0), (1.0, 0.3), (20.0, 1.0)])
def test_errors_and_norms(
    scale: float, constant: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "_WORDS", 10)
    hidden, weight, targets, weights = inputs(scale)
    error, nll, norms = expected(hidden, weight, targets, weights, constant)
    head = PlainHead(weight, scale=constant)
    found = token_errors(hidden, head, targets, chunk)
    torch.testing.assert_close(found.error.double(), error, rtol=3e-5, atol=1e-7)
    torch.testing.assert_close(found.nll.double(), nll, rtol=3e-5, atol=1e-5)
    own = head_gradient_norms(hidden, head, targets, weights, chunk)
    torch.testing.assert_close(own, norms, rtol=3e-5, atol=1e-8)


def test_what_is_nearly_known_keeps_its_digits() -> None:
    """The textbook form sqrt(sum p^2 - 2 p_y + 1) would round an error of 1e-4 to 0 or 3e-4."""
    hidden, targets = torch.ones(1, 1, 1), torch.zeros(1, 1, dtype=torch.int64)
    for gap in (9.0, 15.0, 30.0):
        weight = torch.tensor([[gap], [0.0], [-1.0]])
        found = token_errors(hidden, PlainHead(weight, 3), targets, 8).error
        p = torch.softmax(weight[:, 0].double(), 0)
        exact = (p[1:].sum() ** 2 + (p[1:] ** 2).sum()).sqrt()
        torch.testing.assert_close(found.double().squeeze(), exact, rtol=1e-5, atol=0)


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "vocab"), [(2, 53), (4, 44)])
def test_a_shared_vocabulary_changes_nothing(ranks: int, vocab: int) -> None:
    """Of 4 ranks the third has one word of padding and the last one nothing else."""
    hidden, weight, targets, weights = inputs()
    targets %= vocab
    whole = token_errors(hidden, PlainHead(weight, vocab), targets, 7)
    norms = head_gradient_norms(hidden, PlainHead(weight, vocab), targets, weights, 7)

    def body(rank: int) -> tuple[Tensor, ...]:
        group = dist.group.WORLD
        assert group is not None
        own = weight.chunk(ranks)[rank]
        head = PlainHead(own, vocab, TensorParallel(group, rank, ranks))
        found = token_errors(hidden, head, targets, 7)
        gradient = head_gradient_norms(hidden, head, targets, weights, 7)
        return found.error, found.nll, found.lse, gradient

    for error, nll, lse, gradient in run_ranks(ranks, body):
        torch.testing.assert_close(error, whole.error, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(nll, whole.nll, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, whole.lse, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, norms, rtol=1e-5, atol=1e-9)
