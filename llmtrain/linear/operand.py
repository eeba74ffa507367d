"""What a product reads: a tensor, or one packed into a number format of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.parallel.collectives import all_gather, all_max, all_reduce, start_all_gather


class Packed(NamedTuple):
    """A matrix [n, k] in a number format that torch's products do not read by themselves.

    values: the numbers as they travel and as they are saved, such as FP8; None where only
    ``turned`` is still needed. scale: 0-dim float32 by which they have to be multiplied; None: 1.
    turned: values transposed, [k, n] contiguous, for hardware whose products want it; else None.
    Of a frozen weight they are the parts of ``linear.frozen.Parts``.
    """

    values: Tensor | None
    scale: Tensor | None = None
    turned: Tensor | None = None


Operand = Tensor | Packed
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Reach:
    """Over which ranks the statistics of an operand have to be taken to be those of the whole.

    whole: the ranks that hold parts of the matrix. rows: those that hold parts of each row; None
    where every rank has what it needs.
    """

    whole: dist.ProcessGroup | None = None
    rows: dist.ProcessGroup | None = None

    def largest(self, x: Tensor) -> Tensor:
        """max |x|, 0-dim float32; 0 of nothing. NaN where there is one."""
        own = x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
        return own if self.whole is None else all_max(own, self.whole)

    def largest_of_rows(self, x: Tensor) -> Tensor:
        """max |x| of each row of [n, k]: [n, 1] float32."""
        own = x.abs().amax(1, keepdim=True).float()
        return own if self.rows is None else all_max(own, self.rows)

    def mean(self, x: Tensor) -> Tensor:
        """mean |x|, 0-dim float32."""
        own = torch.stack((x.abs().sum(dtype=torch.float32), x.new_tensor(x.numel()).float()))
        total, count = own if self.whole is None else all_reduce(own, self.whole)
        mean: Tensor = total / count.clamp(min=1.0)
        return mean


def parts_of(operand: Operand | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The tensors of an operand, as autograd can save them."""
    return operand if isinstance(operand, Packed) else (operand, None, None)


def from_parts(
    packed: bool, values: Tensor | None, scale: Tensor | None, turned: Tensor | None
) -> Operand:
    """The inverse of ``parts_of``."""
    if packed:
        return Packed(values, scale, turned)
    assert values is not None
    return values


def plain(x: Operand, dtype: torch.dtype) -> Tensor:
    """The numbers of an operand as a tensor of ``dtype``, [n, k]."""
    if not isinstance(x, Packed):
        return x
    values = x.values if x.values is not None else x.turned
    assert values is not None
    numbers = (values if x.values is not None else values.t()).to(torch.float32)
    return (numbers if x.scale is None else numbers * x.scale).to(dtype)


def start_gather(x: Operand, group: dist.ProcessGroup) -> tuple[Operand, dist.Work]:
    """Rows of all ranks, begun: there after ``wait()``. FP8 travels as bytes.

    A scale must be the same on all ranks (``Reach``).
    """
    if not isinstance(x, Packed):
        return start_all_gather(x, group)
    assert x.values is not None
    values, dtype = x.values, x.values.dtype
    out, work = start_all_gather(values.view(torch.uint8) if dtype in _FP8 else values, group)
    return Packed(out.view(dtype), x.scale), work


def gather(x: Operand, group: dist.ProcessGroup) -> Operand:
    """Rows of all ranks, in rank order."""
    if not isinstance(x, Packed):
        return all_gather(x, group)
    out, work = start_gather(x, group)
    work.wait()
    return out


def first_rows(x: Operand, n: int) -> Operand:
    """The first ``n`` rows."""
    if not isinstance(x, Packed):
        return x[:n]
    assert x.values is not None
    return Packed(x.values[:n], x.scale)
