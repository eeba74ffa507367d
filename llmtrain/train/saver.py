"""Checkpoints of a run: what goes in beside the tensors, and where a run resumes."""

from __future__ import annotations

import json
import platform
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

import llmtrain
from llmtrain.checkpoint import Checkpointer, Resume, Saved, read_files
from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.layout import BASE
from llmtrain.checkpoint.remote import Copied, Mirror
from llmtrain.checkpoint.snapshot import Snapshots
from llmtrain.config import to_dict, to_yaml
from llmtrain.config.schema import RunConfig
from llmtrain.data.plan import DataPlan
from llmtrain.errors import CheckpointError
from llmtrain.parallel import World
from llmtrain.train.fitting import check_adapters_alike
from llmtrain.train.frozen import LeftOut


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from.

    step: updates made. samples: seen. extra: guard and hook states. skipped: what was wrong with
    newer checkpoints and snapshots that were passed over. chosen: the user named it, it is not
    simply the newest one of this run. snapshot: ``step`` is that of a snapshot in memory; the
    checkpoint at ``path`` is older. life: which beginning of the run the checkpoint is of.
    """

    path: Path
    step: int
    samples: int
    extra: dict[str, Any]
    skipped: list[str]
    chosen: bool = False
    snapshot: bool = False
    life: str | None = None


class Saver:
    """Saves and finds the checkpoints of one run. left_out: what they need not hold."""

    def __init__(self, cfg: RunConfig, plan: DataPlan, world: World, checkpointer: Checkpointer):
        self.cfg, self.plan, self.world, self.checkpointer = cfg, plan, world, checkpointer
        self._last: int | None = None
        self.left_out: LeftOut | None = None
        self._origin: str | None = None
        self._life: str | None = None
        # Read now: a file that goes away during the run must not cost the first checkpoint.
        self._tokenizer = plan.catalogue.tokenizer_files()
        self.mirror: Mirror | None = None
        if (place := cfg.checkpoint.remote) is not None:
            ranks = Ranks(world.cpu_group)
            self.mirror = Mirror(place, cfg.name, cfg.checkpoint.remote_keep, ranks)
        self.has_any = False
        self.snapshots: Snapshots | None = None
        if cfg.checkpoint.snapshot_every is not None:
            run = Path(cfg.out) / cfg.name
            self.snapshots = Snapshots(run, Ranks(world.cpu_group), _course(cfg, plan))

    def save(
        self, step: int, tensors: Mapping[str, Tensor], extra: dict[str, Any], permanent: bool
    ) -> None:
        """Checkpoint after update ``step``; all ranks call it. Raises CheckpointError."""
        samples = step * self.cfg.train.global_batch_size
        meta = {
            "samples": samples,
            "tokens": samples * self.cfg.data.seq_len,
            "origin": self._origin,
            "life": self._life,
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
        self._last, self.has_any = step, True

    def snap(self, step: int, tensors: Mapping[str, Tensor], extra: dict[str, Any]) -> str | None:
        """Snapshot after update ``step``. Returns why there is none on this rank, else None."""
        assert self.snapshots is not None
        try:
            self.snapshots.save(step, tensors, {**extra, "origin": self._origin})
        except CheckpointError as error:  # a snapshot is never worth the run
            return str(error)
        return None

    def close(self) -> None:
        """Give the memory of snapshots back: the run ends as it should."""
        if self.snapshots is not None:
            self.snapshots.clear()

    def has(self, step: int) -> bool:
        """Whether update ``step`` was saved by this process."""
        return self._last == step

    def poll(self) -> Saved | None:
        """A save that is on disk since the last call. Raises CheckpointError when it failed."""
        return self._copy(self.checkpointer.poll())

    def wait(self) -> Saved | None:
        """Until everything is on disk. Raises CheckpointError when that failed."""
        return self._copy(self.checkpointer.wait())

    def _copy(self, saved: Saved | None) -> Saved | None:
        if saved is not None and self.mirror is not None:
            self.mirror.push(saved.path, saved.step)
        return saved

    def copied(self, last: bool = False) -> list[Copied]:
        """Copies in the object store since the last call. last: wait for all."""
        if self.mirror is None:
            return []
        return self.mirror.finish() if last else self.mirror.poll()

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
        if self.mirror is not None and self.cfg.checkpoint.resume != "never":
            self.checkpointer.with_store(self.mirror.bring_home)
        resume, chosen = self._resolve()
        if resume.path is None or chosen:
            self._life = Ranks(self.world.cpu_group).on_main(lambda: secrets.token_hex(8))
            if self.snapshots is not None:
                self.snapshots.clear()  # of another course
                self.snapshots.life = self._life
        if resume.path is None:
            if resume.skipped:
                raise CheckpointError(
                    f"no checkpoint of this run can be used: {resume.skipped[0]}; start it anew "
                    "with checkpoint.resume=never, or give the path of another one"
                )
            return None
        point = resume_point(self.cfg, self.plan, resume.path, resume.skipped, chosen)
        self._last, self.has_any = point.step, True
        if chosen:
            return point
        self._life = point.life
        return self._newer_snapshot(point)

    def _newer_snapshot(self, point: ResumePoint) -> ResumePoint:
        """``point``, or a snapshot that is further on the same course."""
        if self.snapshots is None:
            return point
        self.snapshots.life = self._life
        step, damaged = self.snapshots.newest(point.step)
        point = replace(point, skipped=[*point.skipped, *damaged])
        if step is None:
            return point
        samples = step * self.cfg.train.global_batch_size
        extra = self.snapshots.extra(step)
        if extra.pop("origin") != self._origin:
            return point
        self._last = None
        return replace(point, step=step, samples=samples, extra=extra, snapshot=True)

    def loader(self, resume: ResumePoint) -> Callable[..., None]:
        """``Checkpointer.load``, or what stands for it where the state is a snapshot's."""
        if not resume.snapshot:
            return self.checkpointer.load
        step, snapshots = resume.step, self.snapshots
        assert snapshots is not None

        def load(path: Path, tensors: Mapping[str, Tensor], **options: Any) -> None:
            snapshots.load(step, tensors)

        return load


def _course(cfg: RunConfig, plan: DataPlan) -> dict[str, Any]:
    """What makes a state one of this run and layout."""
    return {
        "model": to_dict(cfg)["model"],
        "parallel": to_dict(cfg)["parallel"],
        "optimizer": cfg.optim.name,
        "seed": cfg.seed,
        "batch": (cfg.train.global_batch_size, cfg.data.seq_len),
        "data": plan.state(),
    }


def resume_point(
    cfg: RunConfig, plan: DataPlan, path: Path, skipped: list[str], chosen: bool
) -> ResumePoint:
    """The point to go on from at a verified checkpoint.

    Raises CheckpointError or DataError when the run's batches, adapters or data are not those it
    was made with.
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
    config = yaml.safe_load(files.get("config.yaml", b"")) or {}
    check_adapters_alike(path, config.get("model") or {}, cfg.model)
    plan.check_resume(json.loads(files["data.json"]), samples)
    extra, life = json.loads(files["extra.json"]), meta.get("life")
    return ResumePoint(path, step, samples, extra, skipped, chosen, life=life)
