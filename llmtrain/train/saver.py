"""Checkpoints of a run: what goes in beside the tensors, and where a run resumes."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import llmtrain
from llmtrain.checkpoint import Checkpointer, Resume, Saved, read_files
from llmtrain.checkpoint.layout import BASE
from llmtrain.config import to_yaml
from llmtrain.config.schema import RunConfig
from llmtrain.data.plan import DataPlan
from llmtrain.errors import CheckpointError
from llmtrain.parallel import World
from llmtrain.train.frozen import LeftOut


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from.

    step: updates made. samples: seen. extra: guard and hook states. skipped: what was wrong with
    newer checkpoints that were passed over. chosen: the user named it, it is not simply the newest
    one of this run.
    """

    path: Path
    step: int
    samples: int
    extra: dict[str, Any]
    skipped: list[str]
    chosen: bool = False


class Saver:
    """Saves and finds the checkpoints of one run. left_out: what they need not hold."""

    def __init__(self, cfg: RunConfig, plan: DataPlan, world: World, checkpointer: Checkpointer):
        self.cfg, self.plan, self.world, self.checkpointer = cfg, plan, world, checkpointer
        self._last: int | None = None
        self.left_out: LeftOut | None = None
        self._origin: str | None = None
        # Read now: a file that goes away during the run must not cost the first checkpoint.
        self._tokenizer = plan.catalogue.tokenizer_files()

    def save(
        self, step: int, tensors: Mapping[str, Tensor], extra: dict[str, Any], permanent: bool
    ) -> None:
        """Checkpoint after update ``step``; all ranks call it. Raises CheckpointError."""
        samples = step * self.cfg.train.global_batch_size
        meta = {
            "samples": samples,
            "tokens": samples * self.cfg.data.seq_len,
            "origin": self._origin,
            "versions": {"llmtrain": llmtrain.__version__, "python": platform.python_version()},
        }
        files: dict[str, str | bytes] = {
            "config.yaml": to_yaml(self.cfg),
            "data.json": json.dumps(self.plan.state(), indent=1),
            "extra.json": json.dumps(extra),
        }
        files.update(self._tokenizer)
        if (left := self.left_out) is not None:
            tensors = {key: value for key, value in tensors.items() if key not in left.names}
            files[BASE] = left.base.text(self.checkpointer.root)
        self.checkpointer.save(step, tensors, files, meta=meta, permanent=permanent)
        self._last = step

    def has(self, step: int) -> bool:
        """Whether update ``step`` was saved by this process."""
        return self._last == step

    def poll(self) -> Saved | None:
        """A save that is on disk since the last call. Raises CheckpointError when it failed."""
        return self.checkpointer.poll()

    def wait(self) -> Saved | None:
        """Until everything is on disk. Raises CheckpointError when that failed."""
        return self.checkpointer.wait()

    def _resolve(self) -> tuple[Resume, bool]:
        """``checkpoint.resume``; a path is where this run began, not where it goes on for ever.

        Once the run has checkpoints of its own that go back to that path, the newest is taken,
        so that the same command may be run again after a preemption. Returned besides: whether
        it is the checkpoint that the user named.
        """
        wanted = self.cfg.checkpoint.resume
        if wanted in ("auto", "never"):
            return self.checkpointer.resolve(wanted), False
        self._origin = str(Path(wanted).expanduser().resolve())
        own = self.checkpointer.resolve("auto")
        if own.path is not None:
            meta = json.loads(read_files(own.path)["meta.json"])
            if meta.get("origin") == self._origin:
                return own, False
        return self.checkpointer.resolve(wanted), True

    def find(self) -> ResumePoint | None:
        """Where ``checkpoint.resume`` says to go on, or None for a fresh start.

        Raises CheckpointError or DataError when the run cannot go on from there.
        """
        resume, chosen = self._resolve()
        if resume.path is None:
            if resume.skipped:
                raise CheckpointError(
                    f"no checkpoint of this run can be used: {resume.skipped[0]}; start it anew "
                    "with checkpoint.resume=never, or give the path of another one"
                )
            return None
        point = resume_point(self.cfg, self.plan, resume.path, resume.skipped, chosen)
        self._last = point.step
        return point


def resume_point(
    cfg: RunConfig, plan: DataPlan, path: Path, skipped: list[str], chosen: bool
) -> ResumePoint:
    """The point to go on from at a verified checkpoint.

    Raises CheckpointError or DataError when the run's batches or data are not those it was made
    with.
    """
    files = read_files(path)
    meta = json.loads(files["meta.json"])
    step, samples = int(meta["step"]), int(meta["samples"])
    batch = cfg.train.global_batch_size
    if samples != step * batch:
        old = samples // max(step, 1)
        raise CheckpointError(
            f"train.global_batch_size: the checkpoint {path} was made with {old} and "
            f"the config says {batch}; resume with train.global_batch_size={old} (ranks and "
            "train.micro_batch_size may change)"
        )
    plan.check_resume(json.loads(files["data.json"]), samples)
    return ResumePoint(path, step, samples, json.loads(files["extra.json"]), skipped, chosen)
