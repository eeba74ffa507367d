"""Tensors that are whole in a checkpoint and hold their kept values alone in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class Scattered(torch.Tensor):
    """A tensor of ``shape`` whose ``kept`` values this process holds; ``dense`` makes it whole.

    spread: values -> the whole tensor, a copy. Only shape, dtype and device can be asked of it, and
    it can be saved: one is made whole at a time, so that nobody holds all of them.
    """

    kept: Tensor
    spread: Callable[[Tensor], Tensor]

    @staticmethod
    def __new__(
        cls, values: Tensor, shape: Sequence[int], spread: Callable[[Tensor], Tensor]
    ) -> Scattered:
        made: Scattered = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=values.dtype, device=values.device
        )
        made.kept, made.spread = values, spread
        return made

    def around(self, values: Tensor) -> Scattered:
        """The same places of another tensor of this shape, whose values are ``values``."""
        return Scattered(values, self.shape, self.spread)

    def dense(self) -> Tensor:
        """The whole tensor."""
        return self.spread(self.kept)

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
        raise NotImplementedError(f"{func} on a Scattered; make it dense")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Scattered({list(self.shape)}, {self.kept.numel()} values here)"

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        chunk = self.__create_chunk_list__()[0]
        facts = TensorWriteData(chunk, TensorProperties(self.dtype), self.shape)
        return [
            WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=facts)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size([0] * self.dim()), self.shape)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.dense()
