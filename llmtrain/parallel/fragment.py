"""State that is cut without regard to rows: runs of a tensor's row-major elements.

DeepSpeed's ZeRO flattens parameters and gives each rank a contiguous run of elements. DTensor
cannot say that; ``Fragment`` can, and speaks the protocol of torch.distributed.checkpoint, so that
each rank saves and loads its own elements in place and nobody holds a whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Piece:
    """A box of a tensor that this process holds: its offset, and its values (a live view)."""

    offset: tuple[int, ...]
    values: Tensor


def boxes_of_run(
    shape: Sequence[int], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes (offset, size) that make up elements [start, stop) of a row-major tensor, in order.

    At most 2 n - 1 boxes for n dimensions: a broken row, whole rows, a broken row.
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # within one row
        for offset, size in boxes_of_run(shape[1:], start - last * row, stop - last * row):
            yield (last, *offset), (1, *size)
        return
    if start < first * row:
        head = (first - 1) * row
        for offset, size in boxes_of_run(shape[1:], start - head, row):
            yield (first - 1, *offset), (1, *size)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if last * row < stop:
        for offset, size in boxes_of_run(shape[1:], 0, stop - last * row):
            yield (last, *offset), (1, *size)


class StateTensor(torch.Tensor):
    """A tensor of which this process holds boxes, in a form of its own.

    It speaks the protocol of torch.distributed.checkpoint. Only shape, dtype and device can be
    asked of it; other operations raise NotImplementedError, which says ``instead``.
    """

    instead: str

    def chunks(self) -> list[ChunkStorageMetadata]:
        """The boxes."""
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} on a {cls.__name__}; {cls.instead}")

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(self.dtype), self.shape),
            )
            for chunk in self.chunks()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return self.chunks()


class Fragment(StateTensor):
    """A tensor of ``shape`` of which this process holds elements [start, start + len(run)).

    run: 1-D, the live elements. local_shape, offset: when the run is cut from a box of the tensor
    and not from the tensor itself (a tensor-parallel shard), that box; elements count within it.
    ``pieces`` and ``run`` give the values.
    """

    instead = "use its pieces"
    pieces: list[Piece]
    run: Tensor
    _cut: tuple[tuple[int, ...], int, tuple[int, ...], tuple[int, ...]]

    @staticmethod
    def __new__(
        cls,
        run: Tensor,
        shape: Sequence[int],
        start: int,
        local_shape: Sequence[int] | None = None,
        offset: Sequence[int] | None = None,
    ) -> Fragment:
        whole = tuple(shape)
        box = whole if local_shape is None else tuple(local_shape)
        corner = tuple(0 for _ in whole) if offset is None else tuple(offset)
        made: Fragment = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(whole), dtype=run.dtype, device=run.device
        )
        made.pieces = []
        made.run, made._cut = run, (whole, start, box, corner)
        done = 0
        for place, size in boxes_of_run(box, start, start + run.numel()):
            count = math.prod(size)
            values = run[done : done + count].view(size)
            at = tuple(c + p for c, p in zip(corner, place, strict=True))
            made.pieces.append(Piece(at, values))
            done += count
        return made

    def around(self, run: Tensor) -> Fragment:
        """The same elements of another tensor of this shape, whose values are ``run``."""
        whole, start, box, corner = self._cut
        return Fragment(run, whole, start, box, corner)

    def chunks(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(piece.offset), piece.values.shape)
            for piece in self.pieces
        ]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Fragment({list(self.shape)}, {len(self.pieces)} pieces here)"

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        wanted = tuple(index.offset or ())
        return next(p.values for p in self.pieces if p.offset == wanted)


def local_boxes(tensor: Tensor) -> list[tuple[Tensor, tuple[int, ...]]]:
    """The boxes this process holds of a tensor of any layout: live values, offset in the whole."""
    if isinstance(tensor, Fragment):
        return [(piece.values, piece.offset) for piece in tensor.pieces]
    if not isinstance(tensor, DTensor):
        return [(tensor, (0,) * tensor.dim())]
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return [(tensor.to_local(), tuple(offset))]
