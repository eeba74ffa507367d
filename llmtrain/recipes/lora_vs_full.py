"""LoRA Learns Less and Forgets Less (Biderman et al. 2024, 2405.09673): low-rank against full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from llmtrain.recipes.adaptation import Measures, measures
from llmtrain.recipes.experiment import Claim, Experiment, Trial, byte_corpus, mini_run
from llmtrain.recipes.pareto import Point, pareto_svg
from llmtrain.recipes.results import Losses, error_bound, report_lines
from llmtrain.train.console import human, table

BASE, SOURCE, TARGET = "base", "docs", "math"
STEPS = {"mini": (60, 240), "small": (500, 2000), "paper": (4000, 16000)}
# Low-rank learning rates about ten times the full ones (section 6 of the paper).
RATES = {"mini": (1.0e-3, 3.0e-3), "small": (3.0e-5, 1.0e-4), "paper": (1.0e-5, 3.0e-5)}
# The miniature's width of 96 is to 1, 2 and 6 what the paper's 4096 is to 43, 85 and 256.
RANKS = {"mini": (1, 2, 6), "small": (16, 64, 256), "paper": (16, 64, 256)}
# "10-100x typical LoRA ranks": the full change's rank against the lowest of RANKS.
RANK_FACTOR = 10


@dataclass(frozen=True)
class Method:
    """full finetuning, or adapters of a rank on attention, MLP or both."""

    kind: str
    rank: int = 0

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.kind if self.kind == "full" else f"LoRA {self.kind} r{self.rank}"

    def sections(self, rate: float) -> dict[str, Any]:
        """What it changes in the base's config. rate: of full finetuning."""
        if self.kind == "full":
            return {"optim": {"lr": rate}}
        targets = ["attention", "mlp"] if self.kind == "all" else [self.kind]
        adapters = {"rank": self.rank, "targets": targets}
        return {"optim": {"lr": 10 * rate}, "model": {"adapters": adapters}}


def methods(scale: str) -> list[Method]:
    """Full and all matrices at each rank; but in the miniature attention and MLP alone at the
    middle one."""
    ranks = RANKS[scale]
    found = [Method("full"), *(Method("all", rank) for rank in ranks)]
    if scale == "mini":
        return found
    return [*found, *(Method(kind, ranks[1]) for kind in ("attention", "mlp"))]


def label(method: Method, rate: float, steps: int) -> str:
    """A run's name; the rate is that of its optimizer."""
    own = method.sections(rate)["optim"]["lr"]
    return f"{method.label} lr {own:.0e} {steps} steps"


def _trials(scale: str) -> list[Trial]:
    base = _mini() if scale == "mini" else _large(scale)
    first = {**base, "data": {**base["data"], "weights": {SOURCE: 1.0}}}
    trials = [Trial(BASE, first)]
    for steps in STEPS[scale]:
        for method in methods(scale):
            for rate in RATES[scale]:
                own = method.sections(rate)
                run = {**base, "optim": {**base["optim"], **own["optim"]}}
                run["model"] = {**base["model"], **own.get("model", {})}
                run["data"] = {**base["data"], "weights": {TARGET: 1.0}}
                run["train"] = {**base["train"], "duration": f"{steps}step"}
                trials.append(Trial(label(method, rate, steps), run, begins=BASE))
    return trials


def _mini() -> dict[str, Any]:
    """0.25 million parameters, 512 bytes a step; the base reads most of the documentation once."""
    shape = {"d_model": 96, "n_layers": 2, "n_heads": 4, "d_ff": 256, "tie_embeddings": True}
    return mini_run(
        800,
        model=shape,
        data={"seq_len": 128, "block_size": 16},
        train={"duration": "800step", "global_batch_size": 4},
        optim={"lr": 3.0e-3, "weight_decay": 0.0},
        eval={"every": None, "samples": 64},
        log={"every": 20, "tensorboard": False},
    )


def _large(scale: str) -> dict[str, Any]:
    """A shape of 400M, and Llama 2 7B's with the batch of the paper's table 5."""
    width, depth, heads, ff = (4096, 32, 32, 11008) if scale == "paper" else (1024, 24, 16, 2816)
    names = (SOURCE, TARGET)
    return {
        "model": {
            "vocab_size": 32000,
            "d_model": width,
            "n_layers": depth,
            "n_heads": heads,
            "d_ff": ff,
        },
        "data": {
            "sources": {name: {"path": f"data/{name}"} for name in names},
            "heldout": {name: {"path": f"data/{name}_heldout"} for name in names},
            "seq_len": 4096 if scale == "paper" else 2048,
        },
        "train": {"duration": "20000step", "global_batch_size": 192, "micro_batch_size": 1},
        "optim": {"name": "lion", "lr": 1.0e-4, "weight_decay": 0.0, "betas": [0.9, 0.95]},
        "schedule": {"name": "cosine", "warmup": "0.1dur", "min_factor": 0.01},
        "checkpoint": {"every": "0.25dur"},
    }


@dataclass(frozen=True)
class Chosen:
    """A method at a duration with the learning rate that learned most. rows: per seed."""

    method: Method
    steps: int
    label: str
    losses: list[dict[str, float]]
    measured: list[Measures]

    def loss(self, domain: str) -> float:
        """Mean over seeds."""
        return mean(row[domain] for row in self.losses)


def _better(losses: Losses, method: Method, steps: int, scale: str) -> str:
    """Label of a method's runs with the learning rate of the lower mean loss on the target."""
    labels = [label(method, rate, steps) for rate in RATES[scale]]
    return min(labels, key=lambda name: mean(row[TARGET] for row in losses[name]))


def choose(losses: Losses, made: Mapping[str, Sequence[Path]], scale: str) -> list[Chosen]:
    """The better learning rate of each method and duration, by the target's mean held-out loss."""
    found = []
    for steps in STEPS[scale]:
        for method in methods(scale):
            best = _better(losses, method, steps, scale)
            pairs = zip(made[best], made[BASE], strict=True)
            measured = [measures(run, base) for run, base in pairs]
            found.append(Chosen(method, steps, best, losses[best], measured))
    return found


def study(losses: Losses, made: Mapping[str, Sequence[Path]]) -> tuple[list[str], str, Any]:
    """Tables, claims and verdict of the miniature, its plot, and the numbers behind them."""
    found = choose(losses, made, "mini")
    long = {one.method: one for one in found if one.steps == STEPS["mini"][-1]}
    claims = tuple(_claims(long))
    experiment = Experiment(
        EXPERIMENT.name, EXPERIMENT.title, EXPERIMENT.paper, _trials, claims, BASE
    )
    beside = [*_table(found, losses), "forgets less than full where both learned the same:"]
    beside += [
        f"  rank {rank}: {gain:+.4f} (bound {bound:.4f})"
        for rank, gain, bound in equal_learning(losses)
    ]
    lines = report_lines(experiment, losses, "mini", beside, _ranks(long))
    before = (mean(r[TARGET] for r in losses[BASE]), mean(r[SOURCE] for r in losses[BASE]))
    points = [
        Point(c.method.label, before[0] - c.loss(TARGET), c.loss(SOURCE) - before[1], c.steps)
        for c in found
    ]
    numbers = {one.label: [asdict(seed) for seed in one.measured] for one in found}
    drawing = pareto_svg(EXPERIMENT.title, points, (TARGET, SOURCE))
    return lines, drawing, {"losses": losses, "measures": numbers}


def _claims(long: Mapping[Method, Chosen]) -> list[Claim]:
    """The paper's, between the chosen runs of the longest duration."""
    first, second, third = RANKS["mini"]
    low, middle, high = (long[Method("all", rank)].label for rank in RANKS["mini"])
    full = long[Method("full")].label
    return [
        Claim(f"full learns more than rank {second} ({TARGET})", full, middle, (TARGET,)),
        Claim(f"rank {second} forgets less than full ({SOURCE})", middle, full, (SOURCE,)),
        Claim(f"rank orders learning: {third} above {first} ({TARGET})", high, low, (TARGET,)),
        Claim(f"rank orders forgetting: {first} below {third} ({SOURCE})", low, high, (SOURCE,)),
        Claim(f"full learns more than rank {third} ({TARGET})", full, high, (TARGET,), False),
        Claim(f"rank {third} forgets less than full ({SOURCE})", high, full, (SOURCE,), False),
    ]


def _ranks(long: Mapping[Method, Chosen]) -> list[tuple[str, bool]]:
    """The claim on spectra, in every seed."""
    low = RANKS["mini"][0]
    holds = all(one.rank90 >= RANK_FACTOR * low for one in long[Method("full")].measured)
    text = f"the full change's rank for 90% is at least {RANK_FACTOR} times the rank {low}"
    return [(text, holds)]


def equal_learning(losses: Losses) -> list[tuple[int, float, float]]:
    """(rank, gain, bound) for adapters of all matrices: how much less of the source than full
    finetuning they forget where both learned as much of the target.

    Of the better rate and the longest duration. Full finetuning's forgetting at that learning is
    read, seed by seed, from straight lines between its runs in the order of what they learned,
    from the base on; a method that learned more than all of them has the last one's.
    """
    steps, out = STEPS["mini"], []
    lines = [label(Method("full"), rate, s) for s in steps for rate in RATES["mini"]]
    for rank in RANKS["mini"]:
        best = _better(losses, Method("all", rank), steps[-1], "mini")
        gaps = []
        for i, base in enumerate(losses[BASE]):
            full = sorted(_moved(base, losses[name][i]) for name in lines)
            learned, forgot = _moved(base, losses[best][i])
            gaps.append(_between([(0.0, 0.0), *full], learned) - forgot)
        out.append((rank, mean(gaps), error_bound(gaps)))
    return out


def _moved(base: Mapping[str, float], run: Mapping[str, float]) -> tuple[float, float]:
    """(learned, forgot) since the base."""
    return base[TARGET] - run[TARGET], run[SOURCE] - base[SOURCE]


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """The height at x of the lines through points in the order of x; beyond them, the end's."""
    for (left, low), (right, high) in pairwise(points):
        if left <= x <= right:
            return low + (high - low) * (x - left) / (right - left or 1.0)
    return points[-1][1] if x > points[-1][0] else points[0][1]


def _table(found: Sequence[Chosen], losses: Losses) -> list[str]:
    """What each method learned and forgot at its better learning rate, means over seeds."""
    before = {d: mean(row[d] for row in losses[BASE]) for d in (TARGET, SOURCE)}
    rows = [
        (f"better rate, against the base ({TARGET} {before[TARGET]:.3f}, {SOURCE} "
         f"{before[SOURCE]:.3f})", "learned", "forgot", "exact match", "rank for 90%", "memory",
         "tokens/s")
    ]  # fmt: skip
    for one in found:
        own = one.measured
        rank, full = mean(m.rank90 for m in own), mean(m.full_rank for m in own)
        rows.append(
            (
                one.label,
                f"{before[TARGET] - one.loss(TARGET):+.4f}",
                f"{one.loss(SOURCE) - before[SOURCE]:+.4f}",
                f"{100 * mean(m.exact_match for m in own):.1f}%",
                f"{rank:.1f} of {full:.0f}",
                f"{human(mean(m.memory_bytes for m in own))}B",
                f"{mean(m.tokens_per_second for m in own):,.0f}",
            )
        )
    return table(rows)


EXPERIMENT = Experiment(
    name="lora-vs-full",
    title="LoRA against full finetuning: what is learned and what is forgotten",
    paper=(
        "Biderman et al. 2024, Llama 2 7B, code at 20B tokens (HumanEval, mean of HellaSwag, "
        "ARC-challenge, WinoGrande):",
        "             r 16   r 64   r 256  full",
        "  learned    .162   .196   .224   .263",
        "  kept       .635   .626   .617   .545",
        "  the full change needs about half of all singular values for 90% of its variance.",
        "Here: docs stand for what came before, math for what is learned, held-out loss for both.",
    ),
    trials=_trials,
    claims=(),
    baseline=BASE,
    corpus=byte_corpus,
    study=study,
    tasks="hellaswag,arc_challenge,winogrande",
)
