"""Checkpoints of CUDA tensors: the copy through page-locked memory and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint import Checkpointer
from llmtrain.config.upkeep import CheckpointConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_cuda_state_comes_back_as_it_was_at_the_save(tmp_path: Path, asynchronous: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(2)
    live = {
        "model.w": torch.randn(1031, 517, device="cuda", generator=generator),
        "model.b": torch.randn(77, device="cuda", generator=generator).bfloat16(),
        "optim.step": torch.tensor(3.0),
    }
    checkpoints = Checkpointer(tmp_path, CheckpointConfig(asynchronous=asynchronous, keep=3))
    history = []
    for step in (1, 2, 3):
        history.append({key: value.clone() for key, value in live.items()})
        checkpoints.save(step, live)
        for value in live.values():
            value.mul_(-1.5)
    checkpoints.close()
    for step, wanted in enumerate(history, 1):
        target = {key: torch.zeros_like(value) for key, value in wanted.items()}
        checkpoints.load(tmp_path / f"step-{step:08d}", target)
        for key, value in wanted.items():
            assert target[key].device == value.device and torch.equal(target[key], value)
