"""Conversions to and from FP8 (OCP's e4m3fn and e5m2), alone or with the transposed copy.

To FP8 means clip, then cast: clipped to the largest finite number (448 or 57344), rounded to
nearest even. Infinities become the largest number, as in the clip-and-cast of µnit Scaling
(Narayan et al. 2025, section 2.4) and in the saturating conversions of the hardware; NaN stays
NaN (0x7f, whatever its sign was), and the sign of zero is kept. An overflow is therefore not
seen in the result: what watches for infinities has to look at the input.

Clipping comes first always: what torch's own cast does with numbers that are too large differs
between its versions, formats and devices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain.ops.cuda import cuda_kernels, cuda_usable
from llmtrain.ops.native import kernels, traceable

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Largest finite number, smallest normal number, smallest number above zero.
FP8_MAX = {E4M3: 448.0, E5M2: 57344.0}
FP8_MIN_NORMAL = {E4M3: 2.0**-6, E5M2: 2.0**-14}
FP8_MIN = {E4M3: 2.0**-9, E5M2: 2.0**-16}


def fp8_cast_reference(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``fp8_cast`` in plain PyTorch."""
    y = x.clamp(-FP8_MAX[dtype], FP8_MAX[dtype]).to(dtype).view(torch.uint8)
    return y.masked_fill(x.isnan(), 0x7F).contiguous().view(dtype)


def fp8_transpose_reference(x: Tensor) -> Tensor:
    """``fp8_transpose`` in plain PyTorch."""
    return x.view(torch.uint8).t().contiguous().view(x.dtype)


def fp8_cast(x: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """``factor`` times ``x`` [...] of float32 or bfloat16 in ``dtype``, E4M3 or E5M2; contiguous.

    factor: a power of two, so that the product is not rounded.
    """
    if cuda_usable(x):
        y: Tensor = cuda_kernels().fp8_cast(x.contiguous(), dtype == E5M2, factor)
        return y
    x = x if factor == 1.0 else x * factor
    if not traceable(x):
        return fp8_cast_reference(x, dtype)
    out: Tensor = kernels().fp8_cast(x.contiguous(), dtype == E5M2)
    return out


def fp8_cast_transpose(x: Tensor, dtype: torch.dtype, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """``fp8_cast`` of ``x`` [n, m], and that transposed, [m, n]; both contiguous, x read once."""
    pair: tuple[Tensor, Tensor]
    if cuda_usable(x):
        pair = cuda_kernels().fp8_cast_transpose(x.contiguous(), dtype == E5M2, factor)
        return pair
    x = x if factor == 1.0 else x * factor
    if not traceable(x):
        y = fp8_cast_reference(x, dtype)
        return y, fp8_transpose_reference(y)
    pair = kernels().fp8_cast_transpose(x.contiguous(), dtype == E5M2)
    return pair


def fp8_weight(weight: Tensor, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights [n, m] of float32, rounded to ``compute``, in e4m3, and that transposed: what the
    products of a step read, made once. On CUDA the weights are read once and nothing else is
    written."""
    master = weight.dtype == torch.float32 and compute == torch.bfloat16
    if master and cuda_usable(weight):
        pair: tuple[Tensor, Tensor] = cuda_kernels().fp8_weight(weight.contiguous())
        return pair
    return fp8_cast_transpose(weight.to(compute), E4M3)


def _takes_bytes(x: Tensor) -> bool:
    return traceable(x.new_empty(0, dtype=torch.float32)) and x.dtype in FP8_MAX


def fp8_uncast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """FP8 ``x`` [...] in ``dtype``, float32 or bfloat16: exact, contiguous."""
    if not _takes_bytes(x) or dtype not in (torch.float32, torch.bfloat16):
        return x.to(dtype).contiguous()
    out: Tensor = kernels().fp8_uncast(x.contiguous(), dtype == torch.bfloat16)
    return out


def fp8_transpose(x: Tensor) -> Tensor:
    """FP8 ``x`` [n, m] transposed, [m, n] contiguous."""
    if x.is_cuda and cuda_usable(x.new_empty(0, dtype=torch.float32)):
        y: Tensor = cuda_kernels().fp8_transpose(x.contiguous())
        return y
    if not _takes_bytes(x):
        return fp8_transpose_reference(x)
    out: Tensor = kernels().fp8_transpose(x.contiguous())
    return out
