"""What an experiment is: runs to make for every seed, and comparisons that decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.recipes.sweep import Sweep

SCALES = ("mini", "small", "paper")
MINI_SOURCES = ("code", "docs", "math")


@dataclass(frozen=True)
class Scoring:
    """Scores that a run selects its samples by. by: label of an earlier run of the same seed, whose
    checkpoint at ``at`` (a duration) gives them; method: of ``llmtrain data score``."""

    by: str
    at: str
    method: str


@dataclass(frozen=True)
class Trial:
    """One run of an experiment. label: its row in the table. A run of its own has ``config``
    (plain data, without name, out and seed); a branch has ``trunk`` (the label of the run it
    leaves), ``at`` and ``overrides``. scoring: what becomes the config's data.select.scores.
    A config with a section ``continual`` is a sequence of tasks; shares: folders of its runs that
    an earlier trial of the seed has made in the same way, with that trial's label. One with a
    section ``lottery`` is made once a seed, and ``level`` says which of its runs is meant. begins:
    label of the earlier run of the same seed with whose weights it begins."""

    label: str
    config: dict[str, Any] = field(default_factory=dict)
    trunk: str | None = None
    at: str = ""
    overrides: Sequence[str] = ()
    scoring: Scoring | None = None
    shares: Mapping[str, str] = field(default_factory=dict)
    level: int = 0
    begins: str | None = None


@dataclass(frozen=True)
class Claim:
    """A paper's claim as a comparison of held-out losses, seed by seed.

    The mean loss of ``domains`` (all when empty) should be lower for ``better`` than for ``than``;
    with ``within``, at most that share above it. also: the comparison is with the mean of ``than``
    and this one. decides: whether it is part of the verdict, or shown beside it (a cost, say).
    """

    text: str
    better: str
    than: str
    domains: Sequence[str] = ()
    decides: bool = True
    also: str | None = None
    within: float = 0.0


# Losses and folders of the runs, by label -> lines of the result, drawing, data for the JSON file.
Study = Callable[
    [dict[str, list[dict[str, float]]], Mapping[str, Sequence[Path]]], tuple[list[str], str, Any]
]


@dataclass(frozen=True)
class Experiment:
    """name: on the command line. trials: scale -> runs of each seed. paper: lines with the paper's
    own numbers and where they are from. costs: label -> folders of the seeds, to lines of a table
    of what each trial costs. sweep: what is computed of the runs in place of the claims; one seed
    is enough for it. study: computes the whole result itself, in place of table, claims and plot.
    corpus: folder of results -> ``prepare`` of the miniature. tasks: of lm-evaluation-harness, for
    the runs at the other scales."""

    name: str
    title: str
    paper: Sequence[str]
    trials: Callable[[str], list[Trial]]
    claims: Sequence[Claim]
    baseline: str
    seeds: int = 3
    costs: Callable[[Mapping[str, Sequence[Path]]], list[str]] | None = None
    sweep: Sweep | None = None
    study: Study | None = None
    corpus: Callable[[Path], dict[str, Any]] | None = None
    tasks: str = ""


def slug(label: str) -> str:
    """A label as part of a folder's name."""
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in label.lower()).strip("-")


def mini_corpus(out: Path) -> dict[str, Any]:
    """``prepare`` of the small built-in corpus that all miniatures share."""
    return {
        "out": str(out / "corpus"),
        "heldout_fraction": 0.08,
        "tokenizer": {"kind": "bpe", "vocab_size": 2048, "train_bytes": 1_500_000},
        "sources": {
            "code": {"kind": "builtin", "domain": "code", "max_bytes": 3_000_000},
            "docs": {"kind": "builtin", "domain": "docs", "max_bytes": 1_500_000},
            "math": {"kind": "builtin", "domain": "math", "max_bytes": 1_000_000},
        },
    }


def byte_corpus(out: Path) -> dict[str, Any]:
    """A smaller one of bytes, for sweeps of many short runs: a vocabulary of 257."""
    return {
        "out": str(out / "bytes"),
        "heldout_fraction": 0.08,
        "tokenizer": {"kind": "byte"},
        "sources": {
            domain: {"kind": "builtin", "domain": domain, "max_bytes": 600_000}
            for domain in MINI_SOURCES
        },
    }


def mini_run(steps: int, **sections: Any) -> dict[str, Any]:
    """A run of half a minute on two cores: 1.1 million parameters, 2,048 tokens a step."""
    base: dict[str, Any] = {
        "device": "cpu",
        "model": {"d_model": 128, "n_layers": 4, "n_heads": 4, "d_ff": 344, "tie_embeddings": True},
        "train": {"duration": f"{steps}step", "global_batch_size": 16},
        "optim": {"lr": 3.0e-3},
        "schedule": {"name": "cosine", "warmup": "0.05dur", "min_factor": 0.1},
        "eval": {"every": None, "samples": 128},
        "checkpoint": {"every": None},
        "log": {"every": 20, "tensorboard": False},
    }
    return {**base, **sections}


def text_run(
    model: dict[str, Any],
    seq_len: int,
    steps: int,
    batch: tuple[int, int],
    text: str = "data/text",
    **sections: Any,
) -> dict[str, Any]:
    """A run of the larger scales on one prepared text. batch: sequences a step, and of one forward
    pass; text: its folder, beside that of its held-out part."""
    base: dict[str, Any] = {
        "model": model,
        "data": {
            "sources": {"text": {"path": text}},
            "heldout": {"text": {"path": f"{text}_heldout"}},
            "seq_len": seq_len,
            "weights": {"text": 1},
        },
        "optim": {"lr": 6.0e-4},
        "train": {
            "duration": f"{steps}step",
            "global_batch_size": batch[0],
            "micro_batch_size": batch[1],
        },
        "checkpoint": {"every": "1000step"},
    }
    return {**base, **sections}
