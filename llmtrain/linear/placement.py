"""Where the weight of a linear layer lies, and which collectives that calls for."""

from __future__ import annotations

from enum import Enum

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement as TensorPlacement


class Placement(Enum):
    """Layout of a linear layer's weight within its tensor-parallel group.

    REPLICATED: every rank holds the whole weight; no collective. Under sequence parallelism each
    takes its own tokens through it, and its gradient is a summand (``Plan.token_shard``).
    COLUMN: outputs are split (dim 0 of the weight, and the bias). Inputs are whole: gathered
    over the token shards before the product (sequence parallel) or already there; in backward
    the input's gradients are reduce-scattered, or all-reduced.
    ROW: inputs are split (dim 1 of the weight); the bias is whole. The products are partial sums:
    reduce-scattered to token shards, or all-reduced; in backward gradients are gathered.

    Data-parallel sharding (FSDP2) is not a placement: it gathers the weight before the layer
    runs, so the layer sees its whole tensor-parallel part.
    """

    REPLICATED = "replicated"
    COLUMN = "column"
    ROW = "row"

    @property
    def weight(self) -> TensorPlacement:
        """Placement of the weight [out, in] on the tensor dimension of the mesh."""
        dims = {Placement.COLUMN: 0, Placement.ROW: 1}
        return Shard(dims[self]) if self in dims else Replicate()

    @property
    def bias(self) -> TensorPlacement:
        """Placement of the bias [out] on the tensor dimension of the mesh."""
        return Shard(0) if self is Placement.COLUMN else Replicate()
