"""Masked products against dense-masked float64, in every format and granularity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmtrain.linear import (
    BF16,
    FP32,
    Linear,
    Mask,
    MaskedMatmul,
    Matmul,
    Numbers,
    fake_matmul,
    fp8_matmul,
    matmul_for,
)
from llmtrain.sparsity import parse_granularity, random_kept

FORMATS = {
    "fp32": (matmul_for(torch.float32), 2e-6),
    "plain fp32": (FP32, 2e-6),
    "bf16": (BF16, 1e-2),
}


def _mask(text: str, density: float, shape: tuple[int, int]) -> Mask:
    granularity = parse_granularity(text)
    return Mask(random_kept(granularity, density, shape, (1, "w")), granularity.block, shape)


def _close(ours: Tensor, reference: Tensor, tolerance: float) -> None:
    error = (ours.double() - reference).norm()
    assert error <= tolerance * reference.norm(), error


def _run(layer: Linear, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.clone().requires_grad_()
    layer.weight.grad = None
    y = layer(x)
    y.backward(upstream.to(y.dtype))
    assert x.grad is not None and layer.weight.grad is not None
    return y.detach(), x.grad, layer.weight.grad


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("text", "density", "shape"),
    [
        ("unstructured", 0.0, (13, 21)),
        ("unstructured", 0.3, (13, 21)),
        ("unstructured", 1.0, (13, 21)),
        ("1x2", 0.5, (13, 22)),
        ("4x4", 0.25, (15, 21)),
        ("8x2", 0.5, (16, 30)),
        ("16x16", 0.5, (33, 50)),
        ("64x64", 0.5, (128, 128)),
        ("2:4", 0.5, (13, 24)),
        ("2:4t", 0.5, (12, 24)),
    ],
)
def test_products_and_gradients(
    name: str, text: str, density: float, shape: tuple[int, int]
) -> None:
    matmul, tolerance = FORMATS[name]
    mask = _mask(text, density, shape)
    layer = Linear(shape[1], shape[0], matmul=matmul)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():  # not zero outside the mask
        layer.weight.copy_(torch.randn(shape, generator=draw))
    layer.set_mask(mask)
    x, upstream = torch.randn(7, shape[1], generator=draw), torch.randn(7, shape[0], generator=draw)
    y, dx, dw = _run(layer, x, upstream)
    whole = mask.box((0, 0), shape)
    weight = layer.weight.detach().double() * whole
    _close(y, x.double() @ weight.t(), tolerance)
    _close(dx, upstream.double() @ weight, tolerance)
    _close(dw, (upstream.double().t() @ x.double()) * whole, tolerance)
    # Zeros are +0.0: a sparse format would store -0.0.
    assert (dw[~whole].view(torch.int32) == 0).all()


@pytest.mark.parametrize(
    "matmul",
    [
        fp8_matmul("mus_fp8", torch.float32),
        fp8_matmul("fp8_current", torch.float32),
        fake_matmul(Numbers("int6", "int8", "e5m2"), torch.float32),
    ],
    ids=str,
)
def test_rounded_formats_compute_with_the_masked_weight(matmul: Matmul) -> None:
    mask = _mask("unstructured", 0.4, (19, 45))
    draw = torch.Generator().manual_seed(3)
    masked, dense = Linear(45, 19, matmul=matmul), Linear(45, 19, matmul=matmul)
    with torch.no_grad():
        masked.weight.copy_(torch.randn(19, 45, generator=draw))
        dense.weight.copy_(mask.zero_(masked.weight.detach().clone()))
    masked.set_mask(mask)
    x, upstream = torch.randn(50, 45, generator=draw), torch.randn(50, 19, generator=draw)
    ours, reference = _run(masked, x, upstream), _run(dense, x, upstream)
    assert torch.equal(ours[0], reference[0]) and torch.equal(ours[1], reference[1])
    assert torch.equal(ours[2], mask.zero_(reference[2].clone()))


@pytest.mark.parametrize("format_", ["fp32", "fp8_current"])
def test_backward_with_a_second_mask(format_: str) -> None:
    """SLoPe: forward with M, the input's gradient with M and M', the weight's at M."""
    matmul = FP32 if format_ == "fp32" else fp8_matmul(format_, torch.float32)
    shape = (16, 24)
    mask, back = _mask("2:4", 0.5, shape), _mask("unstructured", 0.7, shape)
    layer, plain = Linear(24, 16, matmul=matmul), Linear(24, 16, matmul=matmul)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(shape, generator=draw))
        plain.weight.copy_(mask.zero_(layer.weight.detach().clone()))
    layer.set_mask(mask, back)
    x, upstream = torch.randn(9, 24, generator=draw), torch.randn(9, 16, generator=draw)
    y, dx, dw = _run(layer, x, upstream)
    y0, _, dw0 = _run(plain, x, upstream)
    assert torch.equal(y, y0) and torch.equal(dw, mask.zero_(dw0.clone()))
    # Rounding to FP8 knows no second mask: the largest magnitude is that of W * M.
    values = plain.operand()
    if isinstance(values, Tensor):
        seen = values.detach().double()
    else:
        assert values.values is not None and values.scale is not None
        seen = values.values.double() * values.scale.double()
    twice = seen * back.box((0, 0), shape)
    tolerance = 2e-6 if format_ == "fp32" else 0.2
    _close(dx, upstream.double() @ twice, tolerance)


def test_the_mask_survives_a_change_of_format_and_can_be_taken_off() -> None:
    layer = Linear(8, 8, matmul=fp8_matmul("fp8_current", torch.float32))
    with torch.no_grad():
        layer.weight.fill_(1.0)
    layer.set_mask(_mask("2:4", 0.5, (8, 8)))
    layer.set_matmul(FP32)
    assert isinstance(layer.matmul, MaskedMatmul) and layer.matmul.inner is FP32
    x = torch.ones(1, 8)
    assert torch.equal(layer(x), torch.full((1, 8), 4.0))
    with torch.no_grad():
        layer.weight.mul_(2)  # the masked copy follows
    assert torch.equal(layer(x), torch.full((1, 8), 8.0))
    layer.matmul.dense_gradients = True
    layer(x).sum().backward()
    assert layer.weight.grad is not None and (layer.weight.grad == 1).all()
    layer.set_mask(None)
    assert layer.matmul is FP32 and torch.equal(layer(x), torch.full((1, 8), 16.0))


def test_whole_gradients_survive_a_change_of_format_and_of_the_mask() -> None:
    layer = Linear(8, 8, matmul=fp8_matmul("fp8_current", torch.float32))
    layer.set_mask(_mask("2:4", 0.5, (8, 8)))
    layer.want_dense_gradients(True)
    layer.set_matmul(FP32)
    layer.set_mask(_mask("2:4", 0.5, (8, 8)))
    layer(torch.ones(1, 8)).sum().backward()
    assert layer.weight.grad is not None and (layer.weight.grad == 1).all()
    layer.want_dense_gradients(False)
    layer.weight.grad = None
    layer(torch.ones(1, 8)).sum().backward()
    assert int((layer.weight.grad != 0).sum()) == 32


def test_a_part_of_a_mask() -> None:
    mask = _mask("4x4", 0.5, (30, 22))
    part = mask.part((8, 4), (22, 18))
    whole = mask.box((0, 0), (30, 22))
    assert torch.equal(part.box((0, 0), (22, 18)), whole[8:, 4:])
    assert torch.equal(mask.box((5, 3), (9, 7)), whole[5:14, 3:10])
    assert mask.density == whole.double().mean()


@pytest.mark.parametrize(("text", "shape"), [("4x4", (46, 32))])
def test_traced_without_a_break(text: str, shape: tuple[int, int]) -> None:
    layer = Linear(shape[1], shape[0], matmul=FP32)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(shape, generator=draw))
    layer.set_mask(_mask(text, 0.5, shape))
    x, upstream = torch.randn(9, shape[1], generator=draw), torch.randn(9, shape[0], generator=draw)
    eager = [value.clone() for value in _run(layer, x, upstream)]
    layer.compile(backend="aot_eager", fullgraph=True)
    for ours, reference in zip(_run(layer, x, upstream), eager, strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-6, atol=2e-5)
