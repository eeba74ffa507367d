"""One save: planned together, copied to the host, written by every rank, published by rank 0."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.layout import CHECKSUMS, META, checksums_text
from llmtrain.checkpoint.safefile import FileSum, write_small
from llmtrain.checkpoint.scattered import Scattered
from llmtrain.checkpoint.storage import SafetensorsWriter, TensorSavePlanner
from llmtrain.checkpoint.store import Store, explain, latest
from llmtrain.errors import CheckpointError

Written = tuple[list[WriteResult], list[FileSum]]


@dataclass(frozen=True)
class Saved:
    """A published checkpoint.

    bytes: its size over all ranks. stall_seconds: how long ``save`` held up this rank. seconds:
    from the call until it was published. note: a sentence when old ones could not be
    pruned, or others of later steps (left from a run that was started over) were put away.
    """

    step: int
    path: Path
    bytes: int
    stall_seconds: float
    seconds: float
    note: str | None = None


@dataclass(frozen=True)
class Plan:
    """Who writes what. local: what this rank holds; final: what it writes, duplicates removed.

    metadata: all pieces of all tensors, on the main rank only.
    """

    local: SavePlan
    final: SavePlan
    metadata: Metadata | None


def make_plan(ranks: Ranks, planner: TensorSavePlanner, cached: Plan | None) -> Plan:
    """Agree on who writes what; ``cached`` is returned while no rank holds anything else.

    Raises CheckpointError for a dtype that cannot be stored.
    """
    local: list[SavePlan] = []

    def own() -> bool:
        local.append(planner.create_local_plan())
        return cached is not None and cached.local.items == local[0].items

    if ranks.reduce(own, all):
        assert cached is not None
        return cached
    metadata: list[Metadata] = []

    def merge(plans: list[SavePlan]) -> list[SavePlan]:
        _check_same(plans)
        merged, description = planner.create_global_plan(plans)
        metadata.append(description)
        return SafetensorsWriter(Path()).prepare_global_plan(merged)

    final = ranks.scatter(lambda: local[0], merge)
    return Plan(local[0], final, metadata[0] if metadata else None)


def _check_same(plans: list[SavePlan]) -> None:
    """Copies of a piece on several ranks must agree in shape and dtype: one of them is kept."""
    seen: dict[MetadataIndex, tuple[Any, ...]] = {}
    for plan in plans:
        for item in plan.items:
            data = item.tensor_data
            assert data is not None
            facts = (data.size, data.chunk.sizes, data.properties.dtype)
            if seen.setdefault(item.index, facts) != facts:
                raise ValueError(f"ranks disagree on {item.index.fqn}: {seen[item.index]}, {facts}")


class HostCopy(TensorSavePlanner):
    """Hands the writer the host copies of a plan's pieces instead of the live tensors."""

    def __init__(self, copies: dict[MetadataIndex, torch.Tensor]) -> None:
        super().__init__()
        self._copies = copies

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The copy of one piece."""
        copy = self._copies[write_item.index]
        return copy.dense() if isinstance(copy, Scattered) else copy


def stage(
    plan: SavePlan, planner: TensorSavePlanner, buffers: dict[MetadataIndex, torch.Tensor]
) -> HostCopy:
    """Copy the pieces this rank will write (no others) to host memory.

    buffers: kept by the caller from one save to the next, because fresh memory costs more than
    the copy (page faults; page-locking, which CUDA tensors need for a fast copy).
    """
    pieces = {item.index: planner.held(item) for item in plan.items}
    for index in buffers.keys() - pieces.keys():
        del buffers[index]
    for index, piece in pieces.items():
        data = piece.kept if isinstance(piece, Scattered) else piece
        buffer = buffers.get(index)
        if buffer is None or (buffer.shape, buffer.dtype) != (data.shape, data.dtype):
            buffer = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.is_cuda)
            buffers[index] = buffer
        buffer.copy_(data.detach(), non_blocking=True)
    if any(buffer.is_pinned() for buffer in buffers.values()):
        torch.cuda.synchronize()
    return HostCopy(
        {
            index: piece.around(buffers[index]) if isinstance(piece, Scattered) else buffers[index]
            for index, piece in pieces.items()
        }
    )


class Save:
    """A save on its way. ``run`` does the work; then ``error`` or ``saved`` says how it went.

    began, stall_seconds: when ``Checkpointer.save`` was called (monotonic clock) and for how long
    it held up training; the caller knows both.
    """

    def __init__(
        self,
        store: Store,
        keep: int,
        folder: Path,
        plan: Plan,
        source: TensorSavePlanner,
        files: Mapping[str, bytes],
        meta: Mapping[str, Any],
    ) -> None:
        self.step = int(meta["step"])
        self.error: Exception | None = None
        self.saved: Saved | None = None
        self.stall_seconds = 0.0
        self.began = time.monotonic()
        self._store, self._keep, self._folder = store, keep, folder
        self._plan, self._source = plan, source
        self._files, self._meta = files, meta
        self._thread: threading.Thread | None = None

    def start(self, ranks: Ranks) -> None:
        """Run in the background; ``ranks`` must not be used by anybody else meanwhile."""
        # A daemon: a run that dies by an exception must not wait for a disk or another rank.
        self._thread = threading.Thread(
            target=self.run, args=(ranks,), name="checkpoint", daemon=True
        )
        self._thread.start()

    def is_done(self) -> bool:
        """True when this rank has nothing left to do."""
        return self._thread is None or not self._thread.is_alive()

    def result(self) -> Saved | None:
        """Wait for the end; raises what the save ran into."""
        if self._thread is not None:
            self._thread.join()
        if self.error is not None:
            raise self.error
        return self.saved and replace(self.saved, stall_seconds=self.stall_seconds)

    def run(self, ranks: Ranks) -> None:
        """Write this rank's files; the main rank publishes when all have. Never raises."""
        try:
            self.saved = ranks.reduce(self._write, self._publish)
        except Exception as error:
            self.error = error
            if ranks.is_main:
                self._store.discard(self._folder)
        finally:
            self._source = HostCopy({})

    def _write(self) -> Written:
        writer = SafetensorsWriter(self._folder)
        with self._explain():
            results = writer.write_data(self._plan.final, self._source).wait()
        return results, writer.sums

    def _publish(self, parts: list[Written]) -> Saved:
        assert self._plan.metadata is not None
        sums = [entry for _, part in parts for entry in part]
        missing = [entry.name for entry in sums if not (self._folder / entry.name).exists()]
        if missing:
            raise CheckpointError(
                f"{self._folder} lacks {missing[0]}, which another rank wrote: `out` must be on a "
                "file system that all nodes share"
            )
        with self._explain():
            writer = SafetensorsWriter(self._folder)
            writer.finish(self._plan.metadata, [results for results, _ in parts])
            sums += writer.sums
            small = {**self._files, META: json.dumps(self._meta, indent=1).encode()}
            sums += [write_small(self._folder / name, data) for name, data in small.items()]
            write_small(self._folder / CHECKSUMS, checksums_text(sums))
            path = self._store.publish(self._folder, self.step)
        note = self._tidy()
        seconds = time.monotonic() - self.began
        return Saved(self.step, path, sum(s.bytes for s in sums), 0.0, seconds, note)

    def _tidy(self) -> str | None:
        """Put away another course's later checkpoints and prune; a sentence when there is news.

        The checkpoint is published by now, so that failing here must not fail the save.
        """
        try:
            moved = self._store.set_aside(after=self.step)
            self._store.prune(self._keep, trusted=self.step)
        except CheckpointError as error:
            return str(error)
        if not moved:
            return None
        names = ", ".join(path.name for path in moved)
        return f"checkpoints of later steps belong to another course of this run; now {names}"

    def _explain(self) -> explain:
        root = self._store.root
        good = latest(root)
        after = f"the last good one, {good.name}, is untouched" if good else "there is none before"
        return explain(f"the checkpoint of step {self.step} was not written to {root}", after)
