"""The tree of runs that left one trunk: what is recorded on disk, and its drawing.

A branch has ``branch.json`` in its folder; its trunk has ``branches/<name>.json`` that points to
it. Paths in both are relative to the file's folder, so a folder of runs may be moved as a whole.
"""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.report.numbers import NOTHING, fixed, short
from llmtrain.report.read import Run, lookup, number, read_run
from llmtrain.report.summary import mean_loss

BRANCH = "branch.json"
BRANCHES = "branches"
DEEPEST = 12  # branches of branches that are followed
ROW, LEFT, RIGHT, WIDTH = 26, 12, 270, 760


@dataclass(frozen=True)
class Limb:
    """A run in the tree. start, end: tokens at its branch point (0 for a trunk) and its end."""

    run: Run
    start: float
    end: float
    limbs: list[Limb] = field(default_factory=list)


def read_branch(run: Path) -> dict[str, Any] | None:
    """``branch.json`` of a run's folder; None where there is none that can be read."""
    try:
        found = json.loads((run / BRANCH).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_branch(run: Path, trunk: Path, record: dict[str, Any]) -> None:
    """Record that ``run`` leaves ``trunk``, in both folders. Raises OSError."""
    run.mkdir(parents=True, exist_ok=True)
    (trunk / BRANCHES).mkdir(exist_ok=True)
    _write(run / BRANCH, {"trunk": os.path.relpath(trunk, run), **record})
    away = os.path.relpath(run, trunk / BRANCHES)
    _write(trunk / BRANCHES / f"{run.name}.json", {"run": away})


def trunk_of(run: Path) -> Path | None:
    """The folder of the run that ``run`` branched from."""
    trunk = lookup(read_branch(run), "trunk")
    return Path(os.path.normpath(run / trunk)) if isinstance(trunk, str) else None


def branches_of(run: Path) -> list[Path]:
    """Folders of the runs that branched from ``run``, as far as they exist and have begun."""
    found = []
    for file in sorted((run / BRANCHES).glob("*.json")):
        try:
            away = lookup(json.loads(file.read_text(encoding="utf-8")), "run")
        except (OSError, ValueError):
            continue
        path = Path(os.path.normpath(file.parent / away)) if isinstance(away, str) else None
        if path is not None and read_branch(path) is not None and _has_begun(path):
            found.append(path)
    return found


def trees(runs: Sequence[Run]) -> list[Limb]:
    """The trees that ``runs`` belong to; a run without trunk or branches has none."""
    roots: dict[Path, Path] = {}
    for run in runs:
        root = run.path.resolve()
        for _ in range(DEEPEST):
            above = trunk_of(root)
            if above is None or not _has_begun(above):
                break
            root = above
        roots.setdefault(root.resolve(), root)
    found = [_limb(root, DEEPEST) for root in roots.values()]
    return [limb for limb in found if limb.limbs or read_branch(limb.run.path) is not None]


def draw_trees(runs: Sequence[Run]) -> str:
    """Every tree as a drawing over tokens, held-out loss beside each run; HTML, maybe empty."""
    own = {run.path.resolve() for run in runs}
    return "".join(_draw(limb, own) for limb in trees(runs))


def _has_begun(run: Path) -> bool:
    """Whether there is a run to read: a branch is recorded before its first step."""
    return (run / "metrics.jsonl").exists() or (run / "config.yaml").exists()


def _write(path: Path, value: dict[str, Any]) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)


def _limb(path: Path, depth: int) -> Limb:
    run = read_run(path)
    start = number(lookup(read_branch(path), "tokens"))
    end = max((number(r.get("tokens")) for r in run.steps), default=math.nan)
    start = start if math.isfinite(start) else 0.0
    limbs = [_limb(child, depth - 1) for child in branches_of(path)] if depth else []
    limbs.sort(key=lambda limb: (-limb.start, limb.run.name))
    return Limb(run, start, end if math.isfinite(end) else start, limbs)


def _rows(limb: Limb, parent: int = -1, count: int = 0) -> Iterator[tuple[Limb, int]]:
    """(run, row of its trunk), a run before its branches."""
    yield limb, parent
    mine, count = count, count + 1
    for child in limb.limbs:
        inner = list(_rows(child, mine, count))
        count += len(inner)
        yield from inner


def _draw(root: Limb, own: set[Path]) -> str:
    rows = list(_rows(root))
    last = max(limb.end for limb, _ in rows) or 1.0
    scale = (WIDTH - LEFT - RIGHT) / last
    height = ROW * len(rows) + 8
    parts = []
    for row, (limb, parent) in enumerate(rows):
        y, start, end = ROW * row + 17, LEFT + limb.start * scale, LEFT + limb.end * scale
        color = "c0" if limb.run.path.resolve() in own else "ink"
        if parent >= 0:
            above = ROW * parent + 17
            parts.append(
                f'<polyline class="line faint ink" points="{start:.1f},{above} {start:.1f},{y}"/>'
            )
        parts.append(
            f'<polyline class="line {color}" points="{start:.1f},{y} {end:.1f},{y}"/>'
            f'<circle class="dot {color}" cx="{end:.1f}" cy="{y}" r="3"/>'
            f'<text class="tick" x="{end + 8:.1f}" y="{y + 4}">{_label(limb)}</text>'
        )
    title = html.escape(f"Runs that left {root.run.name}, over tokens")
    return (
        f'<figure class="card"><figcaption>{title}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">{"".join(parts)}'
        "</svg><p class='note'>Beside each run: where it left, where it ended, and its last "
        "mean held-out loss.</p></figure>"
    )


def _label(limb: Limb) -> str:
    loss = mean_loss(limb.run)
    left = f"from {short(limb.start)} " if limb.start else ""
    text = f"{limb.run.name}: {left}to {short(limb.end)}"
    return html.escape(text + (f", {fixed(loss)}" if math.isfinite(loss) else f", {NOTHING}"))
