"""Which charts a report has, for one run and for several laid over each other.

One run: a curve per source or domain, coloured by it. Several runs: a chart per source or
domain, coloured by run, so that one compares like with like.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from llmtrain.report.chart import Chart, Line, Mark
from llmtrain.report.mixture import Mixture
from llmtrain.report.numbers import fixed, percent, percent_tick, short, smooth, thin
from llmtrain.report.read import Record, Run, Series, number, series

HEAD_CUT = "The first 2% of the tokens may lie above the scale."
_KINDS = (
    ("resume", re.compile(r"\bresum", re.IGNORECASE)),
    ("checkpoint", re.compile(r"^\s*(checkpoint|saved)", re.IGNORECASE)),
    ("bad", re.compile(r"spike|sigma|skip|not finite|non-?finite|stopped|nan\b", re.IGNORECASE)),
)


def event_kind(text: str) -> str:
    """resume, checkpoint, bad (spike, skip, stop) or other."""
    return next((kind for kind, pattern in _KINDS if pattern.search(text)), "other")


def event_tokens(run: Run, event: Record) -> float:
    """Where an event lies: its tokens, or those of its step by the step records."""
    tokens = number(event.get("tokens"))
    if np.isfinite(tokens) or not run.steps:
        return tokens
    steps = [number(r.get("step")) for r in run.steps]
    return float(np.interp(event["step"], steps, [number(r.get("tokens")) for r in run.steps]))


def marks(runs: Sequence[Run]) -> list[Mark]:
    """Events as marks; with several runs only spikes and stops, named by run."""
    found = []
    for run in runs:
        for event in run.events:
            text, x = str(event.get("text", "")), event_tokens(run, event)
            kind = event_kind(text)
            if not np.isfinite(x) or (len(runs) > 1 and kind != "bad"):
                continue
            where = f"{run.name}, " if len(runs) > 1 else ""
            found.append(Mark(x, kind, f"{where}step {event['step']}: {text}"))
    return found


def loss_charts(runs: Sequence[Run]) -> list[Chart]:
    """Training loss, by source."""
    names = _union(run.sources for run in runs)
    events = marks(runs)
    if len(runs) == 1:
        run = runs[0]
        lines = _smoothed("all sources", run.curve("loss"), -1)
        if len(names) > 1:
            for i, name in enumerate(names):
                lines.append(
                    Line(name, smooth(run.curve("sources", name, "loss")), _color_of(run, name, i))
                )
        return [Chart("Training loss by source", lines, events, HEAD_CUT, head_cut=True)]
    charts = [
        Chart(
            "Training loss, all sources",
            _per_run(runs, "loss"),
            events,
            HEAD_CUT,
            head_cut=True,
        )
    ]
    for name in names if len(names) > 1 else ():
        lines = [
            Line(run.name, smooth(run.curve("sources", name, "loss")), i)
            for i, run in enumerate(runs)
        ]
        charts.append(Chart(f"Training loss, {name}", lines, head_cut=True))
    return charts


def heldout_charts(runs: Sequence[Run], key: str, title: str, log: bool = False) -> list[Chart]:
    """A held-out number (loss, perplexity, bits_per_byte) by domain."""
    domains = _union(run.domains for run in runs)
    form = short if key == "perplexity" else fixed
    note = "Dotted: entropy of the token frequencies alone (unigram)." if key == "loss" else ""
    if len(runs) == 1:
        run = runs[0]
        lines = [
            Line(name, run.heldout(name, key), _color_of(run, name, i), dots=True)
            for i, name in enumerate(domains)
        ]
        known = key == "loss" and any(name in run.unigram for name in domains)
        lines += _unigram_lines(run, lines) if known else []
        return [Chart(f"{title} by domain", lines, note=note if known else "", log=log, form=form)]
    if key == "loss" and len(domains) > 1:
        means = [Line(r.name, _mean_loss(r), i, dots=len(r.evals) < 60) for i, r in enumerate(runs)]
        charts = [Chart(f"{title}, mean of the domains", means, form=form)]
    else:
        charts = []
    for name in domains:
        lines = [Line(r.name, r.heldout(name, key), i, dots=True) for i, r in enumerate(runs)]
        charts.append(Chart(f"{title}, {name}", lines, log=log, form=form))
    return [chart for chart in charts if any(len(line.curve) for line in chart.lines)]


def optimizer_charts(runs: Sequence[Run]) -> list[Chart]:
    """Learning rate, gradient norm, and methods' own numbers (such as a penalty)."""
    norms = _per_run(runs, "grad_norm")
    values = np.concatenate([line.curve.y for line in norms] or [np.empty(0)])
    wild = len(values) > 0 and values.min() > 0 and values.max() > 15 * np.median(values)
    rate = [Line(_label(runs, r), thin(r.curve("lr")), _run_color(runs, i)) for i, r in _each(runs)]
    own = _union(run.methods for run in runs)
    return [
        Chart("Learning rate", rate, zero=True, form=short),
        Chart("Gradient norm", norms, marks(runs), log=bool(wild), zero=True, form=short),
        *(
            Chart(name.capitalize(), _per_run(runs, "method", name), zero=True, form=short)
            for name in own
        ),
    ]


def speed_charts(runs: Sequence[Run]) -> list[Chart]:
    """Throughput, MFU where the device's peak is known, memory, and waiting for data."""
    charts = [
        Chart("Tokens per second", _per_run(runs, "tokens_per_second"), zero=True, form=short)
    ]
    if any(len(run.curve("mfu")) for run in runs):
        charts.append(
            Chart("MFU", _per_run(runs, "mfu"), zero=True, form=percent, tick=percent_tick)
        )
    memory = _per_run(runs, "memory_bytes", scale=2.0**-30)
    charts.append(Chart("Memory of the fullest process, GiB", memory, zero=True, form=short))
    waits = [
        Line(_label(runs, run), smooth(_wait_share(run)), _run_color(runs, i))
        for i, run in _each(runs)
    ]
    charts.append(
        Chart(
            "Share of the time spent waiting for data",
            waits,
            zero=True,
            form=percent,
            tick=percent_tick,
        )
    )
    return charts


def mixture_chart(run: Run, mix: Mixture, title: str) -> Chart:
    """Shares of the sources over tokens; planned ones dotted."""
    lines = [
        Line(name, Series(mix.x, shares), _color_of(run, name, i))
        for i, (name, shares) in enumerate(mix.realised.items())
    ]
    for name, shares in mix.planned.items():
        lines.append(Line(name, Series(mix.x, shares), -1, dashed=True))
    lines = [replace(line, curve=_finite(line.curve)) for line in lines]
    note = "Dotted: planned share over the same steps." if mix.planned else ""
    return Chart(title, lines, note=note, zero=True, form=percent, tick=percent_tick)


def _union(groups: Iterable[Sequence[str]]) -> list[str]:
    names: dict[str, None] = {}
    for group in groups:
        names.update(dict.fromkeys(group))
    return list(names)


def _each(runs: Sequence[Run]) -> list[tuple[int, Run]]:
    return list(enumerate(runs))


def _label(runs: Sequence[Run], run: Run) -> str:
    return "this run" if len(runs) == 1 else run.name


def _run_color(runs: Sequence[Run], i: int) -> int:
    return -1 if len(runs) == 1 else i


def _color_of(run: Run, name: str, fallback: int) -> int:
    """One colour per source or domain on the whole page."""
    names = _union([run.sources, run.domains])
    return names.index(name) if name in names else fallback


def _smoothed(key: str, curve: Series, color: int) -> list[Line]:
    """A long curve as a mean with the raw values behind it, a short one as it is."""
    mean = smooth(curve)
    if mean is curve:
        return [Line(key, curve, color)]
    return [Line(key, thin(curve), color, faint=True), Line(key, mean, color)]


def _per_run(runs: Sequence[Run], *keys: str, scale: float = 1.0) -> list[Line]:
    lines: list[Line] = []
    for i, run in enumerate(runs):
        curve = run.curve(*keys)
        lines += _smoothed(_label(runs, run), Series(curve.x, curve.y * scale), _run_color(runs, i))
    return lines


def _unigram_lines(run: Run, lines: Sequence[Line]) -> list[Line]:
    """Level lines from the first to the last token of the run."""
    seen = [record.get("tokens") for record in (*run.steps[-1:], *run.evals[-1:])]
    ends = np.array([0.0, max(map(number, seen), default=1.0)])
    return [
        Line(line.key, Series(ends, np.full(2, run.unigram[line.key])), line.color, dashed=True)
        for line in lines
        if len(line.curve) and line.key in run.unigram and np.isfinite(ends).all()
    ]


def _mean_loss(run: Run) -> Series:
    return series(run.evals, "mean_loss")


def _finite(curve: Series) -> Series:
    good = np.isfinite(curve.x) & np.isfinite(curve.y)
    return Series(curve.x[good], curve.y[good])


def _wait_share(run: Run) -> Series:
    waits, seconds = run.curve("data_seconds"), run.curve("seconds")
    if len(waits) != len(seconds):
        return Series(np.empty(0), np.empty(0))
    with np.errstate(divide="ignore", invalid="ignore"):
        return _finite(Series(waits.x, waits.y / seconds.y))
