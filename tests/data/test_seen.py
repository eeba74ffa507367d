"""What a run has seen, against the batches that its loader gave."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.tiny import make_corpus, tiny_config

from llmtrain.cli.main import main
from llmtrain.config import load_config
from llmtrain.data.loader import Loader
from llmtrain.data.plan import build_plan
from llmtrain.data.seen import Seen

SEQ, BATCH = 48, 8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps that repeats its first two batches until 7, resumed after 10 with another
    future."""
    folder = tmp_path_factory.mktemp("seen")
    corpus = make_corpus(folder, documents=40)
    config = tiny_config(folder, corpus, eval__every=None, data__block_size=16)
    words = ["train", str(config), "data.diet={samples: 16, until: 7step}"]
    assert main([*words, "train.stop_after=10step"]) == 0
    assert main([*words, "data.phases.1.weights={letters: 0, digits: 1}"]) == 0
    return folder / "runs" / "tiny"


def test_every_sample_is_the_one_the_loader_gave(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "list.jsonl"
    assert main(["data", "seen", str(run), "--between", "3step", "1dur", "--list", str(out)]) == 0
    listed = [json.loads(line) for line in out.read_text().splitlines()]
    cfg = load_config(run / "config.yaml")
    plan = build_plan(cfg, 20 * BATCH)
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    plan.check_resume(json.loads((newest / "data.json").read_text()), 20 * BATCH)
    loader = Loader.from_config(plan, cfg, 0, 1)
    rows = [(step, row) for step in range(3, 20) for row in range(BATCH)]
    assert [s["sample"] for s in listed] == list(range(24, 160))
    batches = {step: loader.batch(step) for step in range(3, 20)}
    for (step, row), sample in zip(rows, listed, strict=True):
        batch = batches[step]
        assert sample["step"] == step + 1
        assert plan.names[int(batch.source_ids[row])] == sample["source"]
        source = plan.sources[plan.names.index(sample["source"])]
        first = sample["number"] * SEQ
        length = min(SEQ, source.num_tokens - first - 1)  # the last token is only a target
        tokens = np.asarray(source.read(first, first + length))
        assert batch.tokens[row, :length].tolist() == tokens.tolist()
    assert any(s["epoch"] for s in listed) or len({s["number"] for s in listed}) > 50


def test_counts_are_those_of_the_metrics(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "seen", str(run), "--between", "0step", "20step"]) == 0
    out = capsys.readouterr().out
    last = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    sources = [r for r in last if r["kind"] == "step"][-1]["sources"]
    for name, source in sources.items():
        row = next(line.split() for line in out.splitlines() if line.split()[0] == name)
        assert int(row[1].replace(",", "")) * SEQ == source["tokens"]
    assert "steps 1 to 20" in out


def test_a_branch_is_followed_into_its_trunk(run: Path, tmp_path: Path) -> None:
    words = ["--at", "10step", "name=side", f"out={tmp_path}", "data.weights={letters: 1}"]
    if not (run / "checkpoints" / "step-00000010").exists():
        pytest.fail("the checkpoint of step 10 should have been kept")
    assert main(["branch", str(run), *words]) == 0
    from llmtrain.config import Duration

    points = Duration.parse("0step"), Duration.parse("10step")
    past = [list(Seen.of_run(r, *points).samples()) for r in (run, tmp_path / "side")]
    assert past[0] == past[1]
    tail = Seen.of_run(tmp_path / "side", Duration.parse("12step"), Duration.parse("1dur"))
    assert {s["source"] for s in tail.samples()} == {"letters"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--between", "0.5dur", "0.5dur"], "no part of"),
        (["--between", "3step", "400step"], "no part of"),
        (["--between", "3", "4step"], "is not a duration"),
    ],
)
def test_points_that_are_not_there(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert main(["data", "seen", str(run), *words]) == 2
    assert says in capsys.readouterr().err


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"name": "x"}))
    assert main(["data", "seen", str(tmp_path), "--between", "0step", "1step"]) == 2
    assert "plan.json is missing or damaged" in capsys.readouterr().err
