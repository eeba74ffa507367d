"""The constant that multiplies a linear layer's products, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.ranks import run_ranks
from torch import Tensor

from llmtrain.linear import BF16, FP32, FP32_NATIVE, FP32_ONEDNN, Linear, Matmul, Placement
from llmtrain.linear.matmul import DenseMatmul
from llmtrain.parallel import TensorParallel

SCALE = 19**-0.5
ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")
MATMULS = [
    pytest.param(FP32, 2e-6, id="fp32"),
    pytest.param(FP32_ONEDNN, 2e-6, id="onednn", marks=ONEDNN),
    pytest.param(FP32_NATIVE, 2e-6, id="compiled"),
    pytest.param(BF16, 6e-3, id="bf16"),
]


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _fill(layer: Linear) -> Linear:
    with torch.no_grad():
        for seed, param in enumerate(layer.parameters()):
            param.copy_(_draw(*param.shape, seed=seed))
    return layer


def _reference(x: Tensor, upstream: Tensor, layer: Linear) -> list[Tensor]:
    """y and the gradients of x, weight and bias in float64, of operands as they are rounded."""
    dtype = layer.matmul.dtype
    x64 = x.detach().to(dtype).double().requires_grad_()
    w64 = layer.weight.detach().to(dtype).double().requires_grad_()
    b64 = None if layer.bias is None else layer.bias.detach().double().requires_grad_()
    y = F.linear(SCALE * x64, w64, b64)
    y.backward(upstream.to(dtype).double())
    grads = [t.grad for t in (x64, w64, b64) if t is not None]
    return [y.detach(), *(g for g in grads if g is not None)]


def _close(ours: Tensor, reference: Tensor, tolerance: float) -> None:
    error = float((ours.detach().double() - reference.detach()).norm() / reference.norm())
    assert error < tolerance, error


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("matmul", "tolerance"), MATMULS)
def test_scaled_products(matmul: Matmul, tolerance: float, bias: bool) -> None:
    layer = _fill(Linear(19, 45, bias, matmul=matmul, scale=SCALE))
    x = _draw(3, 7, 19, seed=5).requires_grad_()
    upstream = _draw(3, 7, 45, seed=6)
    out = layer(x)
    out.backward(upstream.to(out.dtype))
    ours = [out, x.grad, *(p.grad for p in layer.parameters())]
    assert out.dtype == matmul.dtype
    for value, reference in zip(ours, _reference(x, upstream, layer), strict=True):
        assert value is not None
        _close(value, reference, tolerance)


@pytest.mark.parametrize(("matmul", "tolerance"), MATMULS)
def test_scaled_weight_gradient_is_added_into(matmul: Matmul, tolerance: float) -> None:
    grad, x = (_draw(21, n, seed=n).to(matmul.dtype) for n in (45, 19))
    start = _draw(45, 19, seed=2)
    into = start.clone()
    out = matmul.wgrad(grad, x, into, scale=SCALE)
    assert out is into and out.dtype == torch.float32
    _close(out, start.double() + SCALE * grad.double().t() @ x.double(), tolerance)


def test_bf16_results_are_rounded_once() -> None:
    x, weight = _draw(64, 65, seed=0).bfloat16(), _draw(33, 65, seed=1).bfloat16()
    exact = 65**-0.5 * (x.double() @ weight.double().t())
    rounded = BF16.fprop(x, weight, None, 65**-0.5) == exact.bfloat16()
    # Sums in another order may fall on the other side of a tie; rounding twice misses a quarter.
    assert rounded.float().mean() > 0.995


@pytest.mark.parametrize("matmul", [FP32, FP32_ONEDNN, FP32_NATIVE, BF16])
def test_scale_one_makes_the_calls_of_no_scale(
    matmul: DenseMatmul, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a scaled product")

    monkeypatch.setattr(torch, "addmm", refuse)
    monkeypatch.setattr(Tensor, "mul_", refuse)
    layer = _fill(Linear(19, 45, True, matmul=matmul))
    layer(_draw(4, 19, seed=5).requires_grad_()).sum().backward()


def test_frozen_weight_still_scales_the_input_gradient() -> None:
    layer = _fill(Linear(19, 45, matmul=FP32, scale=SCALE))
    layer.weight.requires_grad_(False)
    x, upstream = _draw(21, 19, seed=5).requires_grad_(), _draw(21, 45, seed=6)
    layer(x).backward(upstream)
    assert x.grad is not None
    _close(x.grad, SCALE * upstream.double() @ layer.weight.double(), 2e-6)


def _split_layer(
    rank: int, placement: Placement, sequence: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Output and gradients of x, weight and bias of one rank's part of a layer, 19 tokens."""
    group = dist.group.WORLD
    assert group is not None
    tensor = TensorParallel(group, rank, 2, sequence)
    whole = _fill(Linear(20, 46, bias))
    column = placement is Placement.COLUMN
    size = (20, 23) if column else (10, 46)
    layer = Linear(*size, bias, placement=placement, tensor=tensor, scale=SCALE)
    with torch.no_grad():
        layer.weight.copy_(whole.weight.chunk(2, 0 if column else 1)[rank])
        if layer.bias is not None and whole.bias is not None:
            layer.bias.copy_(whole.bias.chunk(2)[rank] if column else whole.bias)
    x, upstream = _draw(19, 20, seed=5), _draw(19, 46, seed=6)
    if column:
        x, upstream = tensor.own(x), upstream.chunk(2, 1)[rank]
    else:
        x, upstream = x.chunk(2, 1)[rank].contiguous(), tensor.own(upstream)
    x = x.clone().requires_grad_()
    out = layer(x)
    if column and sequence:
        out = out[:19]
    out.backward(upstream)
    assert x.grad is not None and layer.weight.grad is not None
    return out.detach(), x.grad, layer.weight.grad, None if layer.bias is None else layer.bias.grad


@pytest.mark.dist
def test_split_over_two_ranks() -> None:
    cases = [(p, s) for p in (Placement.COLUMN, Placement.ROW) for s in (True, False)]

    def body(rank: int) -> list[Any]:
        return [_split_layer(rank, *case, bias=True) for case in cases]

    whole = _fill(Linear(20, 46, True))
    x, upstream = _draw(19, 20, seed=5), _draw(19, 46, seed=6)
    y, dx, dw, db = _reference(x, upstream, whole)
    for case, *parts in zip(cases, *run_ranks(2, body), strict=True):
        placement, sequence = case
        outs, dxs, dws, dbs = zip(*parts, strict=True)
        if placement is Placement.COLUMN:
            joined = (torch.cat(outs, 1), torch.cat(dws, 0), torch.cat(dbs))
            dx_joined = torch.cat(dxs)[:19] if sequence else dxs[1]
        else:
            joined = (torch.cat(outs)[:19] if sequence else outs[1], torch.cat(dws, 1), None)
            dx_joined = torch.cat(dxs, 1)
            joined = (*joined[:2], dbs[0] + dbs[1] if sequence else dbs[0])
        for ours, reference in zip((*joined, dx_joined), (y, dw, db, dx), strict=True):
            _close(ours, reference, 2e-6)
