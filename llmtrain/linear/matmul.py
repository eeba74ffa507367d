"""The three products of a linear layer, in one number format each.

A ``Matmul`` is stateless. It works on local two-dimensional tensors: x [n, in], weight
[out, in], grad [n, out]; n is the number of tokens.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Matmul(Protocol):
    """fprop, dgrad and wgrad of y = x weight^T + bias in one number format.

    dtype: of the operands and of y. ``operand`` turns a parameter into what the products read.
    """

    name: str
    dtype: torch.dtype

    def operand(self, weight: Tensor) -> Tensor:
        """What fprop and dgrad read instead of ``weight``; ``weight`` itself where it fits."""
        ...

    def fprop(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """y [n, out] = x weight^T + bias, of ``dtype``."""
        ...

    def dgrad(self, grad: Tensor, weight: Tensor) -> Tensor:
        """Gradient of x: [n, in] = grad weight, of ``dtype``."""
        ...

    def wgrad(self, grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Gradient of the weight: [out, in] = grad^T x, as ``dtype``."""
        ...


class DenseMatmul:
    """Products of floating point operands in one dtype, accumulated in float32 by the library."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype

    def __repr__(self) -> str:
        return f"DenseMatmul({self.name})"

    def operand(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.dtype)

    def fprop(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, None if bias is None else bias.to(self.dtype))

    def dgrad(self, grad: Tensor, weight: Tensor) -> Tensor:
        return grad @ weight

    def wgrad(self, grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        return (grad.t() @ x).to(dtype)


FP32 = DenseMatmul("fp32", torch.float32)
BF16 = DenseMatmul("bf16", torch.bfloat16)


def matmul_for(dtype: torch.dtype) -> Matmul:
    """The plain matmul of a compute dtype: float32 or bfloat16."""
    found = {m.dtype: m for m in (FP32, BF16)}.get(dtype)
    if found is None:
        raise ValueError(f"no matmul computes in {dtype}")
    return found
