"""Saved under one layout, resumed under any other: the next losses are the same.

Through ``llmtrain train`` as a user runs it: packed documents, accumulation, evaluation, a
tied head, a changing mixture.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.tiny import llmtrain, make_corpus, records, tiny_config

CHANGES = (
    "train.duration=8step",
    "train.micro_batch_size=2",
    "checkpoint.every=4step",
    "eval.every=8step",
    "model.tie_embeddings=true",
)
# Resumed layouts: processes and overrides.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process": (1, ()),
    "FSDP4": (4, ()),
    "TP4": (4, ("parallel.tensor=4",)),
    "PP2": (2, ("parallel.pipeline=2",)),
    "PP2+TP2": (4, ("parallel.pipeline=2", "parallel.tensor=2")),
    "CP2": (2, ("parallel.context=2",)),
    "ZeRO-2": (2, ("parallel.engine=deepspeed", "parallel.zero_stage=2")),
    "ZeRO-3+TP2": (4, ("parallel.engine=deepspeed", "parallel.tensor=2")),
}


def go(folder: Path, config: Path, ranks: int, *changes: str, fresh: bool = False) -> list[dict]:
    words = ["train", str(config), f"out={folder}", *CHANGES, *changes]
    done = llmtrain(*words, ranks=ranks, fresh=fresh)
    assert done.returncode == 0, done.stderr
    return records(folder / "tiny")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reshard")
    return tiny_config(folder, make_corpus(folder, documents=40))


@pytest.fixture(scope="module")
def alone(config: Path) -> list[dict]:
    return go(config.parent / "alone", config, 1)


def compare(steps: list[dict], alone: list[dict]) -> None:
    assert [r["step"] for r in steps] == [r["step"] for r in alone]
    for ours, theirs in zip(steps, alone, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-6)
        for name, source in theirs["sources"].items():
            assert ours["sources"][name]["tokens"] == source["tokens"]


@pytest.fixture(scope="module")
def half(config: Path) -> Path:
    """A run stopped half way under tensor parallelism x FSDP2."""
    folder = config.parent / "half"
    go(folder, config, 4, "train.stop_after=4step", "parallel.tensor=2")
    return folder


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_tensor_parallel_and_fsdp(
    layout: str, config: Path, half: Path, alone: list[dict], tmp_path: Path
) -> None:
    shutil.copytree(half, tmp_path / "run")
    ranks, changes = LAYOUTS[layout]
    compare(go(tmp_path / "run", config, ranks, *changes), alone)
    folders = (tmp_path / "run", config.parent / "alone")
    evals = [records(folder / "tiny", "eval")[-1] for folder in folders]
    assert evals[0]["mean_loss"] == pytest.approx(evals[1]["mean_loss"], rel=1e-6)


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["PP2", "ZeRO-2"])
def test_back_to_one_process(layout: str, config: Path, alone: list[dict], tmp_path: Path) -> None:
    ranks, changes = LAYOUTS[layout]
    # A pipeline once in real processes: hash seeds differ between ranks, and nothing is shared.
    go(tmp_path, config, ranks, "train.stop_after=4step", *changes, fresh=layout == "PP2")
    compare(go(tmp_path, config, 1), alone)
