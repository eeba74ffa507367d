"""The numbers at the end of a run: for the report's tables and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmtrain.report.curves import event_kind
from llmtrain.report.numbers import NOTHING, bytes_text, duration, fixed, percent, short
from llmtrain.report.read import Run, lookup, number


@dataclass(frozen=True)
class DomainResult:
    """Last held-out numbers of a domain. unigram, unigram_loss: as in ``Run``, nats."""

    name: str
    loss: float
    perplexity: float
    bits_per_byte: float
    unigram: float
    unigram_loss: float


def domain_results(run: Run) -> list[DomainResult]:
    """The last evaluation of each domain."""
    found = []
    for name in run.domains:
        entries = [lookup(record, "domains", name) for record in run.evals]
        last = next((entry for entry in reversed(entries) if entry is not None), None)
        found.append(
            DomainResult(
                name,
                number(lookup(last, "loss")),
                number(lookup(last, "perplexity")),
                number(lookup(last, "bits_per_byte")),
                run.unigram.get(name, math.nan),
                run.unigram_loss.get(name, math.nan),
            )
        )
    return found


def mean_loss(run: Run) -> float:
    """Mean held-out loss of the last evaluation; NaN before the first one."""
    return number(run.evals[-1].get("mean_loss")) if run.evals else math.nan


def train_loss(run: Run) -> float:
    """The last logged training loss that is a number."""
    curve = run.curve("loss")
    return float(curve.y[-1]) if len(curve) else math.nan


def facts(run: Run) -> list[tuple[str, str]]:
    """(name, value) of the numbers that sum a run up, ready to print."""
    last = run.steps[-1] if run.steps else {}
    seconds = run.curve("seconds").y
    rates, mfus = run.curve("tokens_per_second").y, run.curve("mfu").y
    memory = run.curve("memory_bytes").y
    tokens = number(last.get("tokens"))
    kinds = [event_kind(str(event.get("text", ""))) for event in run.events]
    domains = domain_results(run)
    perplexity = math.exp(mean_loss(run)) if mean_loss(run) < 700 else math.nan
    bits = [d.bits_per_byte for d in domains if math.isfinite(d.bits_per_byte)]
    return [
        ("held-out loss", fixed(mean_loss(run))),
        ("perplexity", short(perplexity)),
        ("bits per byte", fixed(sum(bits) / len(bits)) if bits else NOTHING),
        ("training loss", fixed(train_loss(run))),
        ("steps", str(last.get("step", 0))),
        ("tokens", short(tokens)),
        ("training time", duration(float(seconds.sum())) if len(seconds) else NOTHING),
        ("tokens/s, median", short(_median(list(rates)))),
        ("MFU, median", percent(_median(list(mfus)), 1) if len(mfus) else "n/a"),
        ("peak memory", bytes_text(float(memory.max())) if len(memory) else NOTHING),
        *_ranks(run),
        ("spikes and stops", str(kinds.count("bad"))),
        ("resumes", str(kinds.count("resume"))),
    ]


def _ranks(run: Run) -> list[tuple[str, str]]:
    """The rank that was the slowest most often, and how many times the median it took then."""
    found = [record["ranks"] for record in run.steps if isinstance(record.get("ranks"), dict)]
    slowest = [int(number(ranks.get("slowest"))) for ranks in found if "slowest" in ranks]
    if not slowest:
        return []
    worst = max(set(slowest), key=lambda rank: (slowest.count(rank), -rank))
    excess = _median(
        [
            # Runs of earlier versions recorded own work alone.
            number(r["factor"])
            if "factor" in r
            else number(r.get("own_most")) / max(number(r.get("own_median")), 1e-9)
            for r in found
            if r.get("slowest") == worst
        ]
    )
    often = slowest.count(worst) / len(slowest)
    return [("slowest rank", f"{worst} ({excess:.2f} x the median, {often:.0%} of the time)")]


def summary(runs: Sequence[Run]) -> str:
    """A few lines per run for the terminal: held-out loss beside what frequencies alone give."""
    lines = []
    for run in runs:
        named = dict(facts(run))
        lines.append(
            f"{run.name}: {named['steps']} steps, {named['tokens']} tokens, "
            f"training loss {named['training loss']}, held-out loss {named['held-out loss']}"
        )
        for d in domain_results(run):
            bits = f", {d.bits_per_byte:.3f} bits/byte" if math.isfinite(d.bits_per_byte) else ""
            known = (("unigram entropy", d.unigram), ("unigram loss", d.unigram_loss))
            against = "".join(f", {name} {v:.4f}" for name, v in known if math.isfinite(v))
            lines.append(f"  {d.name}: held-out loss {fixed(d.loss)}{bits}{against}")
        if run.unreadable:
            lines.append(f"  {run.unreadable} unreadable lines of metrics.jsonl were left out")
    return "\n".join(lines)


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    if not ordered:
        return math.nan
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
