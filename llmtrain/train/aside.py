"""Putting away what an earlier course of a run has left, before another begins in its folder.

Checkpoints are renamed (``Store.set_aside``); records go to ``RUN/abandoned-<n>``, which
``llmtrain report`` reads like a run. Nothing that was measured is lost.
"""

from __future__ import annotations

import shutil
from itertools import count
from pathlib import Path

from llmtrain.checkpoint import Checkpointer
from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.layout import parse_step
from llmtrain.checkpoint.store import explain
from llmtrain.parallel import World
from llmtrain.train.metrics import read_records
from llmtrain.train.saver import ResumePoint

METRICS = "metrics.jsonl"
_DESCRIPTION = (METRICS, "config.yaml", "plan.json")
# What belongs to a course as well but cannot be cut at a step.
_WHOLE = ("tensorboard", "wandb_id", "mlflow_id", "report.html")


def leave_behind(
    folder: Path, checkpointer: Checkpointer, resume: ResumePoint | None, world: World
) -> list[str]:
    """Put away what does not belong to the course that begins now; returns what to tell the user.

    folder: of the run. resume: where the course begins, None for step 0. Going on from the run's
    newest checkpoint is the same course, and nothing happens. All ranks call it. Raises
    CheckpointError when the folder cannot be written.
    """
    if resume is not None and not resume.chosen:
        return []
    step = None
    if resume is not None and resume.path.resolve().parent == checkpointer.root.resolve():
        step = parse_step(resume.path.name)
    moved = checkpointer.set_aside(-1 if step is None else step)
    records = Ranks(world.cpu_group).on_main(lambda: set_records_aside(folder, step))
    told = []
    if records is not None:
        told.append(f"the records of this run so far are kept in {records}")
    if moved:
        told.append(
            f"{len(moved)} checkpoints of its other course are now {moved[0].parent}/abandoned-*; "
            f"`llmtrain checkpoint prune {folder} --abandoned` deletes them"
        )
    return told


def set_records_aside(folder: Path, step: int | None) -> Path | None:
    """Keep the records that are about to be dropped in a new ``abandoned-<n>``; returns it.

    step: where the course begins, in this run; what was recorded up to there stays as well. None:
    all is taken away. Returns None when there is nothing to keep.
    """
    first = 0 if step is None else step + 1
    with explain(f"the records in {folder} cannot be put away"):
        if not any(record["step"] >= first for record in read_records(folder / METRICS)):
            return None
        target = next(p for n in count(1) if not (p := folder / f"abandoned-{n}").exists())
        target.mkdir()
        for name in _DESCRIPTION if step is not None else (*_DESCRIPTION, *_WHOLE):
            source = folder / name
            if source.exists():
                if step is None:
                    source.rename(target / name)
                else:
                    shutil.copy2(source, target / name)
    return target
