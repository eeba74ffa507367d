"""What a layer knows of the tensor-parallel ranks it shares its matrices with."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from llmtrain.parallel.collectives import (
    copy_to_parallel,
    gather_last,
    gather_rows,
    reduce_from_parallel,
    reduce_scatter_rows,
    sum_together,
)
from llmtrain.parallel.uncompiled import uncompiled


@dataclass(frozen=True)
class TensorParallel:
    """A tensor-parallel group (Shoeybi et al. 2019, 1909.08053) and what it splits.

    sequence: between the matrix products, activations are split by tokens (sequence parallel,
    Korthikanti et al. 2022, 2205.05198). Tokens are split in the flattened [b s, ...] view, so
    no transposition is needed; their number is padded up to a multiple of ``size``.
    keep_gathered: column-parallel layers keep the gathered input for backward instead of
    gathering it again. kv_group: the ranks that share this rank's key/value head, where there
    are fewer heads than ranks.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    sequence: bool = True
    keep_gathered: bool = False
    kv_group: dist.ProcessGroup | None = None

    def enter(self, x: Tensor) -> Tensor:
        """All tokens, for a consumer whose weights are split: its input gradients are summed.

        sequence: [n / size, d] -> [n, d]; otherwise x itself.
        """
        return gather_rows(x, self.group) if self.sequence else copy_to_parallel(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """The sum over ranks of partial results [..., d]: this rank's tokens or all of them."""
        if not self.sequence:
            return reduce_from_parallel(x, self.group)
        return reduce_scatter_rows(pad_rows(x.reshape(-1, x.shape[-1]), self.size), self.group)

    def own(self, x: Tensor) -> Tensor:
        """This rank's rows of something [n, ...] that every rank has, padded as tokens are."""
        if not self.sequence:
            return x
        padded = pad_rows(x, self.size)
        share = len(padded) // self.size
        return padded[self.rank * share : (self.rank + 1) * share]

    def gather_vocabulary(self, logits: Tensor) -> Tensor:
        """Logits [..., v / size] of this rank's words -> [..., v]."""
        return gather_last(logits, self.group)


def pad_rows(x: Tensor, multiple: int) -> Tensor:
    """x [n, ...] with zero rows up to a multiple of ``multiple``."""
    extra = -len(x) % multiple
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, extra)) if extra else x


def local(param: Tensor, *, partial: bool = False) -> Tensor:
    """This rank's part of a parameter, for computing.

    partial: this rank's gradient is one summand of a replicated parameter's; the parameter's
    placement then carries the sum that is still owed (``finish_gradients``, FSDP2).
    """
    return _local_part(param, partial) if isinstance(param, DTensor) else param


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of any placement, on every rank. Collective over a DTensor's mesh."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# Not compiled: inductor refuses a DTensor among the inputs of a graph whose outputs are views.
@uncompiled
def _local_part(param: DTensor, partial: bool) -> Tensor:
    grads = [Partial() if partial and isinstance(p, Replicate) else p for p in param.placements]
    out: Tensor = param.to_local(grad_placements=grads)
    return out


def finish_gradients(params: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sum the gradients that are still partial over ``group``, in one float32 reduction."""
    owed = [p for p in params if isinstance(p.grad, DTensor) and _is_partial(p.grad)]
    if not owed:
        return
    sums = []
    for param in owed:
        assert isinstance(param.grad, DTensor)
        sums.append(param.grad.to_local().float())
    sum_together(sums, group)
    for param, summed in zip(owed, sums, strict=True):
        assert isinstance(param.grad, DTensor) and isinstance(param, DTensor)
        grad = summed.to(param.grad.dtype)
        param.grad = DTensor.from_local(grad, param.device_mesh, param.placements, run_check=False)


def _is_partial(tensor: DTensor) -> bool:
    return any(isinstance(p, Partial) for p in tensor.placements)
