"""The skill graph: learned from branches that train on one source each."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from helpers.tiny import make_corpus, records, tiny_config

from llmtrain.cli.main import main
from llmtrain.errors import ConfigError
from llmtrain.train.skill_graph import edges

FLAT = {"letters": 0.5, "digits": 0.5}


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph")
    corpus = make_corpus(folder, documents=40)
    config = tiny_config(folder, corpus, data__phases=None, data__weights=FLAT)
    assert main(["train", str(config), "data.block_size=8", "train.stop_after=10step"]) == 0
    return folder / "runs" / "tiny"


def test_edges_are_falls_of_the_loss_over_the_largest() -> None:
    before = {"a": 4.0, "b": 3.0}
    after = {"a": {"a": 2.0, "b": 2.5}, "b": {"a": 4.5, "b": 2.0}}
    assert edges(before, after) == {"a": {"a": 1.0, "b": 0.25}, "b": {"a": 0.0, "b": 0.5}}
    with pytest.raises(ConfigError, match="no held-out loss fell"):
        edges(before, {"a": {"a": 4.0, "b": 3.5}, "b": {"a": 5.0, "b": 3.0}})


def test_a_learned_graph_is_that_of_its_branches_and_drives_a_run(
    trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "graph.json"
    words = ["--at", "10step", "--skill-graph", str(out), "--for", "4step", f"out={tmp_path}"]
    assert main(["branch", str(trunk), *words, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # The command of one branch makes what the driver then finds done.
    assert main(shlex.split(lines[1])[1:]) == 0
    assert main(["branch", str(trunk), *words]) == 0
    assert "nothing to do" in capsys.readouterr().out
    before = next(r for r in records(trunk, "eval") if r["step"] == 10)["domains"]
    graph = json.loads(out.read_text())["graph"]
    falls = {}
    for name in FLAT:
        run = tmp_path / f"tiny-branch-only-{name}"
        last = records(run, "eval")[-1]
        assert last["step"] == 14
        falls[name] = {j: before[j]["loss"] - last["domains"][j]["loss"] for j in FLAT}
        first, final = records(run)[0]["sources"], records(run)[-1]["sources"]
        other = next(n for n in FLAT if n != name)  # the 11th step ends a block of the trunk's
        assert final[other]["tokens"] - first[other]["tokens"] == 0
    top = max(max(row.values()) for row in falls.values())
    for i in FLAT:
        for j in FLAT:
            assert graph[i][j] == pytest.approx(max(falls[i][j], 0) / top, abs=1e-5)
    config = trunk.parents[1] / "tiny.yaml"
    online = f"online={{every: 5step, graph_file: {out}}}"
    assert main(["train", str(config), online, "name=driven", f"out={tmp_path}"]) == 0
    assert len(records(tmp_path / "driven", "mixture")) == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--at", "10step", "--for", "11step", "--skill-graph", "g"], "would end at step 21"),
        (["--at", "10step", "--for", "soon", "--skill-graph", "g"], "--for: 'soon' is not"),
        (["--skill-graph", "g"], "goes with --at"),
        (["--at", "10step", "--for", "5step"], "--for goes with --skill-graph"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_gives_no_graph_is_refused(
    trunk: Path, capfd: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert main(["branch", str(trunk), *words]) == 2
    assert says in capfd.readouterr().err
