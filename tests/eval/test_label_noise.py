"""Samples with planted label noise come first by their EL2N, and a selection leaves them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from llmtrain.cli.main import main
from llmtrain.config import load_config
from llmtrain.data.plan import build_plan
from llmtrain.data.scores import read_scores

KEYS, SEQ, SAMPLES, NOISY = 24, 32, 400, 80


def plant(file: Path) -> NDArray[np.int64]:
    """Windows of pairs (key, answer); every answer follows from its key, but in the noisy windows
    half of the answers are drawn at random. Returns the numbers of the noisy windows."""
    rng = np.random.default_rng(0)
    answers = KEYS + rng.permutation(KEYS)
    keys = rng.integers(0, KEYS, (SAMPLES, SEQ // 2))
    values = answers[keys]
    noisy = rng.choice(SAMPLES, NOISY, replace=False)
    for row in noisy:
        wrong = rng.choice(SEQ // 2, SEQ // 4, replace=False)
        values[row, wrong] = KEYS + rng.integers(0, KEYS, len(wrong))
    pairs = np.stack((keys, values), -1).reshape(-1)
    np.save(file, np.append(pairs, 0).astype(np.uint16))
    return noisy


def auc(scores: NDArray[np.float64], positive: NDArray[np.int64]) -> float:
    """Chance that a positive sample has a higher score than a negative one."""
    mask = np.zeros(len(scores), bool)
    mask[positive] = True
    higher = scores[mask][:, None] > scores[~mask]
    ties = scores[mask][:, None] == scores[~mask]
    return float((higher + 0.5 * ties).mean())


def test_noisy_samples_have_the_highest_el2n(tmp_path: Path) -> None:
    noisy = plant(tmp_path / "pairs.npy")
    config: dict[str, Any] = {
        "name": "noise",
        "out": str(tmp_path / "runs"),
        "device": "cpu",
        "model": {"vocab_size": 2 * KEYS, "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 64},
        "data": {
            "sources": {"pairs": {"path": str(tmp_path / "pairs.npy")}},
            "weights": {"pairs": 1.0},
            "seq_len": SEQ,
        },
        "optim": {"lr": 1.0e-2},
        "precision": {"compute": "fp32"},
        "train": {"duration": "60step", "global_batch_size": 16},
        "eval": {"every": None},
        "checkpoint": {"every": None},
        "log": {"every": 30, "tensorboard": False},
    }
    file = tmp_path / "noise.yaml"
    file.write_text(yaml.safe_dump(config))
    assert main(["train", str(file)]) == 0
    out = tmp_path / "scores.parquet"
    run = str(tmp_path / "runs" / "noise")
    assert main(["data", "score", run, "--method", "el2n", "--out", str(out)]) == 0
    assert auc(read_scores(out, "pairs"), noisy) > 0.9
    # An offset as large as the share of noise leaves nearly only clean samples.
    share = NOISY / SAMPLES
    config["data"]["select"] = {"scores": str(out), "offset": share, "keep": 1 - share}
    file.write_text(yaml.safe_dump(config))
    (selection,) = build_plan(load_config(file), 160).selections
    assert selection is not None and selection.size == SAMPLES - NOISY
    assert len(set(selection.kept.tolist()) & set(noisy.tolist())) < 0.15 * NOISY
