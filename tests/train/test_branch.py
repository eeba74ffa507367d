"""Branches: the trunk's past, another future, bit for bit where nothing changes."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from helpers.stored import stored_bits
from helpers.tiny import make_corpus, records, tiny_config

from llmtrain.cli.main import main
from llmtrain.config import Duration, load_config
from llmtrain.config.tail import load_tail, past_phases
from llmtrain.data.phases import stretches_of
from llmtrain.errors import ConfigError
from llmtrain.report import read_run, render
from llmtrain.report.tree import branches_of, trees, trunk_of, write_branch
from llmtrain.train.branch import find_point, plan_branch
from llmtrain.train.tails import plan_leave_one_out, plan_sweep

STEPS, BATCH, SEQ = 20, 8, 48


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained trunk (``runs/tiny``) that keeps checkpoints at 12 and 16."""
    folder = tmp_path_factory.mktemp("trunk")
    corpus = make_corpus(folder, documents=60)
    config = tiny_config(
        folder,
        corpus,
        checkpoint__every=None,
        checkpoint__keep_at=["0.6dur", "16step", "0.9dur"],
        data__phases=[
            {"until": "0.6dur", "weights": {"letters": 0.9, "digits": 0.1}},
            {"until": "1dur", "weights": {"letters": 0.3, "digits": 0.7}},
        ],
        data__block_size=8,
    )
    assert main(["train", str(config)]) == 0
    return folder


@pytest.fixture
def trunk(world: Path, tmp_path: Path) -> Path:
    """The trunk in a folder of this test, where branches go."""
    shutil.copytree(world / "runs", tmp_path / "runs")
    return tmp_path / "runs" / "tiny"


def branch(trunk: Path, *words: str) -> int:
    return main(["branch", str(trunk), *words, f"out={trunk.parent}"])


def tail(folder: Path, text: str, name: str = "tail") -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("at", ["16step", "0.6dur"])
def test_an_unchanged_tail_is_the_trunks_own_continuation(trunk: Path, at: str) -> None:
    assert branch(trunk, "--at", at, "name=same") == 0
    same = trunk.parent / "same"
    assert stored_bits(same) == stored_bits(trunk)
    step = Duration.parse(at).steps(BATCH * SEQ, STEPS)
    ours, theirs = records(same), [r for r in records(trunk) if r["step"] > step]
    keys = ("step", "tokens", "loss", "grad_norm", "lr", "sources")
    assert [[r[k] for k in keys] for r in ours] == [[r[k] for k in keys] for r in theirs]
    last = records(same, "eval")[-1], records(trunk, "eval")[-1]
    assert last[0]["domains"] == last[1]["domains"]


def test_a_tail_changes_the_mixture_from_the_branch_point_on(trunk: Path, tmp_path: Path) -> None:
    file = tail(tmp_path, "data: {weights: {digits: 1}}\n")
    assert branch(trunk, "--at", "16step", str(file)) == 0
    run = trunk.parent / "tiny-tail"
    before = next(r for r in records(trunk) if r["step"] == 16)["sources"]
    after = records(run)[-1]["sources"]
    assert after["letters"]["tokens"] == before["letters"]["tokens"]
    assert after["digits"]["tokens"] - before["digits"]["tokens"] == 4 * BATCH * SEQ
    # The learning-rate curve is the trunk's.
    rates = {r["step"]: r["lr"] for r in records(trunk)}
    assert all(r["lr"] == rates[r["step"]] for r in records(run))
    assert stored_bits(run) != stored_bits(trunk)


def test_a_branch_that_was_stopped_goes_on_and_one_that_is_done_stays(
    trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tail(tmp_path, "data: {weights: {digits: 1, letters: 2}}\n")
    words = ("--at", "0.6dur", str(file))
    assert branch(trunk, *words, "name=whole") == 0
    assert branch(trunk, *words, "train.stop_after=15step") == 0
    assert branch(trunk, *words) == 0
    assert stored_bits(trunk.parent / "tiny-tail") == stored_bits(trunk.parent / "whole")
    capsys.readouterr()
    assert branch(trunk, *words) == 0
    assert "nothing to do" in capsys.readouterr().out
    file.write_text("data: {weights: {digits: 2, letters: 1}}\n")
    assert branch(trunk, *words) == 2
    assert "another tail" in capsys.readouterr().err


def test_the_tree_is_recorded_and_drawn(trunk: Path, tmp_path: Path) -> None:
    assert branch(trunk, "--at", "0.6dur", "name=one", "checkpoint.keep_at=[16step]") == 0
    one = trunk.parent / "one"
    assert branch(one, "--at", "16step", "name=two", "optim.lr=1e-3") == 0
    two = trunk.parent / "two"
    assert trunk_of(two) == one and trunk_of(one) == trunk
    assert branches_of(trunk) == [one] and branches_of(one) == [two]
    (tree,) = trees([read_run(two)])
    assert tree.run.name == "tiny"
    assert tree.limbs[0].start == 12 * BATCH * SEQ
    assert tree.limbs[0].limbs[0].start == 16 * BATCH * SEQ
    page = render([read_run(one)])
    assert "Runs that left tiny" in page and "two: from" in page
    record = json.loads((two / "branch.json").read_text())
    assert record["changes"] == ["optim.lr: 0.003 -> 0.001"]
    # Folders of runs may be moved as a whole.
    moved = tmp_path / "elsewhere"
    shutil.move(str(trunk.parent), moved)
    assert [p.name for p in branches_of(moved / "tiny")] == ["one"]


def test_a_sweep_and_a_leave_one_out_tabulate_what_the_runs_recorded(
    trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tail(tmp_path, "data: {weights: {digits: 0.5, letters: 0.5}}\n", "half")
    assert branch(trunk, "--sweep", "0,0.2,0.4", str(file)) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[-4:]] == ["held-out", "trunk", "d", "d"]
    for name in ("tiny-half-d0.2", "tiny-half-d0.4"):
        loss = records(trunk.parent / name, "eval")[-1]["domains"]["digits"]["loss"]
        assert f"{loss:.4f}" in out
    assert branch(trunk, "--at", "16step", "--leave-one-out", str(file)) == 0
    out = capsys.readouterr().out
    whole = records(trunk.parent / "tiny-half", "eval")[-1]["domains"]
    without = records(trunk.parent / "tiny-half-without-digits", "eval")[-1]["domains"]
    assert f"{without['digits']['loss'] - whole['digits']['loss']:+.4f}" in out
    taken = records(trunk.parent / "tiny-half-without-digits")[-1]["sources"]
    before = next(r for r in records(trunk) if r["step"] == 16)["sources"]
    assert taken["digits"]["tokens"] == before["digits"]["tokens"]


def test_a_study_is_planned_without_writing(
    trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tail(tmp_path, "data: {weights: {digits: 0.5, letters: 0.5}}\n", "half")
    assert branch(trunk, "--sweep", "0.1,0.4", str(file), "--dry-run") == 0
    out = capsys.readouterr().out
    assert "the mixture changes at the branch point" in out
    commands = [line.split() for line in out.splitlines() if line.startswith("  llmtrain")]
    assert [c[4] for c in commands] == ["0.9dur", "0.6dur"]
    assert not (trunk.parent / "tiny-half-d0.1").exists()
    study = plan_sweep(trunk, [Fraction("0.1"), Fraction("0.4")], file, [])
    assert [b.point.step for b in study.branches] == [18, 12]


def test_a_sweep_with_zero_wants_a_trunk_that_has_ended(trunk: Path) -> None:
    lines = (trunk / "metrics.jsonl").read_text().splitlines(keepends=True)
    (trunk / "metrics.jsonl").write_text("".join(lines[: len(lines) // 2]))
    with pytest.raises(ConfigError, match="has not reached its end, step 20"):
        plan_sweep(trunk, [Fraction(0), Fraction("0.4")], None, [])
    assert len(plan_sweep(trunk, [Fraction("0.4")], None, []).branches) == 1


def test_the_past_of_a_tail_is_the_trunks(world: Path) -> None:
    cfg = load_config(world / "tiny.yaml")
    old = stretches_of(cfg, STEPS * BATCH)
    for step in (5, 12, 16):
        made = load_tail(cfg, step, None, ["data.weights={digits: 1}"])
        new = stretches_of(made.cfg, STEPS * BATCH)
        cut = step * BATCH
        for ours, theirs in zip(new, old, strict=False):
            if theirs.start < cut:
                assert (ours.start, ours.weights) == (theirs.start, theirs.weights)
        assert new[-1].start == cut and dict(new[-1].weights) == {"digits": 1}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--at", "1dur"], "its end or after it"),
        (["--at", "30step"], "its end or after it"),
        (["--at", "0dur"], "its beginning"),
        (["--at", "0.5dur"], r"no checkpoint of step 10.*12 \(0.6dur\), 16 \(0.8dur\)"),
        (["--at", "soon"], "is not a duration"),
        (["--at", "-0.5dur"], "--at: a value must follow, and none that begins with a minus"),
        (["--at=-0.5dur"], "is not a duration"),
        ([], "--at is missing"),
        (["--at", "16step", "nothing.yaml"], "no such file"),
        (["--at", "16step", "name=tiny"], "trunk's own name"),
        (["--at", "16step", "data.weights={digit: 1}"], "digit"),
        (["--at", "16step", "data.phases=[{until: 0.7dur, weights: {digits: 1}}]"], "0.7dur"),
        (["--at", "16step", "train.duration=10step"], "not after the branch point|stop|dur"),
        (["--at", "16step", "seed=3", "name=b"], "seed"),
        (["--at", "16step", "data.phases.0.weights.digits=0.5", "name=c"], "only the future"),
        (["--sweep", "0.1", "--at", "16step"], "stands alone"),
        (["--sweep", "0.1,2"], "2 is no part of the run"),
        (["--sweep", "0,-0.1"], "-0.1 is no part of the run"),
        (["--sweep", "0"], "0 is no part of the run.* the trunk itself"),
        (["--sweep", "a"], "no list of shares"),
        (["--at", "16step", "--leave-one-out"], "no data.weights with two sources"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_what_cannot_be_branched_is_refused(
    trunk: Path, capfd: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    import re

    assert branch(trunk, *words) == 2
    errors = capfd.readouterr().err
    assert re.search(says, errors), errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("seed=5", "seed"),
        ("train.global_batch_size=16", "train.global_batch_size"),
        ("model.d_model=64", "stored [32], wanted [64]"),
    ],
)
def test_a_refused_branch_leaves_nothing(
    trunk: Path, capsys: pytest.CaptureFixture[str], change: str, says: str
) -> None:
    before = sorted(trunk.parent.rglob("*"))
    assert branch(trunk, "--at", "16step", change, "name=refused") == 2
    told = capsys.readouterr()
    assert says in told.err
    # What does not go with the trunk's data is refused before a branch is announced.
    assert ("branch refused" in told.out) == change.startswith("model.")
    assert sorted(trunk.parent.rglob("*")) == before
    # Where another branch is recorded, it stays.
    assert branch(trunk, "--at", "16step", "name=good", "train.stop_after=17step") == 0
    before = sorted(trunk.parent.rglob("*"))
    assert branch(trunk, "--at", "16step", change, "name=refused") == 2
    assert sorted(trunk.parent.rglob("*")) == before


def test_the_tree_is_drawn_without_branches_that_have_not_begun(trunk: Path) -> None:
    """Of one that was killed before its first step, only the record is there."""
    assert branch(trunk, "--at", "16step", "name=good", "train.stop_after=17step") == 0
    write_branch(trunk.parent / "killed", trunk, {"step": 16, "tokens": 16 * BATCH * SEQ})
    page = str(trunk.parent / "page.html")
    assert main(["report", str(trunk), str(trunk.parent / "good"), "--out", page]) == 0
    assert branches_of(trunk) == [trunk.parent / "good"]
    # A trunk of which only its list of branches is left.
    for name in ("metrics.jsonl", "config.yaml"):
        (trunk / name).unlink()
    assert [tree.run.name for tree in trees([read_run(trunk.parent / "good")])] == ["good"]


def test_a_tail_that_was_refused_can_be_mended(trunk: Path) -> None:
    assert branch(trunk, "--at", "16step", "name=side", "data.weights={digit: 1}") == 2
    assert branch(trunk, "--at", "16step", "name=side", "data.weights={digits: 1}") == 0


def test_a_ramp_cannot_be_cut_and_a_folder_in_use_is_left_alone(
    trunk: Path, world: Path, tmp_path: Path
) -> None:
    tree = yaml.safe_load((world / "tiny.yaml").read_text())
    tree["data"]["phases"][1]["ramp"] = "linear"
    cfg = load_config(tail(tmp_path, yaml.safe_dump(tree), "ramp"))
    with pytest.raises(ConfigError, match="inside the linear ramp"):
        past_phases(cfg, 14)
    assert [p["until"] for p in past_phases(cfg, 12)] == [f"{12 * BATCH * SEQ / 1000:g}Ktok"]
    shutil.copytree(trunk, trunk.parent / "other")
    point = find_point(trunk, Duration.parse("16step"))
    with pytest.raises(ConfigError, match="is no branch of this point"):
        plan_branch(point, None, ["name=other", f"out={trunk.parent}"])
    one_source = tail(tmp_path, "data: {weights: {digits: 1}}\n", "alone")
    with pytest.raises(ConfigError, match="two sources or more"):
        plan_leave_one_out(trunk, Duration.parse("16step"), one_source, [])
