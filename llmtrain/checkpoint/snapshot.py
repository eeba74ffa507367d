"""Snapshots in a node's memory, for processes that are started again on the same nodes.

Every rank writes what it holds, as it holds it, to a file in the node's ``/dev/shm``, which
outlives the processes and not the machine. A run that comes back under the same layout goes on from
the newest step that every rank finds whole; otherwise checkpoints are what it has. Two steps are
kept, so that a kill in the middle of a write leaves one that all ranks have. A file's name ends
with its checksum, taken while it is written.
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
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.safefile import ITEMSIZE, HashingFile, build_header, hash_file
from llmtrain.checkpoint.scattered import Scattered
from llmtrain.checkpoint.tensors import dtype_name, tensor_bytes
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
        self._whole: dict[int, Path] = {}
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
        facts = {"course": self._course, "life": str(self.life), "extra": json.dumps(extra)}
        beside = self._partial / f"step-{step:08d}"
        try:
            self._partial.mkdir(mode=0o700, parents=True, exist_ok=True)
            beside.unlink(missing_ok=True)
            digest = _write(beside, tensors, facts)
            final = self.folder / f"{self._begin}{step:08d}-{digest}.safetensors"
            beside.rename(final)
        except (OSError, CheckpointError) as error:
            beside.unlink(missing_ok=True)
            raise CheckpointError(
                f"the snapshot of step {step} was not written to {self.folder} ({error}); free "
                "memory, or set checkpoint.snapshot_every=null"
            ) from error
        # Later ones are of a course that was not gone on with.
        older = sorted(s for s in {self._step(file) for file in self._files()} if s < step)
        kept = {step, *older[1 - _KEPT :]}
        for file in self._files():
            if file != final and (self._step(file) == step or self._step(file) not in kept):
                file.unlink(missing_ok=True)

    def newest(self, above: int = -1) -> tuple[int | None, list[str]]:
        """The newest step after ``above`` that every rank has, and what is damaged. Collective.

        The step is None without one. Every file after ``above`` is read once.
        """

        def own() -> tuple[set[int], list[str]]:
            faults = []
            self._whole.clear()
            for file in self._files():
                if self._step(file) > above:
                    if fault := _damage(file):
                        faults.append(fault)
                    elif self._fits(file):
                        self._whole[self._step(file)] = file
            return set(self._whole), faults

        def common(found: list[tuple[set[int], list[str]]]) -> tuple[int | None, list[str]]:
            steps = set.intersection(*(whole for whole, _ in found))
            return max(steps, default=None), [fault for _, faults in found for fault in faults]

        return self._ranks.reduce(own, common)

    def extra(self, step: int) -> dict[str, Any]:
        """The JSON values of a step that ``newest`` found."""
        with safe_open(self._whole[step], "pt") as file:
            value = json.loads(file.metadata()["extra"])
        assert isinstance(value, dict)
        return value

    def load(self, step: int, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        """Fill this rank's part of ``tensors`` in place, from a step that ``newest`` found.

        Raises CheckpointError when the stored ones of such names are not the same ones.
        """
        path = self._whole[step]
        with safe_open(path, "pt") as file, torch.no_grad():
            stored = {name for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
            if not set(tensors) <= stored:
                raise CheckpointError(f"{path} holds other tensors; remove it")
            for name, value in tensors.items():
                local, found = _local(value), file.get_tensor(name)
                if (local.shape, local.dtype) != (found.shape, found.dtype):
                    raise CheckpointError(f"{path}: {name} has another shape; remove it")
                local.copy_(found)

    def clear(self) -> None:
        """Give the memory back: this rank's files, and the folder once it is empty."""
        for file in self._files():
            file.unlink(missing_ok=True)
        shutil.rmtree(self._partial, ignore_errors=True)
        with suppress(OSError):
            self.folder.rmdir()

    @property
    def _partial(self) -> Path:
        """A folder of this rank's own, so that what a killed process leaves is found."""
        return self.folder / f"rank-{self._ranks.rank}.partial"

    @property
    def _begin(self) -> str:
        return f"rank-{self._ranks.rank}-step-"

    def _files(self) -> list[Path]:
        """This rank's snapshots, in no order."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:  # another rank was the last to clear it
            return []
        mine = [n for n in names if n.startswith(self._begin) and n.endswith(".safetensors")]
        return [self.folder / name for name in mine]

    def _step(self, file: Path) -> int:
        return int(file.name.removeprefix(self._begin).split("-")[0].split(".")[0])

    def _fits(self, file: Path) -> bool:
        try:
            with safe_open(file, "pt") as opened:
                facts = opened.metadata()
                return (facts["course"], facts["life"]) == (self._course, str(self.life))
        except (OSError, SafetensorError, KeyError, TypeError):
            return False


def _write(path: Path, tensors: Mapping[str, Tensor], facts: dict[str, str]) -> str:
    """Write a safetensors file of what this process holds, one tensor at a time; its checksum."""
    layout = [(k, dtype_name(v.dtype, k), tuple(_local_shape(v))) for k, v in tensors.items()]
    # Wide dtypes first, so that every tensor is aligned for readers that map the file.
    layout.sort(key=lambda one: -ITEMSIZE[one[1]])
    file = HashingFile(path)
    try:
        file.write(build_header(layout, facts)[0])
        for name, _, _ in layout:
            data = tensor_bytes(_local(tensors[name]))
            if len(data):  # a rank may own no rows
                file.write(data)
        return file.finish().digest
    finally:
        file.close()


def _damage(file: Path) -> str | None:
    """What is wrong with the bytes of a snapshot, as a sentence."""
    try:
        if hash_file(file) == file.stem.rpartition("-")[2]:
            return None
    except OSError as error:
        return f"the snapshot {file} cannot be read ({error.strerror}) and is passed over"
    return f"the snapshot {file} does not fit its checksum (damaged memory) and is passed over"


def _local(tensor: Tensor) -> Tensor:
    if isinstance(tensor, Scattered):
        return tensor.dense()
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_shape(tensor: Tensor) -> torch.Size:
    return tensor.shape if isinstance(tensor, Scattered) else _local(tensor).shape


def _digest(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
