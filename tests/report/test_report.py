"""The report: reading broken runs, the numbers it shows, the page it writes."""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers.synthetic_runs import SOURCES, records, share, write_corpus, write_run

from llmtrain.cli import report as command
from llmtrain.errors import DataError, EnvironmentFault
from llmtrain.report import read_run, read_runs, render, summary
from llmtrain.report.chart import Chart, Line, draw
from llmtrain.report.curves import event_kind
from llmtrain.report.mixture import mixture
from llmtrain.report.numbers import (
    bytes_text,
    duration,
    linear_ticks,
    log_ticks,
    short,
    smooth,
    thin,
)
from llmtrain.report.read import Series

VOID = {"meta", "rect", "line", "polyline", "circle", "i"}


class Page(HTMLParser):
    """Checks that tags are balanced; collects tags, attributes, and text outside scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self.stack and self.stack[-1] == "script" else self.text).append(data)

    def titles(self) -> list[str]:
        """Titles of the drawn charts."""
        return [str(a["aria-label"]) for t, a in self.tags if t == "svg" and a.get("aria-label")]


def page(*folders: Path) -> Page:
    return Page(render(read_runs(folders)))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    return write_run(tmp_path / "runs" / "first", records())


def test_one_run_shows_every_chart_and_number(run: Path) -> None:
    shown = page(run)
    assert shown.titles() == [
        "Held-out loss by domain",
        "Training loss by source",
        "Perplexity by domain",
        "Bits per byte by domain",
        "Learning rate",
        "Gradient norm",
        "Tokens per second",
        "Memory of the fullest process, GiB",
        "Share of the time spent waiting for data",
        "Share of the tokens by source",
    ]
    text = "".join(shown.text)
    last = [r for r in records() if r["kind"] == "eval"][-1]
    for name, domain in last["domains"].items():
        assert name in text
        assert f"{domain['loss']:.4f}" in text
        assert f"{domain['bits_per_byte']:.4f}" in text
        assert f"{SOURCES[name][1]:.4f}" in text  # unigram entropy
    assert f"{last['mean_loss']:.4f}" in text
    assert "9.3 sigma" in text
    assert "resumed from step-00000150" in text
    assert "lr: 0.002" in text


def test_the_page_needs_nothing_else_and_escapes_what_users_wrote(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    lines = records(40)
    for line in lines:
        if line["kind"] == "step":
            line["sources"][evil] = line["sources"].pop("code")
        if line["kind"] in ("sample", "event"):
            line["text"] = line["prompt"] = evil
    folder = write_run(tmp_path / "<b>run & co", lines)
    (folder / "config.yaml").write_text(f"name: {evil}\n", encoding="utf-8")
    shown = page(folder, write_run(tmp_path / "other", lines))
    assert {tag for tag, _ in shown.tags}.isdisjoint({"img", "link", "iframe", "b>run"})
    plain = [a for t, a in shown.tags if t == "script" and a.get("type") != "application/json"]
    assert plain == [{}]  # our own script and no other
    assert not any(key in ("src", "href") for _, attrs in shown.tags for key in attrs)
    assert not re.search(r"(https?:)?//\w|url\((?!#)|@import", render(read_runs([folder])))
    assert evil in "".join(shown.text)
    for script in shown.scripts[:-1]:
        assert json.loads(script)["lines"]


def test_several_runs_are_laid_over_each_other(run: Path, tmp_path: Path) -> None:
    second = write_run(tmp_path / "second", records(seed=1, scale=1.2), lr=1e-3)
    shown = page(run, second)
    assert "Held-out loss, mean of the domains" in shown.titles()
    for name in SOURCES:
        assert f"Training loss, {name}" in shown.titles()
        assert f"Held-out loss, {name}" in shown.titles()
    keys = {a.get("data-key") for t, a in shown.tags if t == "button"}
    assert keys >= {"first", "second"}
    colors = {(a["data-key"], str(a["class"]).split()[1]) for t, a in shown.tags if t == "polyline"}
    assert {("first", "c0"), ("second", "c1")} <= colors
    text = " ".join(shown.text)
    assert re.search(r"optim\.lr\s+0\.002\s+0\.001", text)  # the difference, not the whole config
    assert "optim.name" not in text


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    a = write_run(tmp_path / "x" / "run", records(20))
    b = write_run(tmp_path / "y" / "run", records(20))
    assert [r.name for r in read_runs([a, b])] == ["x/run", "y/run"]
    assert [r.name for r in read_runs([a, a])] == ["run (1)", "run (2)"]


def test_a_killed_run_ends_in_half_a_line(run: Path) -> None:
    metrics = run / "metrics.jsonl"
    whole = metrics.read_bytes()
    last = max(r["step"] for r in read_run(run).steps)
    metrics.write_bytes(whole + b'{"kind":"step","step":310,"lo')
    broken = read_run(run)
    assert broken.unreadable == 1
    assert broken.steps[-1]["step"] == last
    assert "1 unreadable lines" in summary([broken])
    assert "1 unreadable lines" in "".join(page(run).text)


def test_damage_anywhere_never_stops_the_report(run: Path) -> None:
    rng = random.Random(0)
    whole = (run / "metrics.jsonl").read_bytes()
    for trial in range(12):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 60)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        cut = rng.randrange(len(data)) if trial % 2 else len(data)
        (run / "metrics.jsonl").write_bytes(data[:cut])
        page(run)


def test_values_of_any_kind_never_stop_the_report(tmp_path: Path) -> None:
    rng = random.Random(0)
    odd = [None, {}, [], "x", 1e300, -1e300, 0, math.nan, True, 10**400, {"code": None}]
    for _ in range(12):
        lines = records(60)
        for line in lines:
            for key in line:
                if key != "kind" and rng.random() < 0.05:
                    line[key] = rng.choice(odd)
        folder = write_run(tmp_path / "run", records(60))
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
        page(folder)


@pytest.mark.parametrize("missing", ["metrics.jsonl", "config.yaml", "plan.json"])
def test_missing_files(run: Path, missing: str) -> None:
    (run / missing).unlink()
    text = "".join(page(run).text)
    assert ("no step has been logged yet" in text) == (missing == "metrics.jsonl")


@pytest.mark.parametrize("kind", ["step", "eval", "sample", "event"])
def test_missing_kinds_of_records(tmp_path: Path, kind: str) -> None:
    folder = write_run(tmp_path / "run", [r for r in records() if r["kind"] != kind])
    titles = page(folder).titles()
    assert ("Training loss by source" in titles) == (kind != "step")
    assert ("Perplexity by domain" in titles) == (kind != "eval")


def test_an_empty_run_beside_a_full_one(run: Path, tmp_path: Path) -> None:
    empty = write_run(tmp_path / "empty", [])
    assert "empty: no step has been logged yet" in "".join(page(run, empty).text)
    assert page(empty).titles() == []


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(DataError, match="so this is not the folder of a run"):
        read_run(tmp_path)


def test_steps_that_go_back_replace_the_later_ones(tmp_path: Path) -> None:
    lines = [
        {"kind": "step", "step": s, "tokens": s, "loss": loss, "sources": {}}
        for s, loss in [(1, 9.0), (2, 8.0), (3, 7.0), (2, 5.0), (3, 4.0)]
    ]
    curve = read_run(write_run(tmp_path / "run", lines)).curve("loss")
    assert curve.x.tolist() == [1, 2, 3]
    assert curve.y.tolist() == [9, 5, 4]


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    values = [3.0, "nan", "inf", None, math.nan, "text", [1], True, 2.0]
    lines = [
        {"kind": "step", "step": s, "tokens": 10 * s, "loss": v, "sources": {}}
        for s, v in enumerate(values, 1)
    ]
    folder = write_run(tmp_path / "run", lines)
    assert read_run(folder).curve("loss").y.tolist() == [3.0, 2.0]
    assert "Training loss by source" in page(folder).titles()


def test_the_drawing_is_to_scale() -> None:
    x = np.array([0.0, 250.0, 600.0, 1000.0])
    y = np.array([8.0, 4.0, 3.0, 5.5])
    text = draw(Chart("loss", [Line("a", Series(x, y), 0)]), 1)
    points = re.search(r'points="([^"]+)"', text)
    assert points
    drawn = np.array([[float(v) for v in p.split(",")] for p in points[1].split()])
    ticks = re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', text)
    heights = np.array([[float(label), float(place) - 3.5] for place, label in ticks])
    slope, offset = np.polyfit(heights[:, 0], heights[:, 1], 1)
    np.testing.assert_allclose(drawn[:, 1], slope * y + offset, atol=0.15)
    np.testing.assert_allclose(
        np.diff(drawn[:, 0]) / np.ptp(drawn[:, 0]), np.diff(x) / 1000, atol=1e-3
    )


def test_more_sources_than_colours_stay_apart() -> None:
    lines = [Line(str(i), Series(np.arange(3.0), np.arange(3.0) + i), i) for i in range(20)]
    text = draw(Chart("many", lines), 1)
    looks = re.findall(
        r'<polyline class="line (c\d)"[^>]*?( stroke-dasharray="[^"]*")? points', text
    )
    assert len(set(looks)) == 20


def test_mixture_against_a_numerical_integral(run: Path) -> None:
    mix = mixture(read_run(run))
    assert mix is not None
    for name in SOURCES:
        np.testing.assert_allclose(mix.realised[name], mix.planned[name], atol=2e-3)
    assert [p.number for p in mix.phases] == [1, 2]
    for phase, (low, high) in zip(mix.phases, [(0, 0.8), (0.8, 1.0)], strict=True):
        grid = np.linspace(low, high, 2001)
        grid = (grid[1:] + grid[:-1]) / 2
        for one in phase.shares:
            expected = np.mean([share(p)[one.source] for p in grid])
            assert one.planned == pytest.approx(expected, abs=1e-6)
            assert one.realised == pytest.approx(expected, abs=1e-3)


def test_a_mixture_off_its_plan_shows(run: Path) -> None:
    stretch = {"start": 0, "stop": 300 * 32, "weights": {"code": "9/10", "math": "1/10"}}
    plan = {"configured": [stretch]}
    (run / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    mix = mixture(read_run(run))
    assert mix is not None
    code = next(s for s in mix.phases[0].shares if s.source == "code")
    assert code.planned == pytest.approx(0.9)
    assert code.realised == pytest.approx(0.5, abs=1e-3)
    assert mix.planned["docs"].tolist() == [0.0] * len(mix.x)


def test_a_run_without_a_plan_still_shows_what_came(run: Path) -> None:
    (run / "plan.json").write_text("{}", encoding="utf-8")
    mix = mixture(read_run(run))
    assert mix is not None
    assert mix.planned == {}
    (phase,) = mix.phases
    assert [s.source for s in phase.shares] == list(SOURCES)
    assert phase.shares[0].realised == pytest.approx(0.8 * 0.5 + 0.2 * 0.35, abs=1e-3)


def test_thinning_keeps_the_extremes_and_the_ends() -> None:
    rng = np.random.default_rng(0)
    curve = Series(np.arange(100_000.0), rng.normal(size=100_000))
    curve.y[71_234] = 50.0
    curve.y[3_210] = -50.0
    thinned = thin(curve)
    assert len(thinned) <= 520
    assert (thinned.y.max(), thinned.y.min()) == (50.0, -50.0)
    assert thinned.x[[0, -1]].tolist() == [0.0, 99_999.0]
    assert (np.diff(thinned.x) > 0).all()
    assert set(zip(thinned.x, thinned.y, strict=True)) <= set(zip(curve.x, curve.y, strict=True))


def test_smoothing_keeps_the_mean() -> None:
    curve = Series(np.arange(3000.0), np.random.default_rng(0).normal(size=3000))
    assert len(smooth(curve)) == 150
    assert smooth(curve).y.mean() == pytest.approx(curve.y.mean())
    few = Series(np.arange(40.0), np.arange(40.0))
    assert smooth(few) is few


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234, "1.23k"),
        (999.9, "1k"),
        (2_460_000, "2.46M"),
        (1e9, "1B"),
        (2e-4, "2e-4"),
        (-0.5, "-0.5"),
        (150, "150"),
        (math.nan, "–"),
    ],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


def test_other_units() -> None:
    assert [duration(s) for s in (3.21, 75, 7500)] == ["3.2 s", "1 min 15 s", "2 h 05 min"]
    assert [bytes_text(b) for b in (512, 900 << 20, 3 << 40)] == ["512 B", "900 MiB", "3 TiB"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.7, 9.3), (-3, 1e6), (2.001, 2.002), (5, 5)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    ticks = linear_ticks(low, high)
    assert 1 <= len(ticks) <= 8
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in ticks)
    assert all(len(f"{t:.6g}") <= 8 for t in ticks)


@pytest.mark.parametrize(("low", "high"), [(0.1, 1e4), (3, 40), (1e-6, 1e9), (2.0, 2.5)])
def test_logarithmic_ticks(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 10
    assert all(low * 0.99 <= t <= high * 1.01 for t in ticks)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("loss 5 is 9.3 sigma above the window's 3.1 (samples 1..2)", "bad"),
        ("loss nan, gradient norm inf: not finite (samples 1..2); update skipped", "bad"),
        ("resumed from step-00000100", "resume"),
        ("checkpoint", "checkpoint"),
        ("mixture phase 2 begins", "other"),
    ],
)
def test_event_kinds(text: str, kind: str) -> None:
    assert event_kind(text) == kind


def test_summary_compares_with_the_unigram_entropy(run: Path) -> None:
    text = summary(read_runs([run]))
    last = [r for r in records() if r["kind"] == "eval"][-1]["domains"]["docs"]["loss"]
    assert f"docs: held-out loss {last:.4f}" in text
    assert "unigram entropy 6.6000, unigram loss 6.7000" in text


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def test_the_command_writes_where_it_says(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.run(arguments(str(run))) == 0
    assert f"report: {run / 'report.html'}" in capsys.readouterr().out
    Page((run / "report.html").read_text(encoding="utf-8"))
    out = tmp_path / "deep" / "down.html"
    assert command.run(arguments(str(run), str(run), "--out", str(out))) == 0
    Page(out.read_text(encoding="utf-8"))


def test_a_report_that_cannot_be_written_is_one_sentence(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(EnvironmentFault, match="cannot write the report"):
        command.run(arguments(str(run), "--out", str(tmp_path / "file" / "x.html")))
