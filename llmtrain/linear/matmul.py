"""The three products of a linear layer, in one number format each.

A ``Matmul`` is stateless. It works on local two-dimensional tensors: x [n, in], weight
[out, in], grad [n, out]; n is the number of tokens. Formats that torch's products do not read
(FP8, fake quantisation) pack their operands first: what ``pack_input`` and ``pack_grad`` return
is what travels between tensor-parallel ranks and what is saved for backward.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.linear.operand import Operand, Reach
from llmtrain.ops import gemm_usable, product, weight_gradient

ALONE = Reach()
# Below so many rows packing a weight takes longer than multiplying with it.
FEW_ROWS = 16


class Matmul(Protocol):
    """fprop, dgrad and wgrad of y = scale x weight^T + bias in one number format.

    dtype: of the operands and of y. ``operand`` turns a parameter into what the products read.
    scale: a constant that each product is multiplied by before it is rounded to ``dtype``.
    packs: whether operands are ``Packed``. reach: the ranks that share an operand.
    """

    name: str
    dtype: torch.dtype
    packs: bool

    def operand(self, weight: Tensor, reach: Reach = ALONE) -> Operand:
        """What fprop and dgrad read instead of ``weight``; ``weight`` itself where it fits."""
        ...

    def pack_input(self, x: Tensor, reach: Reach = ALONE, turned: bool = False) -> Operand:
        """What fprop and wgrad read instead of ``x`` of ``dtype``; plain formats: ``x`` itself.

        turned: nothing is gathered before wgrad, so a transposed copy may be made right here.
        """
        ...

    def pack_grad(self, grad: Tensor, reach: Reach = ALONE, turned: bool = False) -> Operand:
        """What dgrad and wgrad read instead of ``grad`` of ``dtype``."""
        ...

    def fprop(self, x: Operand, weight: Operand, bias: Tensor | None, scale: float = 1.0) -> Tensor:
        """y [n, out] = scale x weight^T + bias, of ``dtype``."""
        ...

    def dgrad(self, grad: Operand, weight: Operand, scale: float = 1.0) -> Tensor:
        """Gradient of x: [n, in] = scale grad weight, of ``dtype``."""
        ...

    def wgrad(
        self, grad: Operand, x: Operand, into: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        """Gradient of the weight: [out, in] = scale grad^T x in float32, added to ``into`` if
        given."""
        ...


def _scaled_sum(product: Tensor, into: Tensor | None, scale: float) -> Tensor:
    """scale product, in place, or added to ``into``; both float32."""
    return product.mul_(scale) if into is None else into.add_(product, alpha=scale)


class DenseMatmul:
    """Products of floating point operands in one dtype, accumulated in float32 by the library.

    A scale is the library's alpha: it multiplies the float32 sums before they are rounded. To
    scale bfloat16 weights or results instead would round a second time, as 1/sqrt(fan_in) is
    seldom a power of two. Scale 1 takes the very calls of a layer that knows no scale.
    """

    packs = False

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype

    def __repr__(self) -> str:
        return f"DenseMatmul({self.name})"

    def operand(self, weight: Tensor, reach: Reach = ALONE) -> Tensor:
        # The parameter itself where it fits: ZeRO 3 frees it after forward and fills the same
        # tensor again for backward, so a product that saved an alias would keep the memory.
        return weight if weight.dtype == self.dtype else weight.detach().to(self.dtype)

    def pack_input(self, x: Tensor, reach: Reach = ALONE, turned: bool = False) -> Tensor:
        return x

    def pack_grad(self, grad: Tensor, reach: Reach = ALONE, turned: bool = False) -> Tensor:
        return grad

    def fprop(self, x: Operand, weight: Operand, bias: Tensor | None, scale: float = 1.0) -> Tensor:
        assert isinstance(x, Tensor) and isinstance(weight, Tensor)
        bias = None if bias is None else bias.to(self.dtype)
        if scale == 1.0:
            return F.linear(x, weight, bias)
        if bias is None:
            return self._scaled(x, weight.t(), scale)
        return torch.addmm(bias, x, weight.t(), alpha=scale)

    def dgrad(self, grad: Operand, weight: Operand, scale: float = 1.0) -> Tensor:
        assert isinstance(grad, Tensor) and isinstance(weight, Tensor)
        return grad @ weight if scale == 1.0 else self._scaled(grad, weight, scale)

    def wgrad(
        self, grad: Operand, x: Operand, into: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        assert isinstance(grad, Tensor) and isinstance(x, Tensor)
        if scale == 1.0:
            return weight_gradient(grad, x, into)
        return _scaled_sum(weight_gradient(grad, x), into, scale)

    @staticmethod
    def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
        """scale a b. With beta 0 the first operand is not read."""
        return torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scale)


class OneDNNMatmul(DenseMatmul):
    """Float32 products on the CPU through oneDNN instead of torch's default, MKL.

    On AMD processors MKL takes a slow path, and oneDNN is about twice as fast at the same
    precision; on Intel they are level.
    """

    def _product(self, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """a b^T + bias."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
        return out

    def _takes(self, x: Operand) -> bool:
        assert isinstance(x, Tensor)
        return x.device.type == "cpu" and x.numel() > 0 and not torch.compiler.is_compiling()

    def fprop(self, x: Operand, weight: Operand, bias: Tensor | None, scale: float = 1.0) -> Tensor:
        if not self._takes(x):
            return super().fprop(x, weight, bias, scale)
        assert isinstance(x, Tensor) and isinstance(weight, Tensor)
        if scale == 1.0:
            return self._product(x, weight, bias)
        # oneDNN's operator has no alpha; in float32 a second rounding is below its own error.
        y = self._product(x, weight).mul_(scale)
        return y if bias is None else y.add_(bias)

    def dgrad(self, grad: Operand, weight: Operand, scale: float = 1.0) -> Tensor:
        if not self._takes(grad):
            return super().dgrad(grad, weight, scale)
        assert isinstance(grad, Tensor) and isinstance(weight, Tensor)
        product = self._product(grad, weight.t())
        return product if scale == 1.0 else product.mul_(scale)

    def wgrad(
        self, grad: Operand, x: Operand, into: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        if not self._takes(grad):
            return super().wgrad(grad, x, into, scale)
        assert isinstance(grad, Tensor) and isinstance(x, Tensor)
        product = self._product(grad.t(), x.t())
        if scale != 1.0:
            return _scaled_sum(product, into, scale)
        return product if into is None else into.add_(product)


class NativeMatmul(OneDNNMatmul):
    """Float32 products on the CPU by ``ops.product``: 1.1 to 1.3 times as fast as oneDNN with AVX2,
    most so where the weight has to be turned; few rows (a token at a time) are left to oneDNN."""

    def _takes(self, x: Operand) -> bool:
        assert isinstance(x, Tensor)
        return super()._takes(x) and gemm_usable(x)

    def fprop(self, x: Operand, weight: Operand, bias: Tensor | None, scale: float = 1.0) -> Tensor:
        assert isinstance(x, Tensor) and isinstance(weight, Tensor)
        if not self._takes(x) or len(x) < FEW_ROWS:
            return super().fprop(x, weight, bias, scale)
        y = product(x, weight, scale)
        return y if bias is None else y.add_(bias)

    def dgrad(self, grad: Operand, weight: Operand, scale: float = 1.0) -> Tensor:
        assert isinstance(grad, Tensor) and isinstance(weight, Tensor)
        if not self._takes(grad) or len(grad) < FEW_ROWS:
            return super().dgrad(grad, weight, scale)
        return product(grad, weight.t(), scale)

    def wgrad(
        self, grad: Operand, x: Operand, into: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        assert isinstance(grad, Tensor) and isinstance(x, Tensor)
        if not self._takes(grad):
            return super().wgrad(grad, x, into, scale)
        return product(grad.t(), x.t(), scale, into)


class ThinMatmul(OneDNNMatmul):
    """The same for adapters: a weight gradient of few rows or columns goes through torch's default,
    as oneDNN would spend half of its time there on turning the operands."""

    def wgrad(
        self, grad: Operand, x: Operand, into: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        return DenseMatmul.wgrad(self, grad, x, into, scale)


FP32 = DenseMatmul("fp32", torch.float32)
FP32_ONEDNN = OneDNNMatmul("fp32 (oneDNN)", torch.float32)
FP32_NATIVE = NativeMatmul("fp32 (compiled)", torch.float32)
FP32_THIN = ThinMatmul("fp32 (oneDNN, thin)", torch.float32)
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

    Raises ValueError for any other dtype. Float32 goes through the compiled products on AMD
    processors with AVX2 and no AVX-512, and through oneDNN on others of AMD.
    """
    if dtype == torch.bfloat16:
        return BF16
    if dtype == torch.float32:
        if not _prefers_onednn():
            return FP32
        return FP32_NATIVE if gemm_usable(torch.empty(0, device="cpu")) else FP32_ONEDNN
    raise ValueError(f"no matmul computes in {dtype}; there are float32 and bfloat16")


def thin_matmul_for(dtype: torch.dtype) -> Matmul:
    """``matmul_for`` of an adapter's A and B."""
    found = matmul_for(dtype)
    return FP32_THIN if found is FP32_ONEDNN else found
