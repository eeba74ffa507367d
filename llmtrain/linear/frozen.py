"""Frozen weights in few bits: packed once, unpacked for each product and never stored unpacked.

QLoRA (Dettmers et al. 2023, 2305.14314, section 3) for ``nf4``; every format splits a weight
[out, in] by rows without a remainder, and by columns in multiples of ``columns``, so that any
rank's part can be packed and unpacked by itself.

=============  ==================================================================  ==============
format         numbers                                                             bytes a weight
=============  ==================================================================  ==============
``bf16``       bfloat16                                                            2
``fp8``        e4m3 (OCP) times a float32 of each row, which makes max|row| 448    1 + 4 / in
``int8``       round(x / s), s = max|row| / 127                                    1 + 4 / in
``nf4``        one of 16 quantiles of a normal distribution (``NF4``) times        0.5625
               max|block| of 64 in a row
``nf4_double`` the same, max|block| as a byte: round(255 x / max of the row)       0.5156 + 4 / in
=============  ==================================================================  ==============

QLoRA's double quantisation takes blocks of 256 scales across rows and an 8-bit float; here a row
is a block, so that parts of a weight do not depend on the layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from llmtrain.linear.matmul import ALONE, Matmul, matmul_for
from llmtrain.linear.operand import Operand, Packed, Reach

FORMATS = ("bf16", "fp8", "int8", "nf4", "nf4_double")
BLOCK = 64
# QLoRA, appendix E. Positive numbers: quantiles of 8 equal steps of probability from 1/2 to
# 1 - (1/30 + 1/32) / 2, negative ones of 7 steps, divided by the largest.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


class Parts(NamedTuple):
    """A packed weight as it is stored. codes: [out, in / per_code]. scales: float32 as the bits of
    an int32, or bytes; None in bf16. rows: float32 bits of nf4_double's scales of scales, [out, 1].

    Integers, as FSDP2 casts no integers to the compute dtype.
    """

    codes: Tensor
    scales: Tensor | None = None
    rows: Tensor | None = None


@dataclass(frozen=True)
class Frozen:
    """A format by its name. columns: what a rank's number of columns must be a multiple of."""

    name: str

    @property
    def columns(self) -> int:
        return BLOCK if self.name.startswith("nf4") else 1

    def empty(self, n_out: int, n_in: int) -> Parts:
        """Uninitialised parts of a weight [n_out, n_in]."""
        if self.name == "bf16":
            return Parts(torch.empty(n_out, n_in, dtype=torch.bfloat16))
        row = torch.empty(n_out, 1, dtype=torch.int32)
        if not self.name.startswith("nf4"):
            return Parts(torch.empty(n_out, n_in, dtype=torch.uint8), row)
        codes = torch.empty(n_out, n_in // 2, dtype=torch.uint8)
        blocks = (n_out, n_in // BLOCK)
        if self.name == "nf4":
            return Parts(codes, torch.empty(blocks, dtype=torch.int32))
        return Parts(codes, torch.empty(blocks, dtype=torch.uint8), row)

    def pack(self, weight: Tensor) -> Parts:
        """weight [n, in] of whole rows, any float dtype."""
        if self.name == "bf16":
            return Parts(weight.to(torch.bfloat16))
        weight = weight.float()
        if self.name == "int8":
            scale = _nonzero(weight.abs().amax(1, keepdim=True)) / 127
            return Parts((weight / scale).round().to(torch.int8).view(torch.uint8), _bits(scale))
        if self.name == "fp8":
            scale = _nonzero(weight.abs().amax(1, keepdim=True)) / 448
            codes = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            return Parts(codes.view(torch.uint8), _bits(scale))
        blocks = weight.reshape(len(weight), -1, BLOCK)
        largest = blocks.abs().amax(2)
        scales, rows = _bits(largest), None
        if self.name == "nf4_double":
            top = _nonzero(largest.amax(1, keepdim=True))
            scales, rows = (largest / top * 255).round().to(torch.uint8), _bits(top)
        table = torch.tensor(NF4, device=weight.device)
        numbers = (blocks / _nonzero(_scales(scales, rows))[:, :, None]).flatten(1)
        codes = torch.bucketize(numbers, (table[1:] + table[:-1]) / 2).to(torch.uint8)
        return Parts(codes[:, 0::2] << 4 | codes[:, 1::2], scales, rows)

    def unpack(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        """The weight [n, in], rounded once to ``dtype``."""
        codes, scales, rows = parts
        if scales is None:
            return codes.to(dtype)
        if not self.name.startswith("nf4"):
            kind = torch.int8 if self.name == "int8" else torch.float8_e4m3fn
            return codes.view(kind).float().mul_(_scales(scales, rows)).to(dtype)
        pairs = _pairs(codes.device).index_select(0, codes.flatten().int())
        blocks = pairs.view(len(codes), -1, BLOCK).mul_(_scales(scales, rows)[:, :, None])
        return blocks.flatten(1).to(dtype)

    def part(self, whole: Parts, first: int, n: int) -> Parts:
        """Columns [first, first + n) of a packed weight of whole rows."""
        codes, scales, rows = whole
        per_code = 2 if self.columns > 1 else 1
        codes = codes.narrow(1, first // per_code, n // per_code)
        if scales is not None and self.columns > 1:
            scales = scales.narrow(1, first // BLOCK, n // BLOCK)
        return Parts(codes, scales, rows)


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)


def _bits(scale: Tensor) -> Tensor:
    return scale.contiguous().view(torch.int32)


def _scales(scales: Tensor, rows: Tensor | None) -> Tensor:
    """float32 of the stored scales."""
    if rows is None:
        return scales.view(torch.float32)
    return scales.float() * (rows.view(torch.float32) / 255)


@cache
def _pairs(device: torch.device) -> Tensor:
    """[256, 2] float32: the numbers of both halves of a byte of nf4, the upper first."""
    table = torch.tensor(NF4, device=device)
    return torch.stack((table.repeat_interleave(16), table.repeat(16)), 1)


class FrozenMatmul:
    """Products with a frozen weight: unpacked for fprop and once more for dgrad, results in
    ``dtype``. There is no wgrad."""

    packs = True

    def __init__(self, form: Frozen, dtype: torch.dtype) -> None:
        self.name, self.form, self.dtype = f"{form.name} weights", form, dtype
        self.plain: Matmul = matmul_for(dtype)

    def __repr__(self) -> str:
        return f"FrozenMatmul({self.form.name}, {self.dtype})"

    def weight(self, operand: Operand) -> Tensor:
        """The numbers of a packed weight."""
        assert isinstance(operand, Packed) and operand.values is not None
        return self.form.unpack(Parts(operand.values, operand.scale, operand.turned), self.dtype)

    def operand(self, weight: Tensor, reach: Reach = ALONE) -> Operand:
        raise AssertionError("a frozen weight is packed when it is loaded")

    def pack_input(self, x: Tensor, reach: Reach = ALONE, turned: bool = False) -> Operand:
        return x

    def pack_grad(self, grad: Tensor, reach: Reach = ALONE, turned: bool = False) -> Operand:
        return grad

    def fprop(self, x: Operand, weight: Operand, bias: Tensor | None, scale: float = 1.0) -> Tensor:
        return self.plain.fprop(x, self.weight(weight), bias, scale)

    def dgrad(self, grad: Operand, weight: Operand, scale: float = 1.0) -> Tensor:
        return self.plain.dgrad(grad, self.weight(weight), scale)

    def wgrad(
        self, grad: Operand, x: Operand, into: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        raise AssertionError("a frozen weight has no gradient")


@cache
def frozen_matmul(name: str, dtype: torch.dtype) -> FrozenMatmul:
    """The products of a frozen format with results in ``dtype``."""
    return FrozenMatmul(Frozen(name), dtype)
