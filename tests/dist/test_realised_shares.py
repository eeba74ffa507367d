"""Token shares in a run's records against the plan's weights, over resumes and layouts."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_ranks
from helpers.tiny import make_corpus, records, tiny_config

from llmtrain.cli.main import main
from llmtrain.config import load_config
from llmtrain.parallel import init_world
from llmtrain.train.run import train

STEPS, BATCH, SEQ, CUT = 16, 8, 48, 7
# Phases end at updates 5 and 11; the second and the last samples of a block are other ones.
PHASES: list[tuple[int, dict[str, Fraction]]] = [
    (5, {"letters": Fraction(85, 100), "digits": Fraction(15, 100)}),
    (11, {"letters": Fraction(2, 7), "digits": Fraction(5, 7)}),
    (16, {"letters": Fraction(1, 2), "digits": Fraction(1, 2)}),
]
LAYOUTS = {
    "data": [],
    "replicas": ["parallel.replicate=2"],
    "tensor": ["parallel.tensor=2"],
    "pipeline": ["parallel.pipeline=2", "train.micro_batch_size=2"],
    "context": ["parallel.context=2", "parallel.context_method=ring"],
}


def started(folder: Path) -> Path:
    """The config of a run that one process has begun, inside its second phase."""
    corpus = make_corpus(folder, documents=40)
    weights = [{"letters": 0.85, "digits": 0.15}, {"letters": 2, "digits": 5}, {"letters": 1}]
    weights[2]["digits"] = 1
    phases = [
        {"until": f"{stop}step", "weights": share}
        for (stop, _), share in zip(PHASES, weights, strict=True)
    ]
    config = tiny_config(
        folder,
        corpus,
        data__phases=phases,
        data__block_size=8,
        train__duration=f"{STEPS}step",
        eval__every=None,
        checkpoint__every=None,
    )
    assert main(["train", str(config), f"train.stop_after={CUT}step"]) == 0
    return config


def expected(step: int) -> dict[str, Fraction]:
    """Samples that each source should have given after update ``step``, by the weights alone."""
    out, start = {"letters": Fraction(0), "digits": Fraction(0)}, 0
    for stop, weights in PHASES:
        for name, weight in weights.items():
            out[name] += weight * max(min(step, stop) - start, 0) * BATCH
        start = stop
    return out


def check(steps: list[dict[str, Any]]) -> None:
    assert [r["step"] for r in steps] == list(range(1, STEPS + 1))
    for record in steps:  # a block is a step here, so every record stands at a block's end
        wanted, sources = expected(record["step"]), record["sources"]
        counts = {name: source["tokens"] // SEQ for name, source in sources.items()}
        assert sum(counts.values()) == record["samples"] == record["step"] * BATCH
        for name, count in counts.items():
            assert abs(count - wanted[name]) < 1
            assert sources[name]["share"] == pytest.approx(count / record["samples"])
    ends = {stop: steps[stop - 1]["sources"] for stop, _ in PHASES}
    before = dict.fromkeys(("letters", "digits"), 0)
    for (stop, weights), start in zip(PHASES, (0, 5, 11), strict=True):
        for name, weight in weights.items():
            got = ends[stop][name]["tokens"] - before[name]
            assert abs(Fraction(got, SEQ) - weight * (stop - start) * BATCH) < 2
            before[name] = ends[stop][name]["tokens"]


def go_on(rank: int, config: Path, overrides: list[str]) -> int:
    return train(load_config(config, overrides), init_world("cpu"))


def test_shares_are_the_plans_in_every_phase_after_a_resume_under_any_layout(
    tmp_path: Path,
) -> None:
    config = started(tmp_path)
    runs = tmp_path / "runs"
    for name in LAYOUTS:
        shutil.copytree(runs, tmp_path / name)
    assert main(["train", str(config)]) == 0
    alone = records(runs / "tiny")
    check(alone)
    counted = ("tokens", "share", "epochs")
    for name, overrides in LAYOUTS.items():
        out = tmp_path / name
        run_ranks(2, go_on, config, [*overrides, f"out={out}"])
        ours = records(out / "tiny")
        check(ours)
        for a, b in zip(ours, alone, strict=True):
            for source, values in b["sources"].items():
                assert [a["sources"][source][k] for k in counted] == [values[k] for k in counted]
