"""Training on a CUDA device: the same losses as on the CPU. ``make test-gpu`` runs these."""

from pathlib import Path

import pytest
import torch
from helpers.tiny import command, make_corpus, records, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def train(folder: Path, corpus: Path, *overrides: str) -> list[dict]:
    import subprocess

    config = tiny_config(folder, corpus)
    done = subprocess.run(
        command("train", str(config), *overrides),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return records(folder / "runs" / "tiny")


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> list[dict]:
    return train(tmp_path_factory.mktemp("cpu"), corpus)


def agree(ours: list[dict], theirs: list[dict], loss: float, norm: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=loss)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=norm)


def test_fp32_agrees_with_the_cpu_with_document_masks(
    tmp_path: Path, corpus: Path, on_cpu: list[dict]
) -> None:
    agree(train(tmp_path, corpus, "device=cuda"), on_cpu, 1e-4, 2e-3)


@pytest.mark.parametrize("extra", [[], ["train.compile=true"], ["train.recompute=full"]], ids=str)
def test_bf16_stays_near_fp32(
    tmp_path: Path, corpus: Path, on_cpu: list[dict], extra: list[str]
) -> None:
    steps = train(tmp_path, corpus, "device=cuda", "precision.compute=bf16", *extra)
    agree(steps, on_cpu, 1e-2, 1e-1)


def test_resume_on_the_gpu_goes_on_where_it_was(
    tmp_path: Path, corpus: Path, on_cpu: list[dict]
) -> None:
    train(tmp_path, corpus, "device=cuda", "train.stop_after=10step")
    agree(train(tmp_path, corpus, "device=cuda"), on_cpu, 1e-4, 2e-3)


def test_memory_is_the_devices_and_mfu_is_known_or_absent(tmp_path: Path, corpus: Path) -> None:
    from llmtrain.train.throughput import peak_flops

    steps = train(tmp_path, corpus, "device=cuda", "train.duration=3step")
    assert steps[-1]["memory_bytes"] < 2**30
    known = peak_flops(torch.cuda.get_device_name()) is not None
    assert (steps[-1]["mfu"] is not None) == known
