"""Scaling laws for precision (Kumar et al. 2024, 2411.04330): forms, fits and what follows.

Trained with weights, activations and keys and values of P_w, P_a and P_kv bits, a model of N
parameters on D tokens ends at

    L = A N_eff^-alpha + B D^-beta + E,   N_eff = N prod_x (1 - exp(-P_x / g_x))

and one that was trained in full precision and then rounded to P bits loses besides

    delta = C_T D^gD / N^gN exp(-P / g_post)

Both are fitted as Hoffmann et al. 2022 (2203.15556, appendix D.3) fit theirs: Huber's loss of the
differences of logarithms, by L-BFGS in float64 from several starts, the best of which is taken.
The authors call the trends portable, and the constants not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("weights", "activations", "kv")
# Bits of what is not quantised: the factor of N_eff is 1 within round-off for any g here.
FULL = 16.0
# Beyond this a difference of logarithms counts as an outlier.
HUBER = 1e-3


class Run(NamedTuple):
    """A trained model: parameters (without embedding), tokens, bits in the order of ``KINDS`` (16:
    full precision) and its loss."""

    n: float
    d: float
    bits: tuple[float, float, float]
    loss: float


class Rounded(NamedTuple):
    """A model rounded after training: parameters, tokens, bits, and what its loss rose by."""

    n: float
    d: float
    bits: float
    rise: float


@dataclass(frozen=True)
class PrecisionLaw:
    """L(N, D, bits) with its constants; g in the order of ``KINDS``."""

    a: float
    alpha: float
    b: float
    beta: float
    e: float
    g: tuple[float, float, float]

    def effective(self, n: float, bits: Sequence[float]) -> float:
        """N_eff."""
        return n * math.prod(-math.expm1(-p / g) for g, p in zip(self.g, bits, strict=True))

    def loss(self, n: float, d: float, bits: Sequence[float]) -> float:
        """The loss of a model of ``n`` parameters after ``d`` tokens."""
        parameters = self.a * math.pow(self.effective(n, bits), -self.alpha)
        return parameters + self.b * math.pow(d, -self.beta) + self.e


@dataclass(frozen=True)
class RoundingLaw:
    """delta(N, D, P) of rounding after training."""

    c: float
    gamma_d: float
    gamma_n: float
    g: float

    def rise(self, n: float, d: float, bits: float) -> float:
        """What the loss rises by."""
        models = math.pow(d, self.gamma_d) / math.pow(n, self.gamma_n)
        return self.c * models * math.exp(-bits / self.g)

    def critical_tokens(self, law: PrecisionLaw, n: float, bits: float) -> float:
        """Tokens from which on more training makes the rounded model worse: where the rise grows
        as fast as B D^-beta falls. Infinite where it does not grow."""
        if self.gamma_d <= 0:
            return math.inf
        top = law.beta * law.b * n**self.gamma_n * math.exp(bits / self.g)
        return float((top / (self.gamma_d * self.c)) ** (1 / (self.gamma_d + law.beta)))


def _search(
    objective: Callable[[Tensor], Tensor], start: Sequence[float], steps: int
) -> tuple[float, list[float]]:
    """(objective, parameters) where L-BFGS is after ``steps`` from ``start``."""
    x = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [x],
        max_iter=steps,
        history_size=20,
        tolerance_grad=1e-13,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        x.grad = None
        value = objective(x)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    search.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return float(objective(x)), x.tolist()


def _minimise(objective: Callable[[Tensor], Tensor], starts: Sequence[Sequence[float]]) -> Tensor:
    """The parameters with the least objective: a short search from each start, a long one from the
    best of their ends."""
    _, best = min(_search(objective, start, 40) for start in starts)
    return torch.tensor(_search(objective, best, 1000)[1], dtype=torch.float64)


def _huber(residual: Tensor) -> Tensor:
    """The sum of Huber's losses in units of ``HUBER``."""
    scaled = residual.abs() / HUBER
    return torch.where(scaled <= 1, 0.5 * scaled.square(), scaled - 0.5).mean()


def fit_precision_law(runs: Sequence[Run], near: PrecisionLaw | None = None) -> PrecisionLaw:
    """The law of ``runs``, which must differ in parameters, tokens and bits of every kind.

    near: where to begin instead of at several places, such as the law of nearly the same runs.

    Raises ValueError where there are fewer runs than constants.
    """
    if len(runs) < 9:
        raise ValueError(f"{len(runs)} runs cannot determine 8 constants")
    table = torch.tensor([(r.n, r.d, *r.bits, r.loss) for r in runs], dtype=torch.float64)
    log_n, log_d, target = table[:, 0].log(), table[:, 1].log(), table[:, 5].log()
    bits = table[:, 2:5]
    # Around the middle of the grid the constants hardly depend on each other.
    middle_n, middle_d = log_n.mean(), log_d.mean()

    def predicted(x: Tensor) -> Tensor:
        factors = -torch.special.expm1(-bits / x[5:8].exp())
        effective = log_n - middle_n + factors.log().sum(1)
        # Exponents stay positive.
        terms = (x[0] - x[1].exp() * effective, x[2] - x[3].exp() * (log_d - middle_d), x[4])
        return torch.logsumexp(torch.stack([t.expand(len(runs)) for t in terms]), 0)

    starts: list[list[float]]
    if near is not None:
        size = [math.log(near.a) - near.alpha * float(middle_n), math.log(near.alpha)]
        length = [math.log(near.b) - near.beta * float(middle_d), math.log(near.beta)]
        starts = [[*size, *length, math.log(near.e), *map(math.log, near.g)]]
    else:
        least = float(target.min())
        fifth = least + math.log(0.2)
        starts = [
            [fifth, math.log(p), fifth, math.log(q), least - rest, g, g, g]
            for p, q, rest, g in product((0.2, 0.6), (0.2, 0.6), (0.3, 1.0), (0.0, 0.8))
        ]
    x = _minimise(lambda x: _huber(predicted(x) - target), starts)
    alpha, beta = float(x[1].exp()), float(x[3].exp())
    return PrecisionLaw(
        a=float((x[0] + alpha * middle_n).exp()),
        alpha=alpha,
        b=float((x[2] + beta * middle_d).exp()),
        beta=beta,
        e=float(x[4].exp()),
        g=(float(x[5].exp()), float(x[6].exp()), float(x[7].exp())),
    )


def fit_rounding_law(points: Sequence[Rounded]) -> RoundingLaw:
    """The law of what rounding after training costs; points whose loss did not rise say nothing.

    Raises ValueError where fewer than five are left.
    """
    risen = [p for p in points if p.rise > 0]
    if len(risen) < 5:
        raise ValueError(f"{len(risen)} models got worse by rounding, too few to fit 4 constants")
    table = torch.tensor([(p.n, p.d, p.bits, p.rise) for p in risen], dtype=torch.float64)
    columns = torch.stack(
        (
            torch.ones(len(risen), dtype=torch.float64),
            table[:, 1].log(),
            -table[:, 0].log(),
            -table[:, 2],
        )
    ).t()
    target = table[:, 3].log()
    # A line in the logarithms: least squares begin, Huber's loss ends.
    shift, scale = columns.mean(0), columns.std(0).clamp(min=1e-12)
    shift[0], scale[0] = 0.0, 1.0
    unit = (columns - shift) / scale
    start = torch.linalg.lstsq(unit, target[:, None]).solution.flatten()
    x = _minimise(lambda x: _huber(unit @ x - target), [start.tolist()])
    slopes = x / scale
    constant = float(x[0] - (slopes[1:] * shift[1:]).sum())
    return RoundingLaw(
        math.exp(constant), float(slopes[1]), float(slopes[2]), 1 / max(float(slopes[3]), 1e-12)
    )


def explained(targets: Sequence[float], predictions: Sequence[float]) -> float:
    """R^2: the share of the variance of ``targets`` that ``predictions`` explain."""
    mean = math.fsum(targets) / len(targets)
    left = math.fsum((t - p) ** 2 for t, p in zip(targets, predictions, strict=True))
    return 1 - left / math.fsum((t - mean) ** 2 for t in targets)


class Optimum(NamedTuple):
    """The best use of a compute budget: parameters, tokens, bits of all kinds alike, loss."""

    n: float
    d: float
    bits: float
    loss: float


def best_at(law: PrecisionLaw, compute: float, bits: float) -> Optimum:
    """The best N and D where every kind has ``bits`` and a run costs C = 6 N D bits / 16 (16-bit
    operations): with N D fixed, A_eff N^-alpha + B D^-beta is least where their slopes agree."""
    area = 16 * compute / (6 * bits)
    factor = law.effective(1.0, (bits,) * 3)
    a = law.a * factor**-law.alpha
    ratio = law.alpha * a / (law.beta * law.b)
    n = (ratio * area**law.beta) ** (1 / (law.alpha + law.beta))
    return Optimum(n, area / n, bits, law.loss(n, area / n, (bits,) * 3))


def best_precision(
    law: PrecisionLaw, compute: float, lowest: float = 1.0, highest: float = 16.0
) -> Optimum:
    """The best of all precisions: parameters, tokens and bits for ``compute``, by a scan in steps
    of 0.01 bits."""
    steps = round((highest - lowest) * 100)
    return min(
        (best_at(law, compute, lowest + i / 100) for i in range(steps + 1)), key=lambda o: o.loss
    )
