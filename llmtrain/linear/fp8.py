"""FP8 products: static scales (µnit Scaling), or one dynamic scale per tensor.

``mus_fp8`` (Narayan et al. 2025, 2502.05967, section 2.4): inputs and weights are clipped and cast
to e4m3, gradients to e5m2, all with scale 1. What keeps numbers in range is the parametrisation:
``Plan.scale``, its 1/sqrt(fan_in), multiplies the float32 sums of each product once. Gradients here
are those of a loss that is divided by the weight of the whole global batch, 1e-6 and below, where
e5m2 ends at 1.5e-5: they are multiplied by a constant before the cast, which the products divide
out again (``gradient_scale``; the paper does not say how its loss is normalised).

``fp8_current``: each tensor is divided by its largest magnitude over the format's first, so that
it fills the range whatever its own scale is (TransformerEngine's current scaling). The largest
magnitude is that of the whole tensor: tensor-parallel ranks that hold parts agree on it.

On CUDA, from compute capability 8.9, products run through ``torch._scaled_mm``, which reads both
operands along the dimension that is summed: transposed copies of weights, inputs and gradients
are made with the cast. Elsewhere the product is emulated exactly: the same casts, then a product
of the same numbers with float32 sums, rounded once to the compute dtype. Weights are rounded to
the compute dtype before the cast, as FSDP2 gathers them, so that every layout computes with the
same numbers.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from llmtrain.linear.matmul import ALONE, Matmul, matmul_for
from llmtrain.linear.operand import Operand, Packed, Reach
from llmtrain.ops import (
    E4M3,
    E5M2,
    FP8_MAX,
    fp8_cast,
    fp8_cast_transpose,
    fp8_transpose,
    fp8_uncast,
    fp8_weight,
    fp8_wgrad_,
)


class Fp8Matmul:
    """Products of FP8 operands, results in ``dtype``, float32 or bfloat16 (wgrad: float32).

    dynamic: one scale per tensor, taken from its largest magnitude; else scale 1, and
    ``gradient_scale`` for gradients.
    """

    packs = True

    def __init__(
        self, name: str, dtype: torch.dtype, dynamic: bool, gradient_scale: float = 1.0
    ) -> None:
        self.name, self.dtype, self.dynamic = name, dtype, dynamic
        self.gradient_scale = gradient_scale
        # Whether what a row comes to depends on the rows that are computed with it.
        self.whole_input = dynamic
        self.static = not dynamic
        self.plain, self.wide = matmul_for(dtype), matmul_for(torch.float32)

    def __repr__(self) -> str:
        return f"Fp8Matmul({self.name})"

    def operand(self, weight: Tensor, reach: Reach = ALONE) -> Packed:
        if self.static and weight.device.type == "cuda":
            values, across = fp8_weight(weight.detach(), self.dtype)
            return Packed(values, None, across)
        # dgrad on CUDA reads the transposed copy.
        return self._pack(weight.detach().to(self.dtype), E4M3, reach, True)

    def pack_input(self, x: Tensor, reach: Reach = ALONE, turned: bool = False) -> Packed:
        return self._pack(x, E4M3, reach, turned)

    def pack_grad(self, grad: Tensor, reach: Reach = ALONE, turned: bool = False) -> Packed:
        return self._pack(grad, E5M2, reach, turned, self.gradient_scale)

    def _pack(
        self, x: Tensor, dtype: torch.dtype, reach: Reach, turned: bool, factor: float = 1.0
    ) -> Packed:
        scale = None
        if self.dynamic:
            # Of zeros or of a tensor with infinities nothing is scaled; NaN stays NaN either way.
            largest = reach.largest(x)
            usual = (largest > 0) & largest.isfinite()
            scale = torch.where(usual, largest / FP8_MAX[dtype], 1.0)
            x = x.float() / scale
        if turned and x.device.type == "cuda":
            values, across = fp8_cast_transpose(x, dtype, factor)
            return Packed(values, scale, across)
        return Packed(fp8_cast(x, dtype, factor), scale)

    def fprop(self, x: Operand, weight: Operand, bias: Tensor | None, scale: float = 1.0) -> Tensor:
        a, b = _packed(x), _packed(weight)
        if _rows(a).device.type != "cuda":
            plain, first, second, factor = self._emulated(a, b, scale)
            return plain.fprop(first, second, bias, factor).to(self.dtype)
        inside = bias is not None and self.dtype == torch.bfloat16
        add = bias.to(self.dtype) if inside and bias is not None else None
        y = _product((_rows(a), _rows(b)), (a, b), scale, self.dtype, add, fast=True)
        return y if bias is None or inside else y.add_(bias)

    def dgrad(self, grad: Operand, weight: Operand, scale: float = 1.0) -> Tensor:
        scale /= self.gradient_scale
        a, b = _packed(grad), _packed(weight)
        if _rows(a).device.type != "cuda":
            plain, first, second, factor = self._emulated(a, b, scale)
            return plain.dgrad(first, second, factor).to(self.dtype)
        return _product((_rows(a), _columns(b)), (a, b), scale, self.dtype)

    def wgrad(
        self, grad: Operand, x: Operand, into: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        scale /= self.gradient_scale
        a, b = _packed(grad), _packed(x)
        if _rows(a).device.type != "cuda":
            plain, first, second, factor = self._emulated(a, b, scale)
            return plain.wgrad(first, second, into, factor)
        first, second = _columns(a), _columns(b)
        if into is not None and fp8_wgrad_(into, first, second, scale, a.scale, b.scale):
            return into
        product = _product((first, second), (a, b), scale, torch.float32)
        return product if into is None else into.add_(product)

    def _emulated(self, a: Packed, b: Packed, scale: float) -> tuple[Matmul, Tensor, Tensor, float]:
        """A plain matmul, the operands as it reads them, and the factor on their product."""
        if self.dynamic and torch.compiler.is_compiling():
            # A scale that is read as a number would break the graph.
            assert a.scale is not None and b.scale is not None
            first, second = fp8_uncast(_rows(a), torch.float32), fp8_uncast(_rows(b), torch.float32)
            return self.wide, first * a.scale, second * b.scale, scale
        # The compute dtype holds every FP8 number.
        first, second = fp8_uncast(_rows(a), self.dtype), fp8_uncast(_rows(b), self.dtype)
        return self.plain, first, second, scale * _factor(a, b)


def _packed(x: Operand) -> Packed:
    assert isinstance(x, Packed)
    return x


def _rows(x: Packed) -> Tensor:
    """As the matrix lies."""
    if x.values is None:
        assert x.turned is not None
        return fp8_transpose(x.turned)
    return x.values


def _columns(x: Packed) -> Tensor:
    """Transposed."""
    if x.turned is None:
        assert x.values is not None
        return fp8_transpose(x.values)
    return x.turned


def _factor(a: Packed, b: Packed) -> float:
    """What a product of the values has to be multiplied by."""
    factor = 1.0
    for x in (a, b):
        if x.scale is not None:
            factor *= float(x.scale)
    return factor


@cache
def _kept(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device)


def _constant(value: float, device: torch.device) -> Tensor:
    """A float32 on the device, made once: a new one in each call would cost a copy from the host,
    which a CUDA graph cannot record either (the step before its recording makes it). Compiled code
    fills one."""
    if torch.compiler.is_compiling():
        return torch.full((), value, dtype=torch.float32, device=device)
    return _kept(value, device)


def _product(
    operands: tuple[Tensor, Tensor],
    scaled: tuple[Packed, Packed],
    scale: float,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    fast: bool = False,
) -> Tensor:
    """scale a b^T of a [m, k] and b [n, k] on CUDA, k and n multiples of 16.

    fast: sums of lower precision, which is good enough in forward only.
    """
    a, b = operands
    first, second = (x.scale for x in scaled)
    constant = _constant(scale, a.device)
    scale_a = constant if first is None else first * constant
    scale_b = _constant(1.0, a.device) if second is None else second
    return torch._scaled_mm(
        a,
        b.t(),
        scale_a=scale_a,
        scale_b=scale_b,
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=fast,
    )


@cache
def fp8_matmul(name: str, dtype: torch.dtype, gradient_scale: float = 1.0) -> Matmul:
    """The FP8 format ``mus_fp8`` or ``fp8_current`` with results in ``dtype``.

    gradient_scale: of mus_fp8; a power of two.
    """
    dynamic = {"mus_fp8": False, "fp8_current": True}[name]
    return Fp8Matmul(name, dtype, dynamic, 1.0 if dynamic else gradient_scale)
