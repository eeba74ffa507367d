"""Selections are what their section says, and everything downstream goes over the kept samples."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny import make_corpus, tiny_config
from numpy.typing import NDArray

from llmtrain.cli.main import main
from llmtrain.config import RunConfig, load_config
from llmtrain.config.selection import SelectConfig
from llmtrain.data.catalogue import open_catalogue
from llmtrain.data.loader import Loader, packing_of
from llmtrain.data.packing import Pick, samples_in
from llmtrain.data.plan import build_plan
from llmtrain.data.scores import ScoreParts, describe, pieces_of, read_scores
from llmtrain.data.select import Facts, choose
from llmtrain.errors import ConfigError, DataError

SEQ = 48


def score_file(file: Path, corpus: Path, seed: int = 0, seq_len: int = SEQ) -> Path:
    """Random scores of the corpus' sources, some of them NaN, as `data score` would write them."""
    cfg = load_config(tiny_config(file.parent, corpus))
    catalogue = open_catalogue(cfg)
    sources = [catalogue.open_train(name) for name in ("letters", "digits")]
    header = {**describe(sources, seq_len), "method": "el2n", "checkpoints": ["a", "b"]}
    rng = np.random.default_rng(seed)
    parts = ScoreParts(file)
    parts.begin(header)
    for piece in pieces_of(header):
        scores = rng.normal(size=piece.high - piece.low)
        scores[::9] = math.nan
        parts.write(piece, scores, np.ones(len(scores), np.int64))
    parts.finish(header)
    return file


def section(**keys: Any) -> SelectConfig:
    return SelectConfig(**{"scores": "x.parquet", **keys})


SCORES = np.array([0.3, np.nan, -1.0, 2.0, 0.3, 5.0, 1.0, 0.1, -3.0, 0.9])
SOURCE = Facts("web", "f", 10)


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        ({"keep": 0.3}, [3, 5, 6]),
        ({"keep": 0.3, "offset": 0.1}, [3, 6, 9]),
        ({"keep": 0.3, "order": "lowest"}, [2, 7, 8]),
        ({"keep": 0.5, "offset": 0.5}, [1, 2, 4, 7, 8]),  # the sample without a score comes last
        ({"keep": 1.0}, list(range(10))),
        ({"keep": 0.01}, [5]),
    ],
)
def test_windows(keys: dict[str, Any], kept: list[int]) -> None:
    found = choose(section(**keys), 0, SOURCE, SCORES)
    assert found.kept.tolist() == kept and found.weights is None
    assert found.numbers(np.arange(len(kept))).tolist() == kept


def test_random_takes_all_alike_and_follows_the_seed() -> None:
    source = Facts("web", "f", 200)
    picks = [choose(SelectConfig(mode="random", keep=0.25), s, source, None) for s in range(400)]
    counts = np.zeros(200)
    for found in picks:
        assert found.size == 50
        counts[found.kept] += 1
    assert abs(counts - 100).max() < 5 * math.sqrt(400 * 0.25 * 0.75)
    again = choose(SelectConfig(mode="random", keep=0.25), 3, source, None)
    assert again.state() == picks[3].state() != picks[4].state()


@pytest.mark.parametrize("order", ["highest", "lowest"])
def test_gumbel_draws_by_the_softmax(order: str) -> None:
    """The first of Gumbel-top-k is a draw from softmax(score / temperature)."""
    scores = np.array([0.0, 0.5, 1.0, -0.7, np.nan])
    sign, trials = (1 if order == "highest" else -1), 4000
    wanted = section(mode="gumbel", order=order, keep=0.2, temperature=0.5)
    counts = np.zeros(5)
    for seed in range(trials):
        counts[choose(wanted, seed, Facts("web", "f", 5), scores).kept] += 1
    p = np.exp(sign * scores[:4] / 0.5)
    p /= p.sum()
    assert counts[4] == 0
    assert (np.abs(counts[:4] - trials * p) < 4 * np.sqrt(trials * p * (1 - p))).all()


def test_weights_are_exponentials_with_mean_one() -> None:
    found = choose(section(mode="weights", temperature=2.0, order="lowest"), 0, SOURCE, SCORES)
    assert found.weights is not None and found.size == 10
    known = ~np.isnan(SCORES)
    power = np.where(known, np.exp(-np.where(known, SCORES, 0) / 2.0), 0)
    np.testing.assert_allclose(found.weights, power / power.mean(), rtol=1e-6)


def load(folder: Path, corpus: Path, select: dict[str, Any], **changes: Any) -> RunConfig:
    file = tiny_config(folder, corpus, data__select=select, **changes)
    return load_config(file, for_training=True)


def expected(file: Path, name: str, keep: float) -> NDArray[np.int64]:
    scores = read_scores(file, name)
    order = sorted(range(len(scores)), key=lambda i: -scores[i] if scores[i] == scores[i] else 9e9)
    return np.array(sorted(order[: round(keep * len(scores))]))


def test_an_epoch_is_the_kept_samples_on_any_number_of_ranks(tmp_path: Path, corpus: Path) -> None:
    file = score_file(tmp_path / "s.parquet", corpus)
    select = {"scores": str(file), "keep": 0.4, "sources": ["letters"]}
    cfg = load(tmp_path, corpus, select)
    plan = build_plan(cfg, 160)
    letters, digits = (plan.names.index(name) for name in ("letters", "digits"))
    kept = expected(file, "letters", 0.4)
    assert plan.sizes[letters] == len(kept)
    assert plan.sizes[digits] == samples_in(plan.sources[digits].num_tokens, SEQ)
    windows = [plan.sources[letters].read(k * SEQ, k * SEQ + SEQ) for k in kept]
    number = {window.tobytes(): k for window, k in zip(windows, kept.tolist(), strict=True)}
    seen: list[int] = []
    for step in range(20):
        whole = Loader.from_config(plan, cfg, 0, 1).batch(step)
        for world in (2, 4):
            parts = [
                Loader.from_config(plan, cfg, rank, world).batch(step) for rank in range(world)
            ]
            rows = [row for part in parts for row in part.tokens.tolist()]
            assert rows == whole.tokens.tolist()
        mine = whole.source_ids == letters
        seen += [number[row.numpy().tobytes()] for row in whole.tokens[mine]]
    n = len(kept)
    assert len(seen) > 1.5 * n
    for epoch in range(len(seen) // n):
        assert sorted(seen[epoch * n : epoch * n + n]) == kept.tolist()
    text = plan.tree()
    assert f"letters: {n} of {len(read_scores(file, 'letters'))} samples" in text
    count = int(plan.counts(160)[letters])
    assert f"{count / n:.3f}" in text


def test_weights_multiply_into_the_loss_weights(tmp_path: Path, corpus: Path) -> None:
    file = score_file(tmp_path / "s.parquet", corpus)
    source = {"letters": {"path": f"{corpus}/letters/train", "loss_weight": 0.5}}
    select = {"scores": str(file), "mode": "weights"}
    plan = build_plan(load(tmp_path, corpus, select, data__sources=source), 160)
    batch = Loader(plan, 8, 0, 1).batch(2)
    plain = load_config(tiny_config(tmp_path, corpus, data__sources=source), for_training=True)
    without = Loader(build_plan(plain, 160), 8, 0, 1).batch(2)
    assert (batch.tokens == without.tokens).all()
    factor = (batch.weights.sum(1) / without.weights.sum(1)).tolist()
    assert len(set(factor)) > 4
    scores = {name: read_scores(file, name) for name in plan.names}
    for row, found in enumerate(factor):
        name = plan.names[int(batch.source_ids[row])]
        own = scores[name]
        known = np.isfinite(own)
        picks = [Pick(plan.sources[plan.names.index(name)], k, 1.0) for k in range(len(own))]
        same = (packing_of(plan.cfg.data).rows(picks).tokens == batch.tokens[row].numpy()).all(1)
        weights = np.where(known, np.exp(np.where(known, own, 0)), 0)
        weights /= weights.mean()
        assert found == pytest.approx(weights[same].item(), rel=1e-5)


def test_resume_and_seen_go_by_the_selection(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained in two parts; then the list of what was seen, and another file is refused."""
    file = score_file(tmp_path / "s.parquet", corpus)
    select = {"scores": str(file), "mode": "gumbel", "keep": 0.3}
    config = tiny_config(tmp_path, corpus, data__select=select, eval__every=None)
    assert main(["train", str(config), "train.stop_after=10step"]) == 0
    changed = ["data.select.keep=0.4", "data.select.order=lowest", "data.select.mode=window"]
    for change in changed:
        assert main(["train", str(config), change]) == 2
        assert "data.select: another choice" in capsys.readouterr().err
    assert main(["train", str(config)]) == 0
    run, out = tmp_path / "runs" / "tiny", tmp_path / "list.jsonl"
    assert main(["data", "seen", str(run), "--between", "0dur", "1dur", "--list", str(out)]) == 0
    cfg = load_config(run / "config.yaml")
    plan = build_plan(cfg, 160)
    loader = Loader.from_config(plan, cfg, 0, 1)
    batches = [loader.batch(step) for step in range(20)]
    for i, line in enumerate(map(json.loads, out.read_text().splitlines())):
        label = plan.names.index(line["source"])
        row = loader._packing.rows([Pick(plan.sources[label], line["number"], 1.0)])
        assert batches[i // 8].tokens[i % 8].tolist() == row.tokens[0].tolist()
        selection = plan.selections[label]
        assert selection is not None and line["number"] in selection.kept.tolist()
    file.unlink()
    score_file(file, corpus, seed=1)
    assert main(["data", "seen", str(run), "--between", "0dur", "1dur"]) == 2
    assert "has changed since" in capsys.readouterr().err


def test_scores_of_other_data_are_refused(tmp_path: Path, corpus: Path) -> None:
    file = score_file(tmp_path / "s.parquet", corpus)
    select = {"scores": str(file)}
    with pytest.raises(DataError, match="samples of 48 tokens"):
        build_plan(load(tmp_path, corpus, select, data__seq_len=32), 160)
    (tmp_path / "other").mkdir()
    other = make_corpus(tmp_path / "other", documents=40, seed=1)
    with pytest.raises(DataError, match=r"other data than the source .*fingerprint"):
        build_plan(load(tmp_path, other, select), 160)
    more = {"more": {"path": f"{other}/letters/train"}}
    weights = {"letters": 0.5, "more": 0.5}
    changes = {"data__sources": more, "data__weights": weights, "data__phases": []}
    with pytest.raises(DataError, match="no scores of the source 'more'"):
        build_plan(load(tmp_path, corpus, select, **changes), 160)
    build_plan(load(tmp_path, corpus, {**select, "sources": ["letters"]}, **changes), 160)


def test_a_later_phase_selects_anew_from_the_same_data(tmp_path: Path, corpus: Path) -> None:
    """As MATES does: train, score, go on with the chosen part of it as a source of another name."""
    config = tiny_config(tmp_path, corpus, eval__every=None)
    assert main(["train", str(config), "train.stop_after=10step"]) == 0
    run, file = tmp_path / "runs" / "tiny", tmp_path / "s.parquet"
    assert main(["data", "score", str(run), "--method", "el2n", "--out", str(file)]) == 0
    select = {"scores": str(file), "mode": "gumbel", "keep": 0.3, "sources": ["chosen"]}
    tail = [
        f"data.sources.chosen.path={corpus}/letters/train",
        f"data.select={json.dumps(select)}",
        "data.weights={chosen: 1}",
    ]
    assert main(["branch", str(run), "--at", "0.5dur", *tail, "name=chosen"]) == 0
    folder, out = tmp_path / "runs" / "chosen", tmp_path / "list.jsonl"
    words = ["--between", "10step", "20step", "--list", str(out)]
    assert main(["data", "seen", str(folder), *words]) == 0
    chosen = list(map(json.loads, out.read_text().splitlines()))
    scores = read_scores(file, "letters")
    facts = Facts("chosen", "", len(scores))
    kept = choose(SelectConfig(**select), 7, facts, scores).kept.tolist()
    late = [line["number"] for line in chosen if line["source"] == "chosen"]
    # The mixture's block that the branch leaves in is finished first.
    assert len(late) == 64 and set(late) == set(kept)


@pytest.mark.parametrize("text", [None, "no parquet"])
def test_what_is_no_score_file(tmp_path: Path, corpus: Path, text: str | None) -> None:
    file = tmp_path / "s.parquet"
    if text is not None:
        file.write_text(text)
    with pytest.raises(DataError, match="llmtrain data score"):
        build_plan(load(tmp_path, corpus, {"scores": str(file)}), 160)


@pytest.mark.parametrize(
    ("select", "says"),
    [
        ({}, "scores.*is missing"),
        ({"mode": "random", "scores": "s"}, "is not read by mode random"),
        ({"scores": "s", "mode": "gumbel", "offset": 0.1}, "is not read by mode gumbel"),
        ({"scores": "s", "offset": 0.6, "keep": 0.5}, "keep at most 0.4"),
        ({"scores": "s", "sources": ["leters"]}, "did you mean 'letters'"),
        ({"scores": "s", "keep": 0}, "keep"),
        ({"scores": "s", "mode": "windo"}, "window"),
    ],
    ids=str,
)
def test_sections_that_cannot_be_meant(
    tmp_path: Path, corpus: Path, select: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        load(tmp_path, corpus, select)
