"""Tables and verdicts, computed from the held-out losses of the runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from llmtrain.recipes.experiment import Claim, Experiment
from llmtrain.train.console import table

# Label -> for each seed, domain -> held-out loss in nats per token.
Losses = dict[str, list[dict[str, float]]]
# Student's t, one-sided 95%, by degrees of freedom from 1; the normal value beyond.
_T95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)
_NORMAL95 = 1.645


@dataclass(frozen=True)
class Finding:
    """A claim against the numbers. gain: mean over seeds of (than (1 + within) - better), in nats
    per token;
    bound: 95% one-sided bound of its error over seeds. holds: gain > bound; reversed: the
    opposite is beyond the noise."""

    claim: Claim
    gain: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the claimed direction is beyond the noise of the seeds."""
        return self.gain > self.bound

    @property
    def word(self) -> str:
        """holds, is reversed, or cannot be told."""
        if self.holds:
            return "holds"
        return "is reversed" if -self.gain > self.bound else "is within the seeds' noise"


def findings(experiment: Experiment, losses: Losses) -> list[Finding]:
    """Each claim with its paired differences over seeds; two seeds or more."""
    out = []
    for claim in experiment.claims:
        others = [losses[label] for label in (claim.than, claim.also) if label is not None]
        room = 1 + claim.within
        gaps = [
            room * mean(_mean(other[i], claim.domains) for other in others)
            - _mean(own, claim.domains)
            for i, own in enumerate(losses[claim.better])
        ]
        out.append(Finding(claim, mean(gaps), error_bound(gaps)))
    return out


def error_bound(gaps: Sequence[float]) -> float:
    """The one-sided 95% bound of the error of the mean of ``gaps``, two or more."""
    n = len(gaps)
    t = _T95[n - 2] if n - 2 < len(_T95) else _NORMAL95
    return t * stdev(gaps) / math.sqrt(n)


def verdict(found: Sequence[Finding], refuted: Sequence[str] = ()) -> str:
    """The sentence computed from the deciding claims. refuted: others that do not hold."""
    wrong = [f"{f.claim.text}: {f.word}" for f in found if f.claim.decides and not f.holds]
    wrong += [f"{text}: does not hold" for text in refuted]
    if not wrong:
        return "direction holds at this scale"
    reasons = "; ".join(wrong)
    return f"direction does not hold at this scale ({reasons})"


def loss_table(losses: Losses) -> list[str]:
    """Held-out loss by domain: mean and standard deviation over seeds."""
    domains = list(next(iter(losses.values()))[0])
    rows = [("held-out loss", *domains, "mean")]
    for label, seeds in losses.items():
        columns = [[seed[d] for seed in seeds] for d in domains]
        columns.append([_mean(seed, ()) for seed in seeds])
        rows.append((label, *(f"{mean(c):.4f} ± {stdev(c):.4f}" for c in columns)))
    return table(rows)


def report_lines(
    experiment: Experiment,
    losses: Losses,
    scale: str,
    costs: Sequence[str] = (),
    others: Sequence[tuple[str, bool]] = (),
) -> list[str]:
    """Everything that is printed and written at the end. costs: lines of the table of costs.
    others: claims that are no comparison of losses, and whether they hold; all decide."""
    seeds = len(next(iter(losses.values())))
    found = findings(experiment, losses)
    lines = [f"{experiment.title} ({scale}, {seeds} seeds, ± standard deviation over seeds)"]
    lines += [*loss_table(losses), *costs]
    lines.append("claims (nats per token, mean over seeds; bound: 95% one-sided, paired by seed):")
    rows = []
    for f in found:
        beside = "" if f.claim.decides else " [beside the verdict]"
        rows.append((f.claim.text + beside, f"{f.gain:+.4f}", f"{f.bound:.4f}", f.word))
    rows += [(text, "", "", "holds" if holds else "does not hold") for text, holds in others]
    lines += table([("claim", "gain", "bound", ""), *rows])
    lines += experiment.paper
    lines.append(f"verdict: {verdict(found, [text for text, holds in others if not holds])}")
    return lines


def _mean(losses: dict[str, float], domains: Sequence[str]) -> float:
    chosen = [losses[d] for d in domains] if domains else list(losses.values())
    return mean(chosen)
