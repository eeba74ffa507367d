"""A tiny corpus and the config of a tiny run on it, for tests that really train."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from helpers import warm

from llmtrain.config.schema import PrepareConfig, TextSourceConfig, TokenizerConfig
from llmtrain.data.prepare import prepare


def make_corpus(folder: Path, documents: int = 120, seed: int = 0) -> Path:
    """Two sources of documents of very different lengths, in bytes (vocabulary 257)."""
    draw = random.Random(seed)
    for name, words in (("letters", "alpha beta gamma delta"), ("digits", "one 2 three 4 five 6")):
        path = folder / f"{name}.jsonl"
        with path.open("w") as file:
            for _ in range(documents):
                text = " ".join(draw.choices(words.split(), k=draw.randint(1, 60)))
                file.write(json.dumps({"text": text}) + "\n")
    out = folder / "corpus"
    sources = {
        name: TextSourceConfig(kind="jsonl", paths=[str(folder / f"{name}.jsonl")])
        for name in ("letters", "digits")
    }
    cfg = PrepareConfig(
        out=str(out),
        sources=sources,
        tokenizer=TokenizerConfig(kind="byte"),
        heldout_fraction=0.2,
        workers=1,
    )
    prepare(cfg, say=lambda text: None)
    return out


def tiny_config(folder: Path, corpus: Path, **changes: Any) -> Path:
    """Write a YAML file of a run of seconds: packing, document mask, a phase change at 0.6dur.

    changes: dotted keys with "__" for ".", e.g. train__micro_batch_size=2.
    """
    config: dict[str, Any] = {
        "name": "tiny",
        "out": str(folder / "runs"),
        "seed": 7,
        "device": "cpu",
        "model": {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48},
        "data": {
            "corpus": str(corpus),
            "seq_len": 48,
            "block_size": 64,
            "document_mask": True,
            "reset_positions": True,
            "phases": [
                {"until": "0.6dur", "weights": {"letters": 0.9, "digits": 0.1}},
                {"until": "1dur", "weights": {"letters": 0.3, "digits": 0.7}, "ramp": "linear"},
            ],
        },
        "optim": {"lr": 3e-3},
        "precision": {"compute": "fp32"},
        "train": {"duration": "20step", "global_batch_size": 8},
        "eval": {"every": "10step", "samples": 8},
        "checkpoint": {"every": "5step", "keep": 3},
        "log": {"every": 1, "tensorboard": False},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        place = config
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    file = folder / f"{config['name']}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def command(*arguments: str, ranks: int = 1) -> list[str]:
    """The command line of ``llmtrain`` on some processes of this machine."""
    if ranks == 1:
        return [sys.executable, "-m", "llmtrain", *arguments]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *launch, "-m", "llmtrain", *arguments]


def environment(**extra: str) -> dict[str, str]:
    """One thread per process, and nothing inherited from a launcher.

    The checkout comes first on the path: what is tested is what stands beside the tests.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "LLMTRAIN"))}
    tests = Path(__file__).parents[1]
    path = f"{tests.parent}{os.pathsep}{tests}"
    own = {"LLMTRAIN_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    return {**kept, **own, **extra}


def begun(*arguments: str, timeout: float = 120) -> warm.Running:
    """``llmtrain`` on one process, not yet at its end."""
    return warm.start(arguments, 1, environment(), timeout)


def llmtrain(
    *arguments: str, ranks: int = 1, timeout: float = 120, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run ``llmtrain`` to its end; stdout and stderr are kept.

    The processes are forked from one that has loaded torch (helpers/warm.py). fresh: start Python
    and torchrun anew, where start and end of the processes are a part of what is tested.
    """
    if not fresh:
        return warm.start(arguments, ranks, environment(), timeout).wait()
    return subprocess.run(
        command(*arguments, ranks=ranks),
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(),
        check=False,
    )


def in_parts(
    folder: Path, corpus: Path, parts: Sequence[tuple[int, str, Sequence[str]]], *changes: str
) -> list[dict[str, Any]]:
    """The steps' records of a run made in parts: ranks, where each stops, and its overrides."""
    folder.mkdir(exist_ok=True)
    config = str(tiny_config(folder, corpus))
    for ranks, stop, own in parts:
        words = ["train", config, *changes, f"train.stop_after={stop}", *own]
        done = llmtrain(*words, ranks=ranks)
        assert done.returncode == 0, done.stderr
    return records(folder / "runs" / "tiny")


def records(run: Path, kind: str = "step") -> list[dict[str, Any]]:
    """Records of one kind from a run's metrics."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def losses(run: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step in a run's metrics."""
    return [(r["loss"], r["grad_norm"]) for r in records(run)]
