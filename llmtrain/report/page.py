"""The report's page: sections put together into one HTML file that needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import count
from typing import Any

from llmtrain import __version__
from llmtrain.report import curves
from llmtrain.report.chart import Chart, draw
from llmtrain.report.mixture import Mixture, mixture
from llmtrain.report.numbers import NOTHING, fixed, percent, short
from llmtrain.report.numerics import HEAD, numerics_rows
from llmtrain.report.read import Run, parse_config
from llmtrain.report.summary import domain_results, facts
from llmtrain.report.tree import draw_trees

SHOWN = 8  # charts of a section that are open at once; the rest is folded


def render(runs: Sequence[Run]) -> str:
    """The HTML page of one run, or of several runs laid over each other."""
    numbers = count(1)
    mixes = [(run, mix) for run in runs if (mix := mixture(run)) is not None]
    parts = [
        _header(runs),
        section("Result", _tiles(runs[0]) if len(runs) == 1 else _comparison(runs)),
        section("Held-out text", _domain_table(runs)),
        _charts("Loss", _losses(runs), numbers),
        _charts("Optimizer", curves.optimizer_charts(runs), numbers),
        _charts("Speed and memory", curves.speed_charts(runs), numbers),
        section("Range of FP8", _numerics(runs)),
        _mixture_section(mixes, len(runs), numbers),
        section("Branches", draw_trees(runs)),
        section("Samples", _samples(runs)),
        section("Events", _events(runs)),
        section("Config", _config(runs)),
    ]
    return page("llmtrain: " + ", ".join(run.name for run in runs), "".join(parts))


def page(title: str, main: str) -> str:
    """One HTML file with style and script inside. main: HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(title)}</title><style>{_asset('report.css')}</style></head><body>"
        f"<main>{main}</main><div id='tip' hidden></div>"
        f"<script>{_asset('report.js')}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return files("llmtrain.report").joinpath("assets", name).read_text(encoding="utf-8")


def section(title: str, body: str) -> str:
    """A section under a heading, nothing where ``body`` is empty. body: HTML."""
    if not body:
        return ""
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def _header(runs: Sequence[Run]) -> str:
    keys = ""
    if len(runs) > 1:
        swatches = "".join(
            f'<span><i class="swatch c{i % 8}"></i>{html.escape(run.name)}</span>'
            for i, run in enumerate(runs)
        )
        keys = f'<p class="runs">{swatches}</p>'
    name = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    notes = [
        f"{run.name}: {run.unreadable} unreadable lines of metrics.jsonl were left out."
        for run in runs
        if run.unreadable
    ]
    notes += [f"{run.name}: no step has been logged yet." for run in runs if not run.steps]
    warnings = "".join(f'<p class="warn">{html.escape(note)}</p>' for note in notes)
    return (
        f"<header><h1>{html.escape(name)}</h1>"
        f'<p class="by">llmtrain {html.escape(__version__)} run report</p>{keys}{warnings}</header>'
    )


def _tiles(run: Run) -> str:
    tiles = "".join(
        f"<div class='tile'><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>"
        for name, value in facts(run)
    )
    return f"<div class='tiles'>{tiles}</div>"


def _comparison(runs: Sequence[Run]) -> str:
    columns = [facts(run) for run in runs]
    head = ["", *(run.name for run in runs)]
    rows = [[row[0][0], *(cell for _, cell in row)] for row in zip(*columns, strict=True)]
    return html_table(head, rows)


def _domain_table(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        for d in domain_results(run):
            row = [d.name, fixed(d.loss), short(d.perplexity), fixed(d.bits_per_byte)]
            row += [fixed(d.unigram), fixed(d.unigram_loss)]
            rows.append([*([run.name] if len(runs) > 1 else []), *row])
    head = ["domain", "loss (nats/token)", "perplexity", "bits per byte"]
    head += ["unigram entropy", "unigram loss"]
    if len(runs) > 1:
        rows.sort(key=lambda row: row[1])
        head = ["run", *head]
    while rows and all(row[-1] == NOTHING for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    if not rows:
        return "<p class='empty'>no evaluation yet</p>"
    note = (
        "<p class='note'>Unigram: what token frequencies alone give, without context; entropy: "
        "those of the held-out text itself, loss: those of the training text.</p>"
    )
    table = html_table(head, rows, 2 if len(runs) > 1 else 1)
    return table + (note if head[-1].startswith("unigram") else "")


def _losses(runs: Sequence[Run]) -> list[Chart]:
    return [
        *curves.heldout_charts(runs, "loss", "Held-out loss"),
        *curves.loss_charts(runs),
        *curves.heldout_charts(runs, "perplexity", "Perplexity", log=True),
        *curves.heldout_charts(runs, "bits_per_byte", "Bits per byte"),
    ]


def _charts(title: str, charts: Sequence[Chart], numbers: Iterator[int]) -> str:
    charts = [chart for chart in charts if any(len(line.curve) for line in chart.lines)]
    if not charts:
        return ""
    drawn = [draw(chart, next(numbers)) for chart in charts]
    body = f"<div class='grid2'>{''.join(drawn[:SHOWN])}</div>"
    if drawn[SHOWN:]:
        body += (
            f"<details><summary>{len(drawn) - SHOWN} more charts</summary>"
            f"<div class='grid2'>{''.join(drawn[SHOWN:])}</div></details>"
        )
    return section(title, body)


def _mixture_section(
    mixes: Sequence[tuple[Run, Mixture]], runs: int, numbers: Iterator[int]
) -> str:
    body = ""
    for run, mix in mixes:
        title = "Share of the tokens by source" + (f", {run.name}" if runs > 1 else "")
        chart = draw(curves.mixture_chart(run, mix, title), next(numbers))
        body += f"<div class='grid2'>{chart}<div class='card'>{_phase_table(mix)}</div></div>"
    note = (
        "<p class='note'>Each phase is measured between the logged steps nearest inside its "
        "ends; planned and realised over the same steps.</p>"
    )
    return section("Mixture: realised against planned", body + note) if body else ""


def _phase_table(mix: Mixture) -> str:
    rows = []
    for phase in mix.phases:
        for share in phase.shares:
            apart = share.realised - share.planned
            rows.append(
                [
                    f"{phase.number}: {short(phase.start)} to {short(phase.end)} tokens",
                    share.source,
                    percent(share.planned),
                    percent(share.realised),
                    f"{100 * apart:+.2f}" if math.isfinite(apart) else NOTHING,
                    short(share.tokens),
                ]
            )
    head = ["phase", "source", "planned", "realised", "points", "tokens"]
    return html_table(head, rows, 2) if rows else "<p class='empty'>no phase has begun</p>"


def _samples(runs: Sequence[Run]) -> str:
    body = ""
    for run in runs:
        for record in run.samples[-24:]:
            where = f"{run.name}, " if len(runs) > 1 else ""
            prompt, text = str(record.get("prompt", "")), str(record.get("text", ""))
            body += (
                f"<figure class='card'><figcaption>{html.escape(where)}step {record['step']}"
                f"</figcaption><pre class='sample'><b>{html.escape(prompt)}</b>"
                f"{html.escape(text)}</pre></figure>"
            )
    return f"<div class='grid2'>{body}</div>" if body else ""


def _numerics(runs: Sequence[Run]) -> str:
    rows = list(numerics_rows(runs))
    if not rows:
        return ""
    names = ["run"] if len(runs) > 1 else []
    steps = ", ".join(f"{run.numerics[-1]['step']}" for run in runs if run.numerics)
    note = (
        f"<p>Step {steps}. Shares of elements that a cast with static scales makes zero or clips: "
        "inputs and weights to e4m3, gradients (times quantization.gradient_scale) to e5m2.</p>"
    )
    return note + html_table([*names, *HEAD], rows, len(names) + 2)


def _events(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        for event in run.events:
            text = str(event.get("text", ""))
            row = [str(event["step"]), short(curves.event_tokens(run, event)), text]
            kind = f"event {curves.event_kind(text)}"
            rows.append((kind, [*([run.name] if len(runs) > 1 else []), *row]))
    if not rows:
        return ""
    head = [*(["run"] if len(runs) > 1 else []), "step", "tokens", "what happened"]
    shown = [row for kind, row in rows if "checkpoint" not in kind][-200:]
    saved = [row for kind, row in rows if "checkpoint" in kind]
    body = html_table(head, shown, len(head)) if shown else ""
    if saved:
        body += (
            f"<details><summary>{len(saved)} checkpoints</summary>"
            f"{html_table(head, saved[-200:], len(head))}</details>"
        )
    return body


def _config(runs: Sequence[Run]) -> str:
    body = ""
    if len(runs) > 1:
        trees = [_flat(parse_config(run.config)) for run in runs]
        keys = sorted(set().union(*trees))
        rows = [
            [key, *(str(tree.get(key, NOTHING)) for tree in trees)]
            for key in keys
            if any(tree.get(key, NOTHING) != trees[0].get(key, NOTHING) for tree in trees)
        ]
        head = ["key that differs", *(run.name for run in runs)]
        body = html_table(head, rows, len(head)) if rows else "<p>The configs are the same.</p>"
    for run in runs:
        if run.config:
            body += (
                f"<details><summary>{html.escape(run.name)}/config.yaml</summary>"
                f"<pre class='yaml'>{html.escape(run.config)}</pre></details>"
            )
    return body


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A tree as dotted keys; lists stay values."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A table whose first ``texts`` columns are words and the others numbers."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{'' if i < texts else ' class=num'}>{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f"<div class='scroll'><table><thead><tr>{cells(head, 'th')}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )
