"""Makes folders that look like the ones training leaves, without training."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from llmtrain.config import from_dict, to_yaml
from llmtrain.data.phases import stretches_of, to_json

SEQ_LEN, BATCH = 256, 32
SOURCES = {"code": (2.1, 6.2), "docs": (3.0, 6.6), "math": (1.3, 4.4)}  # final loss, unigram
BEFORE = {"code": 0.5, "docs": 0.4, "math": 0.1}
AFTER = {"code": 0.2, "docs": 0.4, "math": 0.4}


def share(position: float) -> dict[str, float]:
    """Weights at a fraction of the run: constant up to 0.8, then on a straight line."""
    part = min(max((position - 0.8) / 0.2, 0.0), 1.0)
    return {name: BEFORE[name] + (AFTER[name] - BEFORE[name]) * part for name in BEFORE}


def records(
    steps: int = 300, every: int = 10, seed: int = 0, lr: float = 2e-3, scale: float = 1.0
) -> list[dict[str, Any]]:
    """Records of a run with a spike, a resume, checkpoints, evaluations and samples."""
    rng = random.Random(seed)
    counts = dict.fromkeys(SOURCES, 0.0)
    out: list[dict[str, Any]] = []

    def position(step: int) -> dict[str, int]:
        return {"step": step, "tokens": step * BATCH * SEQ_LEN, "samples": step * BATCH}

    for step in range(1, steps + 1):
        for name, part in share((step - 0.5) / steps).items():
            counts[name] += part * BATCH * SEQ_LEN
        fall = math.exp(-6 * step / steps)
        losses = {
            name: scale * (final + (9 - final) * fall) + rng.gauss(0, 0.04)
            for name, (final, _) in SOURCES.items()
        }
        spike = 2.5 if step == int(0.57 * steps) // every * every else 0.0
        if step == 1 or step % every == 0 or step == steps:
            warm = min(1.0, step / (0.05 * steps))
            mean = sum(losses[n] * w for n, w in share(step / steps).items())
            out.append(
                {
                    "kind": "step",
                    **position(step),
                    "loss": mean + spike,
                    "grad_norm": (0.4 + 3 * fall) * math.exp(rng.gauss(0, 0.15)) + 3 * spike,
                    "lr": lr * warm * (0.55 + 0.45 * math.cos(math.pi * step / steps)),
                    "tokens_per_second": 15000 + rng.gauss(0, 300),
                    "mfu": None,
                    "memory_bytes": 900 << 20,
                    "seconds": every * BATCH * SEQ_LEN / 15000,
                    "data_seconds": abs(rng.gauss(0.01, 0.003)),
                    "sources": {
                        name: {"tokens": int(counts[name]), "loss": losses[name], "epochs": 0.4}
                        for name in SOURCES
                    },
                }
            )
        if spike:
            text = "loss 5.61 is 9.3 sigma above the window's 3.1 (samples 5472..5503)"
            out.append({"kind": "event", **position(step), "text": text})
        if step % max(steps // 4, 1) == 0:
            domains = {
                name: {
                    "loss": losses[name] + 0.1,
                    "perplexity": math.exp(losses[name] + 0.1),
                    "bits_per_byte": (losses[name] + 0.1) / 3.1 / math.log(2),
                    "tokens": 16384,
                }
                for name in SOURCES
            }
            mean = sum(d["loss"] for d in domains.values()) / len(domains)
            out.append({"kind": "eval", **position(step), "domains": domains, "mean_loss": mean})
        if step == steps // 2:
            out.append({"kind": "event", **position(step), "text": "checkpoint"})
            resumed = f"resumed from step-{step:08d}"
            out.append({"kind": "event", **position(step), "text": resumed})
    for prompt, text in (
        (
            "def main(",
            'argv=None):\n    """Run <script>alert(1)</script> & exit."""\n    return 0\n',
        ),
        ("Question: 12 + 30 =", " 42\nQuestion: 7 * 8 = 56"),
    ):
        out.append({"kind": "sample", **position(steps), "prompt": prompt, "text": text})
    return out


def write_run(folder: Path, lines: list[dict[str, Any]], lr: float = 2e-3) -> Path:
    """Write a run's folder with ``lines`` as its metrics; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = max((r["step"] for r in lines), default=0)
    text = "".join(json.dumps(r) + "\n" for r in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    cfg = from_dict(
        {
            "name": folder.name,
            "optim": {"lr": lr},
            "train": {"duration": f"{max(steps, 1)}step", "global_batch_size": BATCH},
            "data": {
                "corpus": "corpus",
                "seq_len": SEQ_LEN,
                "block_size": 32,
                "phases": [
                    {"until": "0.8dur", "weights": BEFORE},
                    {"until": "1dur", "weights": AFTER, "ramp": "linear"},
                ],
            },
            "eval": {"prompts": ["<b>bold</b> & co"]},
        }
    )
    (folder / "config.yaml").write_text(to_yaml(cfg), encoding="utf-8")
    plan = {"realised": to_json(stretches_of(cfg, max(steps, 1) * BATCH))}
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    return folder


def write_corpus(folder: Path) -> None:
    """Write a corpus manifest with the unigram entropies of the domains."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = {
        name: {"heldout": {"unigram_entropy_nats": entropy, "unigram_loss_nats": entropy + 0.1}}
        for name, (_, entropy) in SOURCES.items()
    }
    (folder / "manifest.json").write_text(json.dumps({"sources": sources}), encoding="utf-8")
