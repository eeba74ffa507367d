"""The checkpoints of a run, as the training loop sees them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import MetadataIndex

from llmtrain.checkpoint import finding, loading
from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.layout import VERSION
from llmtrain.checkpoint.saving import Plan, Save, Saved, make_plan, stage
from llmtrain.checkpoint.storage import TensorSavePlanner
from llmtrain.checkpoint.store import Store, latest
from llmtrain.config.upkeep import CheckpointConfig

T = TypeVar("T")
# A rank may have to wait this long for the slowest disk of the run.
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Resume:
    """Where to go on from: a verified checkpoint or None; skipped: faults of newer ones."""

    path: Path | None
    skipped: list[str] = field(default_factory=list)


class Checkpointer:
    """Saves and loads the state of one run, together over its ranks.

    root: ``RUN/checkpoints``. group: a gloo group over all ranks, used from the calling thread
    only; None for a single process. All ranks call every method in the same order (``busy`` and
    ``latest`` apart). At most one save is on its way: a second ``save`` first waits for the one
    before. Asynchronous saves keep one host copy of the pieces this rank writes, from save to
    save; synchronous ones copy nothing. The background thread talks over a gloo group of its own
    and so never mixes with the collectives of training. Also a context manager.

    Raises CheckpointError when the folder cannot be written or another run holds it.
    """

    def __init__(
        self, root: Path, cfg: CheckpointConfig, group: dist.ProcessGroup | None = None
    ) -> None:
        self.root = Path(root)
        self._cfg = cfg
        self._ranks = Ranks(group)
        self._background = self._ranks.aside(_PATIENCE)
        self._store = Store(self.root)
        self._plan: Plan | None = None
        self._save: Save | None = None
        self._buffers: dict[MetadataIndex, torch.Tensor] = {}
        self._ranks.on_main(self._store.open)

    def save(
        self,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        files: Mapping[str, str | bytes] | None = None,
        *,
        meta: Mapping[str, Any] | None = None,
        permanent: bool = False,
    ) -> None:
        """Save ``tensors``: DTensors, or plain tensors that are the same on all ranks.

        files: small files by name (config.yaml, data.json, ...); meta: JSON values for meta.json
        (tokens, samples, ...), to which step, world size, time and ``permanent`` are added; both
        are taken from the main rank. With ``checkpoint.asynchronous`` this returns once the state
        is copied to host memory, and the next ``poll``, ``wait`` or ``save`` raises what went
        wrong. Raises CheckpointError on all ranks alike; nothing half-written is left behind.
        """
        began = time.monotonic()
        self.wait()
        planner = TensorSavePlanner()
        planner.set_up_planner(
            {key: value.detach() for key, value in tensors.items()}, None, self._ranks.is_main
        )
        self._plan = plan = make_plan(self._ranks, planner, self._plan)
        facts = {
            **(meta or {}),
            "format": VERSION,
            "step": step,
            "world_size": self._ranks.size,
            "torch": str(torch.__version__),
            "permanent": permanent,
            "saved_at": time.time(),
        }
        small = {n: d.encode() if isinstance(d, str) else d for n, d in (files or {}).items()}
        source = planner
        if self._cfg.asynchronous:
            source = self._ranks_stage(plan, planner)
        folder = self._ranks.on_main(lambda: self._begin(step))
        save = Save(self._store, self._cfg.keep, folder, plan, source, small, facts)
        save.began = began
        self._save = save
        if self._cfg.asynchronous:
            save.start(self._background)
        else:
            save.run(self._background)
        save.stall_seconds = time.monotonic() - began
        if save.error is not None and not self._cfg.asynchronous:
            self.wait()

    def _begin(self, step: int) -> Path:
        self._store.make_room()
        return self._store.begin(step)

    @property
    def busy(self) -> bool:
        """True until a save has been collected by ``poll`` or ``wait``; the same on all ranks."""
        return self._save is not None

    def poll(self) -> Saved | None:
        """Collect a save that all ranks have finished; None while there is none.

        Cheap enough for every step: ranks communicate only while a save is on its way. Raises
        what the save ran into, on all ranks in the same call.
        """
        save = self._save
        if save is None or not self._ranks.all(save.is_done()):
            return None
        return self.wait()

    def wait(self) -> Saved | None:
        """Wait for the save on its way, if any, and return it; raises what it ran into."""
        save, self._save = self._save, None
        return save.result() if save is not None else None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """``close``, but a failing save does not displace an error that is already on its way."""
        try:
            self.close()
        except Exception:
            if error is None:
                raise

    def close(self) -> None:
        """Wait for the save on its way and release the folder; raises as ``wait`` does."""
        try:
            self.wait()
        finally:
            self._store.close()

    def latest(self) -> Path | None:
        """The newest checkpoint that passes the cheap checks; no communication."""
        return latest(self.root)

    def resolve(self, resume: str) -> Resume:
        """What ``checkpoint.resume`` means, with the checksums verified.

        ``auto``: the newest good checkpoint of this run; damaged ones are passed over and named
        in ``skipped``, to be printed. ``never``: none. A path: that checkpoint, or the newest
        good one of that run; CheckpointError when it is damaged, naming the file and the remedy.
        """
        if resume == "never":
            return Resume(None)
        if resume == "auto":
            return Resume(*finding.newest_good(self._ranks, self.root))
        return Resume(*finding.find(self._ranks, Path(resume).expanduser()))

    def verify(self, path: Path) -> None:
        """Read every file of a checkpoint, each on one rank, and compare the checksums.

        Raises CheckpointError naming the damaged file and the checkpoint to use instead.
        """
        finding.require_good(self._ranks, Path(path))

    def load(
        self,
        path: Path,
        tensors: Mapping[str, torch.Tensor],
        *,
        unused: Sequence[str] = (),
        cast: bool = False,
        verify: bool = True,
    ) -> None:
        """Read a checkpoint into ``tensors`` in place, whatever layout it was saved under.

        unused: prefixes of stored names that may stay unread (``("optim.",)`` for the model
        alone). cast: allow dtypes other than the stored ones. verify: read the checksums first;
        pass False for a path that ``resolve`` has just returned. Raises CheckpointError on all
        ranks, naming missing or unexpected tensors, other shapes or dtypes, and damaged files.
        """
        if verify:
            self.verify(path)
        loading.load_into(self._ranks, Path(path), tensors, unused, cast)

    def with_store(self, action: Callable[[Store], T]) -> T:
        """All ranks do something together in which the main one uses the folder."""
        return action(self._store)

    def set_aside(self, after: int) -> list[Path]:
        """Rename the checkpoints of later steps, when the run goes on from an earlier one."""
        return self._ranks.on_main(lambda: self._store.set_aside(after))

    def _ranks_stage(self, plan: Plan, planner: TensorSavePlanner) -> TensorSavePlanner:
        """The host copy, with running out of memory on one rank told to all."""
        copies: list[TensorSavePlanner] = []
        self._ranks.reduce(
            lambda: copies.append(stage(plan.final, planner, self._buffers)), lambda _: None
        )
        return copies[0]
