"""Online mixtures: the formulas, and that what was decided replays bit for bit under any layout."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.mixtures import walk
from helpers.ranks import run_ranks
from helpers.stored import stored_bits
from helpers.tiny import make_corpus, records, tiny_config

from llmtrain.cli.main import main
from llmtrain.config import load_config
from llmtrain.config.mixture_methods import OnlineConfig
from llmtrain.data.loader import heldout_sets
from llmtrain.data.mixture import Mixture
from llmtrain.data.online import WEIGHT_GRID, doremi, on_grid, rounded, skill_it
from llmtrain.data.seen import Seen
from llmtrain.data.targets import Stretch
from llmtrain.errors import DataError
from llmtrain.eval.loading import load_trained
from llmtrain.methods.online import skill_graph
from llmtrain.parallel import init_world
from llmtrain.report import read_run, render
from llmtrain.report.mixture import mixture
from llmtrain.train.run import train

BATCH, SEQ, STEPS = 8, 48, 20
UPDATES = [6, 9, 12, 15, 18]  # every 3 steps after step 3
NAMES = ["letters", "digits"]
GRAPH = {"letters": {"letters": 1.0, "digits": 0.25}, "digits": {"digits": 0.5}}
SKILL: dict[str, Any] = {"every": "3step", "start": "3step", "eta": 0.3, "window": 2}
SKILL |= {"graph": GRAPH, "samples": 8}


def draw(seed: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return (
        rng.dirichlet(np.ones(k)),
        rng.random((k, k)) * (rng.random((k, k)) < 0.6),
        rng.random((3, k)) * 5,
    )


@pytest.mark.parametrize("k", [2, 3, 7, 40])
def test_skill_it_is_the_papers_formula(k: int) -> None:
    start, graph, losses = draw(k, k)
    names = [f"s{i}" for i in range(k)]
    edges = {
        names[i]: {names[j]: float(graph[i, j]) for j in range(k) if graph[i, j]} for i in range(k)
    }
    rows = [dict(zip(names, map(float, row), strict=True)) for row in losses]
    got = skill_it(dict(zip(names, map(float, start), strict=True)), edges, rows, 0.2)
    expected = start * np.exp(0.2 * (graph @ losses.sum(0)))
    expected /= expected.sum()
    assert np.abs(np.array([got[n] for n in names]) - expected).max() < 1e-12


@pytest.mark.parametrize("k", [2, 3, 7, 40])
def test_doremi_is_the_papers_update(k: int) -> None:
    before, _, losses = draw(k, k)
    names = [f"s{i}" for i in range(k)]
    excess = np.maximum(losses[0] - losses[1], 0)
    got = doremi(
        dict(zip(names, map(float, before), strict=True)),
        dict(zip(names, map(float, excess), strict=True)),
        1.5,
        0.01,
    )
    moved = before * np.exp(1.5 * excess)
    expected = 0.99 * moved / moved.sum() + 0.01 / k
    assert np.abs(np.array([got[n] for n in names]) - expected).max() < 1e-12


@pytest.mark.parametrize("seed", range(20))
def test_weights_on_the_grid_sum_to_one_and_none_vanishes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    k = int(rng.integers(2, 60))
    raw = np.exp(rng.uniform(-30, 0, k))
    weights = {f"s{i}": float(w) for i, w in enumerate(raw / raw.sum())}
    found = on_grid(weights)
    assert sum(found.values()) == 1
    assert min(found.values()) >= Fraction(1, WEIGHT_GRID)
    assert all(WEIGHT_GRID % w.denominator == 0 for w in found.values())
    raised = sum(w * WEIGHT_GRID < 1 for w in weights.values())
    for name, weight in found.items():
        assert abs(float(weight) - weights[name]) * WEIGHT_GRID <= max(raised, 1) + 1e-6


def test_a_mixture_that_turns_often_is_the_one_made_at_once_and_stays_exact() -> None:
    rng = np.random.default_rng(5)
    names = [f"s{i:02d}" for i in range(9)]

    def weights() -> dict[str, Fraction]:
        raw = np.exp(rng.uniform(-9, 0, len(names)))
        return on_grid(dict(zip(names, map(float, raw / raw.sum()), strict=True)))

    total, step = 40_000, 136  # steps end inside blocks of 32
    first = weights()
    now = Mixture(names, [Stretch(0, step, first), Stretch(step, total, first)], 32, 3)
    for turn in range(step, 60 * step, step):
        assert now.block_end(turn) == turn
        then = weights()
        past = now.locate_range(max(turn - 300, 0), turn)
        later = [Stretch(turn, turn + step, then), Stretch(turn + step, total, then)]
        now = now.turned(later)
        for a, b in zip(past, now.locate_range(max(turn - 300, 0), turn), strict=True):
            assert np.array_equal(a, b)
    *earlier, current = now.schedules
    again = Mixture(names, current, 32, 3, earlier)
    for a, b in zip(now.locate_range(0, 10_000), again.locate_range(0, 10_000), strict=True):
        assert np.array_equal(a, b)
    worst, _ = walk(again)
    assert max(worst) < 2
    labels, before = now.locate_range(0, 10_000)
    for i in range(len(names)):  # no sample of a source is left out or dealt twice
        assert np.array_equal(before[labels == i], np.arange((labels == i).sum()))


def config_of(folder: Path, corpus: Path, online: dict[str, Any], **changes: Any) -> Path:
    return tiny_config(
        folder,
        corpus,
        data__phases=None,
        data__weights={"letters": 0.7, "digits": 0.3},
        data__block_size=16,
        train__duration=f"{STEPS}step",
        eval__every="3step",
        checkpoint__every="3step",
        checkpoint__keep=9,
        online=online,
        **changes,
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus and an uninterrupted Skill-it run, ``runs/tiny``."""
    folder = tmp_path_factory.mktemp("online")
    corpus = make_corpus(folder, documents=60)
    assert main(["train", str(config_of(folder, corpus, SKILL))]) == 0
    return folder


def test_weights_follow_from_the_losses_at_the_planned_steps(straight: Path) -> None:
    run = straight / "runs" / "tiny"
    changes = records(run, "mixture")
    assert [r["step"] for r in changes] == UPDATES
    evals = {r["step"]: r["domains"] for r in records(run, "eval")}
    for i, record in enumerate(changes):
        for name in NAMES:  # the same 8 sequences are evaluated
            measured = evals[record["step"]][name]["loss"]
            assert abs(record["losses"][name] - measured) <= 0.5 / 1024
            assert (record["losses"][name] * 1024).is_integer()
        window = [[r["losses"][n] for n in NAMES] for r in changes[max(i - 1, 0) : i + 1]]
        edges = np.array([[1.0, 0.25], [0.0, 0.5]])
        wanted = np.array([0.7, 0.3]) * np.exp(0.3 * (edges @ np.array(window).sum(0)))
        wanted /= wanted.sum()
        got = np.array([record["weights"][n] for n in NAMES])
        assert np.abs(got - wanted).max() <= 1 / WEIGHT_GRID
    means = {n: np.mean([r["weights"][n] for r in changes]) for n in NAMES}
    assert changes[-1]["mean_weights"] == pytest.approx(means)
    assert abs(changes[-1]["weights"]["letters"] - 0.7) > 0.05


def test_realised_shares_are_those_of_the_weights_in_force(straight: Path) -> None:
    run = straight / "runs" / "tiny"
    target = dict.fromkeys(NAMES, 0.0)
    weights = {"letters": 0.7, "digits": 0.3}
    changes = {r["step"]: r["weights"] for r in records(run, "mixture")}
    for record in records(run):
        step = record["step"]
        for name in NAMES:
            target[name] += BATCH * weights[name]
            count = record["sources"][name]["tokens"] // SEQ
            ends = step in changes or step == STEPS  # between them a block has begun
            assert abs(count - target[name]) < (2 if ends else 2 + 16)
        weights = changes.get(step, weights)
    spoken = Seen.of_run(run, *(load_duration(t) for t in ("0step", "1dur")))
    counts = dict(zip(spoken.mixture.names, spoken.mixture.counts(STEPS * BATCH), strict=True))
    last = records(run)[-1]["sources"]
    assert {n: int(c) * SEQ for n, c in counts.items()} == {n: last[n]["tokens"] for n in NAMES}
    chart = mixture(read_run(run))
    assert chart is not None
    for name in NAMES:
        assert np.nanmax(np.abs(chart.planned[name] - chart.realised[name])) < 0.5
        shares = {s.source: s for s in chart.phases[0].shares}
        assert shares[name].planned == pytest.approx(shares[name].realised, abs=2 / 160)
    assert "mixture from here on: " in render([read_run(run)])


def load_duration(text: str) -> Any:
    from llmtrain.config import Duration

    return Duration.parse(text)


@pytest.mark.parametrize("step", [9, 12])
def test_a_killed_run_goes_on_bit_for_bit(straight: Path, tmp_path: Path, step: int) -> None:
    """Killed after a later change than the last checkpoint's, with a plan.json that knows it."""
    shutil.copytree(straight / "runs", tmp_path / "runs")
    run = tmp_path / "runs" / "tiny"
    for folder in (run / "checkpoints").glob("step-*"):
        if int(folder.name.split("-")[1]) > step:
            shutil.rmtree(folder)
    config = straight / "tiny.yaml"
    assert main(["train", str(config), f"out={tmp_path / 'runs'}"]) == 0
    whole = straight / "runs" / "tiny"
    assert stored_bits(run) == stored_bits(whole)
    assert records(run, "mixture") == records(whole, "mixture")
    assert [r["sources"] for r in records(run)] == [r["sources"] for r in records(whole)]
    assert (run / "plan.json").read_text() == (whole / "plan.json").read_text()


def test_a_longer_run_keeps_the_weights_and_changes_them_again(
    straight: Path, tmp_path: Path
) -> None:
    shutil.copytree(straight / "runs", tmp_path / "runs")
    words = [str(straight / "tiny.yaml"), f"out={tmp_path / 'runs'}", "train.duration=26step"]
    assert main(["train", *words, "schedule.name=constant"]) == 0
    run = tmp_path / "runs" / "tiny"
    changes = records(run, "mixture")
    assert [r["step"] for r in changes] == [*UPDATES, 21, 24]
    steps = {r["step"]: {n: r["sources"][n]["tokens"] // SEQ for n in NAMES} for r in records(run)}
    for low, high, by in ((18, 21, 4), (21, 24, 5), (24, 26, 6)):
        for name in NAMES:
            got = steps[high][name] - steps[low][name]
            assert abs(got - changes[by]["weights"][name] * (high - low) * BATCH) < 3


def test_a_branch_of_an_online_run_is_its_own_continuation(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight / "runs", tmp_path / "runs")
    trunk, out = tmp_path / "runs" / "tiny", f"out={tmp_path / 'runs'}"
    assert main(["branch", str(trunk), "--at", "12step", "name=same", out]) == 0
    assert stored_bits(tmp_path / "runs" / "same") == stored_bits(trunk)
    words = ["online=null", "data.weights={digits: 1}", "name=plain", out]
    assert main(["branch", str(trunk), "--at", "12step", *words]) == 0
    plain = records(tmp_path / "runs" / "plain")
    moved = plain[-1]["sources"]["letters"]["tokens"] - plain[0]["sources"]["letters"]["tokens"]
    assert moved <= 2 * SEQ
    assert not records(tmp_path / "runs" / "plain", "mixture")


LAYOUTS = {
    "data": [],
    "tensor": ["parallel.tensor=2"],
    "pipeline": ["parallel.pipeline=2", "train.micro_batch_size=2"],
    "context": ["parallel.context=2", "parallel.context_method=ring"],
}


def go(rank: int, config: Path, overrides: list[str]) -> int:
    return train(load_config(config, overrides), init_world("cpu"))


@pytest.fixture(scope="module")
def doremi_run(straight: Path) -> Path:
    """A DoReMi run against the end of the Skill-it run, ``doremi/tiny``."""
    online = {"method": "doremi", "every": "3step", "start": "3step", "samples": 10}
    online |= {"reference": str(straight / "runs" / "tiny"), "smoothing": 0.05}
    folder = straight / "doremi"
    folder.mkdir()
    config = config_of(folder, straight / "corpus", online)
    assert main(["train", str(config), "seed=3"]) == 0
    return folder


@pytest.mark.parametrize("method", ["skill-it", "doremi"])
def test_every_layout_decides_the_same(
    straight: Path, doremi_run: Path, tmp_path: Path, method: str
) -> None:
    folder, seed = (straight, []) if method == "skill-it" else (doremi_run, ["seed=3"])
    config, alone = folder / "tiny.yaml", folder / "runs" / "tiny"
    expected = [(r["step"], r["weights"]) for r in records(alone, "mixture")]
    for name, overrides in LAYOUTS.items():
        out = tmp_path / name
        changes = [*overrides, f"out={out}", "checkpoint.every=null", *seed]
        run_ranks(2, go, config, changes)
        found = [(r["step"], r["weights"]) for r in records(out / "tiny", "mixture")]
        assert found == expected, name


@pytest.mark.parametrize("name", ["data", "tensor"])
def test_another_number_of_ranks_goes_on_with_the_same_weights(
    straight: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(straight / "runs", tmp_path / "runs")
    run, whole = tmp_path / "runs" / "tiny", straight / "runs" / "tiny"
    for folder in (run / "checkpoints").glob("step-*"):
        if int(folder.name.split("-")[1]) > 12:
            shutil.rmtree(folder)
    changes = [f"out={tmp_path / 'runs'}", *LAYOUTS[name]]
    run_ranks(2, go, straight / "tiny.yaml", changes)
    for ours, theirs in zip(records(run, "mixture"), records(whole, "mixture"), strict=True):
        assert (ours["step"], ours["weights"]) == (theirs["step"], theirs["weights"])
    assert (run / "plan.json").read_text() == (whole / "plan.json").read_text()


def token_losses(run: Path, step: int | None, batch: Any) -> torch.Tensor:
    """Cross-entropy in float64 from the logits of a checkpoint."""
    path = run if step is None else run / "checkpoints" / f"step-{step:08d}"
    trained = load_trained(path, torch.device("cpu"))
    with torch.no_grad():
        logits = trained.model(batch.tokens, positions=batch.positions, doc_ids=batch.doc_ids)
    size = trained.cfg.model.vocab_size or 257
    flat = logits[..., :size].double().flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(flat, batch.targets.flatten(), reduction="none")
    return loss.view(batch.targets.shape)


def test_doremi_weighs_by_the_clipped_excess_of_every_token(
    straight: Path, doremi_run: Path
) -> None:
    run, reference = doremi_run / "runs" / "tiny", straight / "runs" / "tiny"
    cfg = load_config(run / "config.yaml", ["eval.samples=10"])
    batches = {s.name: next(iter(s.batches(64, 0, 1))) for s in heldout_sets(cfg)}
    before = np.array([0.7, 0.3])
    for record in records(run, "mixture"):
        excess = []
        for name in NAMES:
            batch = batches[name]
            gap = token_losses(run, record["step"], batch) - token_losses(reference, None, batch)
            weights = batch.weights.double()
            excess.append(float((gap.clamp(min=0) * weights).sum() / weights.sum()))
            assert abs(record["losses"][name] - excess[-1]) <= 0.5 / 1024 + 1e-6
        moved = before * np.exp([rounded(record["losses"][n]) for n in NAMES])
        wanted = 0.95 * moved / moved.sum() + 0.05 / 2
        got = np.array([record["weights"][n] for n in NAMES])
        assert np.abs(got - wanted).max() <= 1 / WEIGHT_GRID
        before = got
    assert min(excess) > 0


def test_the_plan_says_what_is_known(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(straight / "tiny.yaml")
    assert main(["data", "plan", config]) == 0
    out = capsys.readouterr().out
    assert "after step 6 and then every 3 steps, 5 times; known up to sample 48" in out
    words = ["train.stop_after=10step", f"out={tmp_path}", "online.method=fixed"]
    assert main(["train", config, *words, "online.graph=null"]) == 0
    fixed = records(tmp_path / "tiny", "mixture")
    assert [r["weights"] for r in fixed] == [{"letters": 0.7, "digits": 0.3}] * 2
    capsys.readouterr()
    assert main(["data", "seen", str(tmp_path / "tiny"), "--between", "0step", "1dur"]) == 0
    assert "only steps up to 12 are decided" in capsys.readouterr().out
    known = json.loads((tmp_path / "tiny" / "plan.json").read_text())["known"]
    assert known == 12 * BATCH


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["online.graph.letters={digit: 1}"], "did you mean 'digits'"),
        (["online.graph={numbers: {letters: 1}}"], "no source of the last phase"),
        (
            ["online.graph={letters: {letters: 0, digits: 0}, digits: {digits: 0}}"],
            "no edge above 0",
        ),
        (["online.method=doremi", "online.graph=null"], "online.reference: is missing"),
        (["online.method=doremi", "online.reference=x"], "online.graph: is not read by doremi"),
        (["online.reference=x"], "is not read by skill-it"),
        (["online.graph_file=x"], "stands beside"),
        (["online.graph=null", "online.graph_file=none.json"], "none.json is no skill graph"),
        (
            ["online.method=doremi", "online.graph=null", "online.reference=none"],
            "online.reference: none is not a folder",
        ),
        (["online.every=18step"], "the first change would come at step 21"),
        (["data.weights.digits=0", "online.graph=null"], "has one source"),
        (["data.sources.letters.max_epochs=2"], "cannot be promised"),
        (
            [
                "data.weights=null",
                "data.phases=[{until: 0.5dur, weights: {letters: 1}}, "
                "{until: 1dur, weights: {letters: 1, digits: 1}}]",
            ],
            "online.start: 3step lies before the last phase",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_cannot_be_online_is_refused(
    straight: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    changes: list[str],
    says: str,
) -> None:
    out = f"out={tmp_path}"
    assert main(["train", str(straight / "tiny.yaml"), *changes, out]) == 2
    errors = capfd.readouterr().err
    assert says in errors, errors
    assert "Traceback" not in errors
    assert not (tmp_path / "tiny").exists()


def test_files_are_looked_at_before_a_run_is_put_aside(
    straight: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A fresh start that is refused leaves the records of the run that is there in their place."""
    shutil.copytree(straight / "runs" / "tiny", tmp_path / "tiny")

    def state() -> dict[Path, int]:
        files = [p for p in (tmp_path / "tiny").rglob("*") if p.is_file() and p.name != ".lock"]
        return {p: p.stat().st_mtime_ns for p in files}

    before = state()
    words = ["online.graph=null", f"online.graph_file={tmp_path / 'none.json'}"]
    words += ["checkpoint.resume=never", f"out={tmp_path}"]
    assert main(["train", str(straight / "tiny.yaml"), *words]) == 2
    assert "none.json is no skill graph" in capfd.readouterr().err
    assert state() == before


def test_a_source_without_held_out_text_is_refused(
    straight: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "flat.npy", np.arange(4096, dtype=np.uint16) % 250)
    words = [f"data.sources.flat.path={tmp_path / 'flat.npy'}", "data.weights.flat=0.5"]
    assert main(["train", str(straight / "tiny.yaml"), *words, f"out={tmp_path}"]) == 2
    assert "the source 'flat' has no held-out text" in capfd.readouterr().err
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize(
    ("graph", "says"),
    [
        ('{"graph": {"letters": {"digits": NaN}, "digits": {}}}', "'letters' to 'digits' is nan"),
        ('{"graph": {"letters": {"digits": -1}, "digits": {}}}', "edges are 0 or more"),
        ("[1, 2]", "is no skill graph (it does not hold one)"),
    ],
)
def test_a_file_that_is_no_graph(graph: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "graph.json"
    file.write_text(graph)
    with pytest.raises(DataError) as caught:
        skill_graph(OnlineConfig(graph_file=str(file)), ["letters", "digits"])
    assert says in str(caught.value) and "indices" not in str(caught.value)
