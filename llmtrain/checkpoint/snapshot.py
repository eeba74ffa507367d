"""Snapshots in a node's memory, for processes that are started again on the same nodes.

Every rank writes what it holds, as it holds it, to a file in the node's ``/dev/shm``, which
outlives the processes and not the machine. A run that comes back under the same layout goes on from
the newest step that every rank finds; otherwise checkpoints are what it has. Two steps are kept, so
that a kill in the middle of a write leaves one that all ranks have.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.scattered import Scattered
from llmtrain.errors import CheckpointError

SHARED_MEMORY = Path("/dev/shm")
_KEPT = 2


class Snapshots:
    """The snapshots of one run on this node.

    run: the run's folder. ranks: all of the run. course: what must be the same for a snapshot to
    be of use (layout, batch, data); anything that JSON can say. memory: instead of /dev/shm. Raises
    CheckpointError where that folder cannot be made.

    life: which beginning of the run snapshots are of and must be of: a node may hold some of a run
    that was deleted and begun anew on others.
    """

    life: str | None = None

    def __init__(
        self, run: Path, ranks: Ranks, course: Mapping[str, Any], memory: Path | None = None
    ) -> None:
        self._ranks = ranks
        name = hashlib.blake2b(str(run.resolve()).encode(), digest_size=8).hexdigest()
        self.folder = (memory or SHARED_MEMORY) / f"llmtrain-{os.getuid()}-{name}"
        self._course = _digest({**course, "ranks": ranks.size})
        ranks.reduce(self._open, lambda _: None)

    def _open(self) -> None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = self.folder.stat().st_uid
        except OSError as error:
            raise CheckpointError(
                f"checkpoint.snapshot_every: {self.folder} cannot be used ({error.strerror}); "
                "set it to null"
            ) from error
        if owner != os.getuid():  # anybody may make folders there
            raise CheckpointError(
                f"checkpoint.snapshot_every: {self.folder} belongs to another user; remove it"
            )

    def save(self, step: int, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> None:
        """Write this rank's part of ``tensors`` after update ``step``; no communication.

        extra: JSON values. Raises CheckpointError when the memory is full.
        """
        local = {name: _local(value).cpu().contiguous() for name, value in tensors.items()}
        facts = {"course": self._course, "life": str(self.life), "extra": json.dumps(extra)}
        final = self._file(step)
        beside = self._partial / final.name
        try:
            self._partial.mkdir(mode=0o700, parents=True, exist_ok=True)
            save_file(local, beside, facts)
            beside.rename(final)
        except (OSError, SafetensorError) as error:
            beside.unlink(missing_ok=True)
            raise CheckpointError(
                f"the snapshot of step {step} was not written to {self.folder} ({error}); free "
                "memory, or set checkpoint.snapshot_every=null"
            ) from error
        for old in self._steps()[:-_KEPT]:
            self._file(old).unlink(missing_ok=True)

    def newest(self) -> int | None:
        """The newest step that every rank has; None without one. Collective."""

        def common(found: list[list[int]]) -> int | None:
            steps = set(found[0]).intersection(*found[1:])
            return max(steps, default=None)

        return self._ranks.reduce(lambda: [s for s in self._steps() if self._fits(s)], common)

    def extra(self, step: int) -> dict[str, Any]:
        """The JSON values of a step."""
        with safe_open(self._file(step), "pt") as file:
            value = json.loads(file.metadata()["extra"])
        assert isinstance(value, dict)
        return value

    def load(self, step: int, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        """Fill this rank's part of ``tensors`` in place.

        Raises CheckpointError when the stored ones of such names are not the same ones.
        """
        with safe_open(self._file(step), "pt") as file, torch.no_grad():
            stored = {name for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
            if not set(tensors) <= stored:
                raise CheckpointError(f"{self._file(step)} holds other tensors; remove it")
            for name, value in tensors.items():
                local, found = _local(value), file.get_tensor(name)
                if (local.shape, local.dtype) != (found.shape, found.dtype):
                    raise CheckpointError(
                        f"{self._file(step)}: {name} has another shape; remove it"
                    )
                local.copy_(found)

    def clear(self) -> None:
        """Give the memory back: this rank's files, and the folder once it is empty."""
        for step in self._steps():
            self._file(step).unlink(missing_ok=True)
        shutil.rmtree(self._partial, ignore_errors=True)
        with suppress(OSError):
            self.folder.rmdir()

    @property
    def _partial(self) -> Path:
        """A folder of this rank's own: safetensors writes under names of its own choice there, and
        what a killed process leaves of them is found."""
        return self.folder / f"rank-{self._ranks.rank}.partial"

    def _file(self, step: int) -> Path:
        return self.folder / f"rank-{self._ranks.rank}-step-{step:08d}.safetensors"

    def _steps(self) -> list[int]:
        begin = f"rank-{self._ranks.rank}-step-"
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:  # another rank was the last to clear it
            return []
        mine = [n for n in names if n.startswith(begin) and n.endswith(".safetensors")]
        return sorted(int(name.removeprefix(begin).removesuffix(".safetensors")) for name in mine)

    def _fits(self, step: int) -> bool:
        try:
            with safe_open(self._file(step), "pt") as file:
                facts = file.metadata()
                return (facts["course"], facts["life"]) == (self._course, str(self.life))
        except (OSError, SafetensorError, KeyError, TypeError):
            return False


def _local(tensor: Tensor) -> Tensor:
    if isinstance(tensor, Scattered):
        return tensor.dense()
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _digest(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
