"""torch.distributed.checkpoint storage on safetensors and JSON, without pickle.

``SafetensorsWriter`` and ``SafetensorsReader`` are ordinary DCP storage classes: DCP's planners
decide which rank writes which piece of which DTensor and what a rank must read under another
layout; these put the pieces in files. Only tensors are accepted.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from llmtrain.checkpoint.layout import (
    TENSORS,
    Chunk,
    TensorLayout,
    entry_name,
    layout_text,
    read_layout,
    shard_name,
)
from llmtrain.checkpoint.safefile import (
    ITEMSIZE,
    FileSum,
    HashingFile,
    build_header,
    read_header,
    write_small,
)
from llmtrain.checkpoint.scattered import Scattered
from llmtrain.checkpoint.tensors import DTYPES, dtype_name, read_box, tensor_bytes
from llmtrain.checkpoint.verify import cover_fault
from llmtrain.errors import CheckpointError


class TensorSavePlanner(DefaultSavePlanner):
    """DCP's save planner for a flat dict of tensors.

    A rank that owns no rows of a DTensor plans nothing for it: an empty chunk could carry the
    same offset as a real one and displace it when duplicates are removed.
    """

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """Pieces this rank holds."""
        plan = super().create_local_plan()
        items = []
        for item in plan.items:
            data = item.tensor_data
            if data is None:
                raise TypeError(f"{item.index.fqn} is not a tensor")
            dtype_name(data.properties.dtype, item.index.fqn)
            if math.prod(data.chunk.sizes) > 0 or math.prod(data.size) == 0:
                items.append(item)
        self.plan = replace(plan, items=items)
        return self.plan

    def held(self, item: WriteItem) -> torch.Tensor:
        """``resolve_data``, but what is ``Scattered`` stays so."""
        held = self.state_dict[item.index.fqn]
        data = held if isinstance(held, Scattered) else self.resolve_data(item)
        assert isinstance(data, torch.Tensor)
        return data


@dataclass(frozen=True)
class StoredChunk:
    """Where a piece went: file name in the checkpoint folder, and its checksum and size."""

    file: FileSum


class SafetensorsWriter(StorageWriter):
    """Writes this rank's pieces to ``<group>-<rank>-of-<ranks>.safetensors``.

    The group is the part of a tensor's name before the first dot (``model``, ``optim``). Files
    are flushed to the disk before ``write_data`` returns; ``finish`` checks that the pieces of
    all ranks cover every tensor once and writes tensors.json. ``sums`` lists this rank's files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sums: list[FileSum] = []

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new checkpoint, in another folder when one is given."""
        if checkpoint_id is not None:
            self.folder = Path(checkpoint_id)
        self.sums = []

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Local paths are fine."""
        return "://" not in str(checkpoint_id)

    def storage_meta(self) -> StorageMeta | None:
        """Name of the checkpoint, for DCP's logs."""
        return StorageMeta(checkpoint_id=self.folder)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Create the folder when DCP's own driver is used."""
        if is_coordinator:
            self.folder.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell every rank its number, which names its files."""
        return [replace(plan, storage_data=(rank, len(plans))) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write and flush this rank's pieces; raises OSError as the disk does."""
        rank, ranks = plan.storage_data
        groups: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            groups.setdefault(item.index.fqn.split(".", 1)[0], []).append(item)
        results: list[WriteResult] = []
        for group, items in groups.items():
            path = self.folder / shard_name(group, rank, ranks)
            results += self._write_file(path, items, planner)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Check the cover and write tensors.json; CheckpointError when a piece is missing."""
        files = {result.index: result.storage_data.file for part in results for result in part}
        tensors = {}
        for key, value in metadata.state_dict_metadata.items():
            if not isinstance(value, TensorStorageMetadata):
                raise TypeError(f"{key} is not a tensor")
            chunks = tuple(
                Chunk(
                    tuple(chunk.offsets),
                    tuple(chunk.sizes),
                    files[MetadataIndex(key, chunk.offsets)].name,
                )
                for chunk in value.chunks
            )
            layout = TensorLayout(
                dtype_name(value.properties.dtype, key), tuple(value.size), chunks
            )
            fault = cover_fault(layout)
            if fault is not None:
                raise CheckpointError(f"tensor {key} {fault}; the checkpoint was not written")
            tensors[key] = layout
        self.sums.append(write_small(self.folder / TENSORS, layout_text(tensors)))

    def _write_file(
        self, path: Path, items: list[WriteItem], planner: SavePlanner
    ) -> list[WriteResult]:
        # Wide dtypes first, so that every tensor is aligned for readers that map the file.
        items = sorted(items, key=lambda item: -ITEMSIZE[_item_dtype(item)])
        header, entries = build_header([_item_entry(item) for item in items])
        file = HashingFile(path)
        try:
            file.write(header)
            for item in items:
                data = planner.resolve_data(item)
                assert isinstance(data, torch.Tensor)
                file.write(tensor_bytes(data))
            done = file.finish()
        finally:
            file.close()
        self.sums.append(done)
        return [
            WriteResult(item.index, entry.end - entry.begin, StoredChunk(done))
            for item, entry in zip(items, entries, strict=True)
        ]


def _item_dtype(item: WriteItem) -> str:
    assert item.tensor_data is not None
    return dtype_name(item.tensor_data.properties.dtype, item.index.fqn)


def _item_entry(item: WriteItem) -> tuple[str, str, tuple[int, ...]]:
    data = item.tensor_data
    assert data is not None
    name = entry_name(item.index.fqn, data.chunk.offsets, data.chunk.sizes, data.size)
    return name, _item_dtype(item), tuple(data.chunk.sizes)


class SafetensorsReader(StorageReader):
    """Reads what ``SafetensorsWriter`` wrote, each rank only the rows it needs.

    Memory beyond the destination is at most one block of 16 MiB (or one row, when longer).
    Values are cast when the destination has another dtype; the caller decides whether it may.
    ``tensors`` is the stored layout once ``read_metadata`` has been called.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorLayout] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Read another folder."""
        if checkpoint_id is not None:
            self.folder = Path(checkpoint_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Local paths are fine."""
        return "://" not in str(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """DCP's view of tensors.json."""
        self.tensors = read_layout(self.folder)
        return Metadata(
            {
                key: TensorStorageMetadata(
                    TensorProperties(dtype=DTYPES[layout.dtype]),
                    torch.Size(layout.shape),
                    [
                        ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.shape))
                        for c in layout.chunks
                    ],
                )
                for key, layout in self.tensors.items()
            }
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to prepare: ``read_metadata`` has the places."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing to add."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planned parts of the destination tensors; CheckpointError on bad files."""
        per_file: dict[str, list[tuple[ReadItem, Chunk]]] = {}
        for item in plan.items:
            layout = self.tensors[item.storage_index.fqn]
            chunk = next(c for c in layout.chunks if c.offset == item.storage_index.offset)
            per_file.setdefault(chunk.file, []).append((item, chunk))
        for file, items in per_file.items():
            self._read_file(self.folder / file, items, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_file(
        self, path: Path, items: list[tuple[ReadItem, Chunk]], planner: LoadPlanner
    ) -> None:
        entries = read_header(path)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for item, chunk in items:
                key = item.storage_index.fqn
                layout = self.tensors[key]
                name = entry_name(key, chunk.offset, chunk.shape, layout.shape)
                entry = entries.get(name)
                if entry is None or (entry.dtype, entry.shape) != (layout.dtype, chunk.shape):
                    raise CheckpointError(f"{path} does not hold {name} as tensors.json says")
                target = planner.resolve_tensor(item).detach()
                read_box(descriptor, entry, item.storage_offsets, target, path)
                planner.commit_tensor(item, target)
        finally:
            os.close(descriptor)
