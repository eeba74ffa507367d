"""Fake quantisation: numbers rounded to few bits, products in the compute dtype.

What Scaling Laws for Precision (Kumar et al. 2024, 2411.04330, appendix) trains with, forward and,
where asked for, backward. Gradients pass the rounding unchanged (straight through).

=============  ===================================================================
number         how a matrix x is rounded
=============  ===================================================================
``int3``..16   s round(x / s), clamped to -2^(b-1) .. 2^(b-1) - 1; s = max|x| / (2^(b-1) - 1)
``eXmY``       a float of 1 + X + Y bits (3 to 16), scaled so that max|x| is its largest
               number; subnormals, no infinities. ``e4m3`` and ``e5m2`` here are those of OCP's
               FP8, ``e2m1`` its FP4 (exponents of at most 6 bits)
``ternary``    s times -1, 0 or 1: s = mean|x|, round(x / s) clamped (BitNet b1.58, Ma et al.
               2024, 2402.17764)
=============  ===================================================================

max|x| is of the whole matrix for inputs and gradients and of each row (output channel) for
weights, as in the paper; ``ternary`` takes the mean of the whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmtrain.linear.matmul import ALONE, Matmul, matmul_for
from llmtrain.linear.operand import Operand, Packed, Reach

Rounding = Callable[[Tensor], Tensor]
_INT = re.compile(r"int(\d+)")
_FLOAT = re.compile(r"e(\d+)m(\d+)")
# Largest numbers of the formats that spend codes on infinity or NaN.
_OCP = {(4, 3): 448.0, (5, 2): 57344.0}


def round_int(x: Tensor, bits: int, largest: Tensor) -> Tensor:
    """``x`` float32 rounded to ``bits`` with the scale of ``largest`` (broadcast)."""
    top = 2 ** (bits - 1) - 1
    scale = torch.where(largest > 0, largest, 1.0) / top
    rounded: Tensor = (x / scale).round().clamp(-top - 1, top) * scale
    return rounded


def round_float(x: Tensor, exponent: int, mantissa: int, largest: Tensor) -> Tensor:
    """``x`` float32 rounded to a float format, scaled so that ``largest`` is its largest number."""
    bias = 2 ** (exponent - 1) - 1
    top_exponent = 2**exponent - 1 - bias
    top = _OCP.get((exponent, mantissa), (2.0 - 2.0**-mantissa) * 2.0**top_exponent)
    scale = torch.where(largest > 0, largest / top, 1.0)
    y = (x / scale).clamp(-top, top)
    # frexp gives [0.5, 1) 2^e; the unit in the last place is fixed below the smallest normal.
    place = torch.frexp(y).exponent.clamp(min=2 - bias) - 1 - mantissa
    rounded: Tensor = (y * _power(-place)).round() * _power(place) * scale
    return rounded


def _power(exponent: Tensor) -> Tensor:
    """2^exponent of int32 in -126 .. 127, exactly."""
    return ((exponent + 127) << 23).view(torch.float32)


def round_ternary(x: Tensor, mean: Tensor) -> Tensor:
    """``x`` float32 rounded to -mean, 0 or mean."""
    scale = torch.where(mean > 0, mean, 1.0)
    return (x / scale).round().clamp(-1, 1) * scale


def fake_quantize(x: Tensor, number: str, reach: Reach = ALONE, by_row: bool = False) -> Tensor:
    """``x`` [n, k] rounded to ``number`` and back, in its own dtype. by_row: a scale per row."""
    if number == "none" or x.numel() == 0:
        return x
    wide = x.float()
    if number == "ternary":
        return round_ternary(wide, reach.mean(x)).to(x.dtype)
    largest = reach.largest_of_rows(x) if by_row else reach.largest(x)
    if match := _INT.fullmatch(number):
        return round_int(wide, int(match[1]), largest).to(x.dtype)
    match = _FLOAT.fullmatch(number)
    assert match is not None
    return round_float(wide, int(match[1]), int(match[2]), largest).to(x.dtype)


class _RoundVectors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, number: str) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if number != "ternary":
            return fake_quantize(flat, number, by_row=True).view(x.shape)
        wide = flat.float()
        rounded = round_ternary(wide, wide.abs().mean(1, keepdim=True))
        return rounded.to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def fake_vectors(x: Tensor, number: str) -> Tensor:
    """``x`` [..., d] rounded to ``number`` and back with a scale per vector; gradients pass
    unchanged. For keys and values: no layout divides a vector of one head and token."""
    out: Tensor = _RoundVectors.apply(x, number)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True)
class Numbers:
    """Number formats of the three operands; "none": the compute dtype."""

    weights: str = "none"
    inputs: str = "none"
    gradients: str = "none"


class FakeMatmul:
    """Products in ``dtype`` of operands rounded to ``numbers``."""

    packs = True

    def __init__(self, numbers: Numbers, dtype: torch.dtype) -> None:
        self.name = f"fake w {numbers.weights}, x {numbers.inputs}, g {numbers.gradients}"
        self.numbers, self.dtype = numbers, dtype
        # Whether what a row comes to depends on the rows that are computed with it.
        self.whole_input = numbers.inputs != "none"
        self.plain: Matmul = matmul_for(dtype)

    def __repr__(self) -> str:
        return f"FakeMatmul({self.name})"

    def operand(self, weight: Tensor, reach: Reach = ALONE) -> Packed:
        rounded = weight.detach().to(self.dtype)
        return Packed(fake_quantize(rounded, self.numbers.weights, reach, by_row=True))

    def pack_input(self, x: Tensor, reach: Reach = ALONE, turned: bool = False) -> Packed:
        return Packed(fake_quantize(x, self.numbers.inputs, reach))

    def pack_grad(self, grad: Tensor, reach: Reach = ALONE, turned: bool = False) -> Packed:
        return Packed(fake_quantize(grad, self.numbers.gradients, reach))

    def fprop(self, x: Operand, weight: Operand, bias: Tensor | None, scale: float = 1.0) -> Tensor:
        return self.plain.fprop(_values(x), _values(weight), bias, scale)

    def dgrad(self, grad: Operand, weight: Operand, scale: float = 1.0) -> Tensor:
        return self.plain.dgrad(_values(grad), _values(weight), scale)

    def wgrad(
        self, grad: Operand, x: Operand, into: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        return self.plain.wgrad(_values(grad), _values(x), into, scale)


def _values(x: Operand) -> Tensor:
    assert isinstance(x, Packed) and x.values is not None
    return x.values


@cache
def fake_matmul(numbers: Numbers, dtype: torch.dtype) -> Matmul:
    """Fake quantisation with products in ``dtype``."""
    return FakeMatmul(numbers, dtype)
