"""Kills, signals, bad disks and damaged files at random moments: no run is lost, nor a bit of it.

The suite takes a sample of eight runs. ``make test-faults`` takes more than a hundred; their
number is in LLMTRAIN_FAULTS, and LLMTRAIN_FAULTS_SEED draws others.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from faults.campaign import KINDS, Trajectory
from helpers.tiny import make_corpus

RUNS = int(os.environ.get("LLMTRAIN_FAULTS", "8"))
SEED = int(os.environ.get("LLMTRAIN_FAULTS_SEED", "0"))
STRIKES = 11  # of a trajectory, before it is let finish


@pytest.mark.dist
def test_whatever_happens_the_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, documents=40)
    draw = random.Random(SEED)
    straight_folder = tmp_path / "straight"
    straight_folder.mkdir()
    straight = Trajectory(straight_folder, corpus, draw).finish()
    assert any(name.startswith("optim.") for name in straight)
    deck: list[str] = []
    runs = 0
    while runs < RUNS:
        folder = tmp_path / f"trajectory-{runs}"
        folder.mkdir()
        trajectory = Trajectory(folder, corpus, draw)
        while trajectory.runs < min(STRIKES, RUNS - runs):
            if not deck:  # every kind comes up before one does again
                deck = draw.sample(KINDS, len(KINDS))
            trajectory.strike(deck.pop())
        assert trajectory.finish() == straight, trajectory.story()
        runs += trajectory.runs
        print(f"{runs} runs\n{trajectory.story()}")
