"""Runs on split sequences against the same runs on one process, through the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import llmtrain, make_corpus, records, tiny_config

CHANGES = {
    "train.duration": "10step",
    "train.micro_batch_size": "2",
    "eval.every": "5step",
    "checkpoint.every": "null",
    "model.n_kv_heads": "1",
}
# Packed documents that attention keeps apart, or that run together under positions 0 to 47.
DOCUMENTS: list[str] = []
ONE_TEXT = ["data.document_mask=false", "data.reset_positions=false"]


def run(folder: Path, corpus: Path, ranks: int, *overrides: str) -> dict[str, Any]:
    config = tiny_config(folder, corpus)
    changes = [f"{key}={value}" for key, value in CHANGES.items()]
    done = llmtrain("train", str(config), *changes, *overrides, ranks=ranks)
    assert done.returncode == 0, done.stderr
    out = folder / "runs" / "tiny"
    return {kind: records(out, kind) for kind in ("step", "eval")}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("method", "data"), [("allgather", ONE_TEXT), ("ring", DOCUMENTS)], ids=["allgather", "ring"]
)
def test_a_split_run_equals_a_whole_one(
    tmp_path_factory: pytest.TempPathFactory, method: str, data: list[str]
) -> None:
    corpus = make_corpus(tmp_path_factory.mktemp("corpus"), documents=40)
    alone = run(tmp_path_factory.mktemp("alone"), corpus, 1, *data)
    split = ["parallel.context=2", f"parallel.context_method={method}"]
    ours = run(tmp_path_factory.mktemp("split"), corpus, 2, *split, *data)
    assert len(ours["step"]) == len(alone["step"]) == 10
    for a, b in zip(ours["step"], alone["step"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-5)
        for name, source in b["sources"].items():
            # Ranks that share a sequence count it once, and its tokens' losses each their own.
            for key in ("tokens", "share", "epochs"):
                assert a["sources"][name][key] == source[key]
            loss = source["loss"]  # None where the step drew nothing from it
            expected = None if loss is None else pytest.approx(loss, rel=2e-6)
            assert a["sources"][name]["loss"] == expected
    for a, b in zip(ours["eval"], alone["eval"], strict=True):
        for name, domain in b["domains"].items():
            assert a["domains"][name] == pytest.approx(domain, rel=2e-6)
