"""SPDF: sparse pre-training and dense fine-tuning (Thangarasa et al., UAI 2023, 2303.10464)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtrain.model import flops_per_token
from llmtrain.recipes.experiment import Claim, Experiment, Trial, byte_corpus, mini_run
from llmtrain.recipes.shape import shape_of
from llmtrain.sparsity import training_flops
from llmtrain.train.console import human, table

DENSE, HALF, QUARTER = "dense", "50% sparse", "75% sparse"
STAYS, SHORT = "75% sparse, stays", "dense, as few FLOPs"
DENSITIES = {HALF: 0.5, QUARTER: 0.25, STAYS: 0.25}
# Steps of pretraining, of finetuning, and of a dense pretraining with the counted FLOPs of a
# 75% sparse one (0.40 of them in the miniature's model).
PRETRAIN, FINETUNE, FEW = 120, 40, 48
OLD, NEW = ("code", "docs"), ("math",)


def _trials(scale: str) -> list[Trial]:
    make = _mini if scale == "mini" else _large
    return [Trial(label, make(scale, label)) for label in (DENSE, HALF, QUARTER, STAYS, SHORT)]


def _sections(label: str, steps: int) -> dict[str, Any]:
    if label not in DENSITIES:
        return {}
    until = None if label == STAYS else f"{steps}step"
    return {"sparsity": {"density": DENSITIES[label], "until": until}}


def _schedule(steps: int) -> dict[str, Any]:
    """Both parts warm up and decay."""
    return {
        "name": "cosine",
        "warmup": "10step",
        "min_factor": 0.1,
        "restarts": [f"{steps}step"],
    }


def _mini(scale: str, label: str) -> dict[str, Any]:
    """0.1 million parameters on bytes of code and documentation, then on arithmetic."""
    steps = FEW if label == SHORT else PRETRAIN
    shape = {"d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 168, "tie_embeddings": True}
    phases = [
        {"until": f"{steps}step", "weights": {"code": 1.0, "docs": 1.0}},
        {"weights": {"math": 1.0}},
    ]
    return mini_run(
        steps + FINETUNE,
        model=shape,
        data={"seq_len": 64, "block_size": 16, "phases": phases},
        train={"duration": f"{steps + FINETUNE}step", "global_batch_size": 8},
        schedule=_schedule(steps),
        eval={"every": None, "samples": 64},
        **_sections(label, steps),
    )


def _large(scale: str, label: str) -> dict[str, Any]:
    """GPT-2 Small on 2.5B tokens and GPT-3 XL on 26B, then a finetuning task."""
    width, depth, heads, batch, steps = (
        (768, 12, 12, 256, 4768) if scale == "small" else (2048, 24, 16, 512, 24800)
    )
    if label == SHORT:
        steps = int(steps / 2.5)
    finetune = steps // 20
    phases = [
        {"until": f"{steps}step", "weights": {"pile": 1.0}},
        {"weights": {"task": 1.0}},
    ]
    sources = {name: {"path": f"data/{name}"} for name in ("pile", "task")}
    return {
        "model": {
            "vocab_size": 50257,
            "d_model": width,
            "n_layers": depth,
            "n_heads": heads,
            "d_ff": 4 * width,
            "norm": "layernorm",
            "norm_bias": True,
            "position": "learned",
            "activation": "gelu",
            "tie_embeddings": True,
        },
        "data": {
            "sources": sources,
            "heldout": {name: {"path": f"data/{name}_heldout"} for name in sources},
            "seq_len": 2048,
            "phases": phases,
        },
        "train": {
            "duration": f"{steps + finetune}step",
            "global_batch_size": batch,
            "micro_batch_size": 4,
        },
        "optim": {"lr": 6.0e-4 if scale == "small" else 2.0e-4, "weight_decay": 0.1},
        "schedule": {**_schedule(steps), "warmup": "0.01dur"},
        "checkpoint": {"every": "500step"},
        **_sections(label, steps),
    }


def costs(folders: Mapping[str, Sequence[Path]]) -> list[str]:
    """Counted FLOPs of every run, in the pretraining part and in all."""
    rows = [("FLOPs (kept weights count)", "pretraining", "in all", "of dense, in all")]
    reference = 0.0
    for label, seeds in folders.items():
        cfg, model = shape_of(seeds[0])
        tokens = cfg.train.global_batch_size * cfg.data.seq_len
        whole = training_flops(cfg, model)
        after = (
            FINETUNE
            * tokens
            * flops_per_token(model, cfg.data.seq_len, 0.25 if label == STAYS else 1.0)
        )
        reference = reference or whole
        rows.append((label, human(whole - after), human(whole), f"{whole / reference:.2f}"))
    return table(rows)


EXPERIMENT = Experiment(
    name="spdf",
    title="Sparse pretraining on code and docs, then dense finetuning on math",
    paper=(
        "SPDF (2303.10464): GPT-3 XL pretrained at 75% sparsity on 2.5 times fewer FLOPs, then "
        "finetuned densely, is without a significant",
        "loss of accuracy on downstream tasks against the dense model (E2E, WebNLG, DART, Curation "
        "Corpus); no table of the paper was at hand.",
    ),
    trials=_trials,
    claims=(
        Claim(
            "75%: after dense finetuning within 3% of dense (math)",
            QUARTER,
            DENSE,
            NEW,
            within=0.03,
        ),
        Claim(
            "50%: after dense finetuning within 3% of dense (math)", HALF, DENSE, NEW, within=0.03
        ),
        Claim("finetuning densely beats staying sparse (math)", QUARTER, STAYS, NEW),
        Claim(
            "75%: beats a dense model of as few FLOPs (math)", QUARTER, SHORT, NEW, decides=False
        ),
        Claim(
            "75%: what was learned before (code, docs) costs loss",
            DENSE,
            QUARTER,
            OLD,
            decides=False,
        ),
    ),
    baseline=DENSE,
    costs=costs,
    corpus=byte_corpus,
)
