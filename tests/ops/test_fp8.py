"""Conversions to and from FP8 against the formats' definition, for every bf16 number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.kernel_sets import passes_on
from torch import Tensor

from llmtrain import ops
from llmtrain.ops import E4M3, E5M2
from llmtrain.ops.fp8 import fp8_cast_reference, fp8_transpose_reference

FORMATS = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
NATIVE = pytest.mark.skipif(not ops.native_loaded(), reason="the compiled kernels are not built")


def every_bf16() -> Tensor:
    """All 65,536 patterns."""
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def numbers(dtype: torch.dtype) -> Tensor:
    """The format's values of the codes 0, 1, 2 ... up to the largest finite one, in float64, from
    OCP's definition."""
    mantissa, bias, count = (3, 7, 0x7F) if dtype == E4M3 else (2, 15, 0x7C)
    codes = torch.arange(count, dtype=torch.float64)
    exponent, fraction = codes // 2**mantissa, codes % 2**mantissa / 2**mantissa
    normal = (1 + fraction) * 2 ** (exponent - bias)
    return torch.where(exponent == 0, fraction * 2.0 ** (1 - bias), normal)


def by_search(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes of ``x``: clip, then the nearest number, of two equally near the one of even code."""
    values = numbers(dtype)
    magnitude = (
        x.double()
        .abs()
        .contiguous()
        .nan_to_num(nan=0.0, posinf=torch.inf)
        .clamp(max=values[-1].item())
    )
    upper = torch.searchsorted(values, magnitude).clamp(1, len(values) - 1)
    lower = upper - 1
    below, above = magnitude - values[lower], values[upper] - magnitude
    up = (above < below) | ((above == below) & (upper % 2 == 0))
    code = torch.where(up, upper, lower) + 128 * torch.signbit(x).long()
    return torch.where(x.isnan(), 127, code).to(torch.uint8)


def ties(dtype: torch.dtype) -> Tensor:
    """The middles between neighbours, and the float32 numbers beside them, of both signs."""
    middles = ((numbers(dtype)[1:] + numbers(dtype)[:-1]) / 2).float()
    around = torch.cat(
        (
            middles,
            torch.nextafter(middles, torch.tensor(0.0)),
            torch.nextafter(middles, 2 * middles),
        )
    )
    return torch.cat((around, -around))


def inputs(dtype: torch.dtype) -> list[Tensor]:
    """Every bf16 number, and float32 numbers of every kind."""
    draw = torch.Generator().manual_seed(3)
    patterns = torch.randint(-(2**31), 2**31, (20_003,), generator=draw).int().view(torch.float32)
    spread = torch.randn(9_001, generator=draw) * torch.logspace(-8, 6, 9_001)
    return [every_bf16(), every_bf16().float(), patterns, spread, ties(dtype)]


def same_bytes(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape and a.is_contiguous()
    torch.testing.assert_close(a.view(torch.uint8), b.view(torch.uint8), rtol=0, atol=0)


@FORMATS
@pytest.mark.parametrize("cast", [ops.fp8_cast, fp8_cast_reference], ids=["fast", "reference"])
def test_cast_is_the_nearest_number(
    dtype: torch.dtype, cast: Callable[[Tensor, torch.dtype], Tensor]
) -> None:
    for x in inputs(dtype):
        y = cast(x, dtype)
        assert y.dtype == dtype
        same_bytes(y, by_search(x, dtype))


@FORMATS
def test_infinities_saturate_nan_stays_and_zeros_keep_their_sign(dtype: torch.dtype) -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan, 0.0, -0.0, 1e-40, -1e30])
    top = 0x7E if dtype == E4M3 else 0x7B
    expected = [top, top + 128, 127, 127, 0, 128, 0, top + 128]
    for value in (x, x.bfloat16()):
        assert ops.fp8_cast(value, dtype).view(torch.uint8).tolist() == expected


@FORMATS
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cast_back_is_exact(dtype: torch.dtype, to: torch.dtype) -> None:
    codes = torch.arange(256).to(torch.uint8)
    back = ops.fp8_uncast(codes.view(dtype), to)
    values = numbers(dtype)
    assert back.dtype == to
    assert torch.equal(back[: len(values)].double(), values)
    assert torch.equal(back[128 : 128 + len(values)].double(), -values)
    assert bool(torch.signbit(back[128]))
    beyond = back[len(values) : 128].tolist() + back[128 + len(values) :].tolist()
    if dtype == E5M2:
        assert beyond.pop(0) == torch.inf and beyond.pop(3) == -torch.inf
    assert torch.tensor(beyond).isnan().all()
    finite = back.isfinite()
    assert torch.equal(ops.fp8_cast(back[finite], dtype).view(torch.uint8), codes[finite])


@FORMATS
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("n", "m"),
    [(1, 1), (0, 5), (5, 0), (3, 130), (64, 64), (67, 61), (129, 2065), (16, 48), (300, 530)],
)
def test_cast_transpose(dtype: torch.dtype, to: torch.dtype, n: int, m: int) -> None:
    x = (torch.randn(n, m, generator=torch.Generator().manual_seed(n + m)) * 300).to(to)
    y, t = ops.fp8_cast_transpose(x, dtype)
    assert y.dtype == t.dtype == dtype and t.shape == (m, n)
    same_bytes(y, by_search(x, dtype))
    same_bytes(t, by_search(x.t(), dtype))
    same_bytes(ops.fp8_transpose(y), t)
    same_bytes(fp8_transpose_reference(y), t)


@pytest.mark.parametrize(("n", "m"), [(2112, 2048), (2049, 2080)], ids=["lines", "odd"])
def test_large_results_which_bypass_the_caches(n: int, m: int) -> None:
    draw = torch.Generator().manual_seed(n)
    x = torch.randn(n, m, generator=draw, dtype=torch.bfloat16).mul_(300)
    y, t = ops.fp8_cast_transpose(x, E4M3)
    same_bytes(y, ops.fp8_cast(x, E4M3))
    same_bytes(t, y.view(torch.uint8).t().contiguous().view(E4M3))
    same_bytes(ops.fp8_transpose(y), t)


@FORMATS
def test_views_of_any_kind(dtype: torch.dtype) -> None:
    """Transposed, every second element, starting off any boundary, of more dimensions, empty."""
    base = torch.randn(70, 90, generator=torch.Generator().manual_seed(1)).bfloat16() * 40
    flat = base.flatten()
    for x in (base.t(), base[:, ::2], base[3:, 7:50], base[1:].view(3, 23, 90), flat[1:], flat[:0]):
        same_bytes(ops.fp8_cast(x, dtype), by_search(x, dtype))
        if x.dim() == 2:
            y, t = ops.fp8_cast_transpose(x, dtype)
            same_bytes(y, by_search(x, dtype))
            same_bytes(t, by_search(x.t(), dtype))
    y = ops.fp8_cast(base, dtype)
    for z in (y.t(), y[:, ::2], y[3:, 7:50]):
        assert torch.equal(ops.fp8_uncast(z, torch.float32), z.float())
        assert torch.equal(ops.fp8_transpose(z).float(), z.float().t())
    assert ops.fp8_uncast(y[:0], torch.bfloat16).shape == (0, 90)


@NATIVE
def test_results_do_not_depend_on_threads() -> None:
    x = torch.randn(700, 333, generator=torch.Generator().manual_seed(2)).bfloat16()
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y, t = ops.fp8_cast_transpose(x, E4M3)
            outs.append((y, t, ops.fp8_cast(x, E4M3), ops.fp8_transpose(y)))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*outs, strict=True):
        same_bytes(a, b)


@NATIVE
def test_wrong_arguments_are_refused() -> None:
    kernels = torch.ops.llmtrain
    x = torch.randn(4, 6)
    with pytest.raises(RuntimeError, match="not contiguous"):
        kernels.fp8_cast(x.t(), False)
    with pytest.raises(RuntimeError, match="float32 or bfloat16 only"):
        kernels.fp8_cast(x.half(), False)
    with pytest.raises(RuntimeError, match="two dimensions"):
        kernels.fp8_cast_transpose(x[None], False)
    with pytest.raises(RuntimeError, match="wrong dtype"):
        kernels.fp8_uncast(x, False)


OTHER_SETS = """
import torch
from ops import test_fp8 as t
from llmtrain import ops
print(ops.kernels_line())
for dtype in (t.E4M3, t.E5M2):
    t.test_cast_is_the_nearest_number(dtype, ops.fp8_cast)
    for to in (torch.float32, torch.bfloat16):
        t.test_cast_back_is_exact(dtype, to)
        t.test_cast_transpose(dtype, to, 129, 2065)
"""


@NATIVE
@pytest.mark.parametrize("level", ["avx512", "avx2", "baseline"])
def test_other_instruction_sets(level: str) -> None:
    passes_on(level, OTHER_SETS)
