"""Tensors that are whole in a checkpoint and hold their kept values alone in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from llmtrain.parallel.fragment import StateTensor


class Scattered(StateTensor):
    """A tensor of ``shape`` whose ``kept`` values this process holds; ``dense`` makes it whole.

    spread: values -> the whole tensor, a copy. Saving makes one whole at a time, so that nobody
    holds all of them.
    """

    instead = "make it dense"
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

    def chunks(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size([0] * self.dim()), self.shape)]

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"Scattered({list(self.shape)}, {self.kept.numel()} values here)"

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.dense()
