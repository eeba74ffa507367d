"""The straight line between two checkpoints: held-out losses along it, and its barrier."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llmtrain.checkpoint.safefile import write_small
from llmtrain.checkpoint.store import explain
from llmtrain.data.loader import heldout_sets
from llmtrain.errors import CheckpointError
from llmtrain.eval.checkpoint import Alone
from llmtrain.eval.heldout import evaluate_domains
from llmtrain.eval.loading import Trained, load_trained, require_plain
from llmtrain.merge.align import align
from llmtrain.merge.sources import check_alike, open_source, require_finite, require_ours
from llmtrain.parallel import Degrees, Layout, World
from llmtrain.parallel.world import pick_device
from llmtrain.report.chart import Chart, Line, draw
from llmtrain.report.page import html_table, page
from llmtrain.report.read import Series

MEAN = "mean"


@dataclass(frozen=True)
class Curve:
    """Losses along (1 - t) A + t B. losses: by domain, and ``mean`` over them, one per place."""

    first: str
    second: str
    aligned: bool
    places: list[float]
    losses: dict[str, list[float]]

    @property
    def barriers(self) -> dict[str, float]:
        """The barrier in each domain's loss, in nats per token."""
        return {name: barrier(self.places, values) for name, values in self.losses.items()}


def barrier(places: Sequence[float], losses: Sequence[float]) -> float:
    """Linear-mode-connectivity barrier: max over t of loss(t) - ((1 - t) loss(0) + t loss(1)).

    Frankle et al. 2020 (1912.05671) with the ends interpolated (Ainsworth et al. 2023, 2209.04836,
    definition 2.2). places: rising from 0 to 1. 0 when the curve lies nowhere above its chord.
    """
    start, end = losses[0], losses[-1]
    heights = (loss - ((1 - t) * start + t * end) for t, loss in zip(places, losses, strict=True))
    return max(heights, default=0.0)


def interpolate(
    first: Path,
    second: Path,
    points: int,
    *,
    device: str = "auto",
    aligned: bool = False,
    say: Callable[[float, float], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> Curve:
    """Evaluate ``points`` places on the line between two checkpoints, ends included.

    The held-out text, precision and settings are those of ``first``. aligned: the hidden units
    and heads of ``second`` are permuted to match first (``merge.align``). say: told t and the
    mean loss of each place. warn: as of ``merge_models``. Three copies of the weights are in
    memory. Raises CheckpointError when the two do not fit together.
    """
    sources = [open_source(str(path)) for path in (first, second)]
    for source in sources:
        require_ours(source, "held-out text")
        if warn is not None:
            source.tell(warn)
    check_alike(sources)
    place = pick_device(device, 0)
    one, two = (require_plain(load_trained(source.path, place), "a path") for source in sources)
    params = dict(one.model.named_parameters())
    for trained, source in ((one, sources[0]), (two, sources[1])):
        for name, param in trained.model.named_parameters():
            require_finite(param.detach(), name, source.path)
    start = {name: param.detach().clone() for name, param in params.items()}
    end = {name: param.detach() for name, param in two.model.named_parameters()}
    if aligned:
        end = align(start, end, one.model_cfg)
    places = [i / (points - 1) for i in range(points)]
    losses: dict[str, list[float]] = {}
    for t in places:
        with torch.no_grad():
            for name, param in params.items():
                torch.lerp(start[name], end[name], t, out=param.detach())
        found = _losses(one, place)
        for domain, value in found.items():
            losses.setdefault(domain, []).append(value)
        if say is not None:
            say(t, found[MEAN])
    ends = [str(source.path) for source in sources]
    return Curve(ends[0], ends[1], aligned, places, losses)


def _losses(trained: Trained, place: torch.device) -> dict[str, float]:
    """Held-out loss by domain, and the mean."""
    cfg = trained.cfg
    micro = cfg.eval.micro_batch_size or cfg.train.micro_batch_size or 16
    alone = Layout(World(0, 1, 0, place, None), Degrees())
    domains = evaluate_domains(Alone(trained, place), heldout_sets(cfg), micro, alone)
    found = {name: values["loss"] for name, values in domains.items()}
    if not found:
        raise CheckpointError(
            f"{trained.path} has no held-out text; prepare it with heldout_fraction above 0"
        )
    return {MEAN: math.fsum(found.values()) / len(found), **found}


def write_curve(curve: Curve, out: Path) -> list[Path]:
    """``path.json`` and ``path.html`` (table and plot) in the new folder ``out``."""
    facts = {
        "first": curve.first,
        "second": curve.second,
        "aligned": curve.aligned,
        "places": curve.places,
        "losses": curve.losses,
        "barriers": curve.barriers,
    }
    with explain(f"{out} cannot be written", move="choose"):
        out.mkdir(parents=True, exist_ok=True)
        write_small(out / "path.json", (json.dumps(facts, indent=1) + "\n").encode())
        write_small(out / "path.html", _page(curve).encode())
    return [out / "path.json", out / "path.html"]


def _page(curve: Curve) -> str:
    x = np.array(curve.places, dtype=np.float64)
    lines = [
        Line(name, Series(x, np.array(values)), color=-1 if name == MEAN else i - 1, dots=True)
        for i, (name, values) in enumerate(curve.losses.items())
    ]
    chart = Chart(
        "held-out loss at (1 - t) A + t B",
        lines,
        note="barrier: " + ", ".join(f"{k} {v:.4f}" for k, v in curve.barriers.items()),
        tick=lambda value: f"{value:g}",
    )
    rows = [
        [f"{t:.3f}", *(f"{values[i]:.4f}" for values in curve.losses.values())]
        for i, t in enumerate(curve.places)
    ]
    ends = f"<p>A: {html.escape(curve.first)}<br>B: {html.escape(curve.second)}" + (
        ", its units and heads permuted to match A</p>" if curve.aligned else "</p>"
    )
    main = f"<h1>Between two checkpoints</h1>{ends}{draw(chart, 1)}"
    return page("llmtrain: between two checkpoints", main + html_table(["t", *curve.losses], rows))
