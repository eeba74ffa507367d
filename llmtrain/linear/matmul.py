"""The three products of a linear layer, in one number format each.

A ``Matmul`` is stateless. It works on local two-dimensional tensors: x [n, in], weight
[out, in], grad [n, out]; n is the number of tokens.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.ops import weight_gradient


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

    def wgrad(self, grad: Tensor, x: Tensor, into: Tensor | None = None) -> Tensor:
        """Gradient of the weight: [out, in] = grad^T x in float32, added to ``into`` if given."""
        ...


class DenseMatmul:
    """Products of floating point operands in one dtype, accumulated in float32 by the library."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype

    def __repr__(self) -> str:
        return f"DenseMatmul({self.name})"

    def operand(self, weight: Tensor) -> Tensor:
        # The parameter itself where it fits: ZeRO 3 frees it after forward and fills the same
        # tensor again for backward, so a product that saved an alias would keep the memory.
        return weight if weight.dtype == self.dtype else weight.detach().to(self.dtype)

    def fprop(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, None if bias is None else bias.to(self.dtype))

    def dgrad(self, grad: Tensor, weight: Tensor) -> Tensor:
        return grad @ weight

    def wgrad(self, grad: Tensor, x: Tensor, into: Tensor | None = None) -> Tensor:
        return weight_gradient(grad, x, into)


class OneDNNMatmul(DenseMatmul):
    """Float32 products on the CPU through oneDNN instead of torch's default, MKL.

    On AMD processors MKL takes a slow path, and oneDNN is about twice as fast at the same
    precision; on Intel they are level.
    """

    def _product(self, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """a b^T + bias."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
        return out

    def _takes(self, x: Tensor) -> bool:
        return x.device.type == "cpu" and x.numel() > 0 and not torch.compiler.is_compiling()

    def fprop(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._product(x, weight, bias) if self._takes(x) else super().fprop(x, weight, bias)

    def dgrad(self, grad: Tensor, weight: Tensor) -> Tensor:
        if not self._takes(grad):
            return super().dgrad(grad, weight)
        return self._product(grad, weight.t())

    def wgrad(self, grad: Tensor, x: Tensor, into: Tensor | None = None) -> Tensor:
        if not self._takes(grad):
            return super().wgrad(grad, x, into)
        product = self._product(grad.t(), x.t())
        return product if into is None else into.add_(product)


FP32 = DenseMatmul("fp32", torch.float32)
FP32_ONEDNN = OneDNNMatmul("fp32 (oneDNN)", torch.float32)
BF16 = DenseMatmul("bf16", torch.bfloat16)


@cache
def _prefers_onednn() -> bool:
    # By vendor and not by a measurement: the same machine must always get the same bits.
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return amd and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def matmul_for(dtype: torch.dtype) -> Matmul:
    """The plain matmul of a compute dtype: float32 or bfloat16.

    Raises ValueError for any other dtype. Float32 goes through oneDNN on AMD processors.
    """
    if dtype == torch.bfloat16:
        return BF16
    if dtype == torch.float32:
        return FP32_ONEDNN if _prefers_onednn() else FP32
    raise ValueError(f"no matmul computes in {dtype}; there are float32 and bfloat16")
