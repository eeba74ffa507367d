"""The linear layer against float64, and the cache of its cast weight."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.linear import BF16, FP32, FP32_NATIVE, FP32_ONEDNN, Linear, Matmul, matmul_for

MATMULS = [
    pytest.param(FP32, 2e-6, id="fp32"),
    pytest.param(
        FP32_ONEDNN,
        2e-6,
        id="onednn",
        marks=pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN"),
    ),
    pytest.param(FP32_NATIVE, 2e-6, id="compiled"),
    pytest.param(BF16, 1e-2, id="bf16"),
]


def _layer(matmul: Matmul, bias: bool = True, sizes: tuple[int, int] = (19, 45)) -> Linear:
    layer = Linear(*sizes, bias, matmul=matmul)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in layer.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    return layer


def _close(ours: Tensor, reference: Tensor, tolerance: float) -> None:
    error = (ours.double() - reference).norm() / reference.norm()
    assert error < tolerance, error


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("matmul", "tolerance"), MATMULS)
def test_output_and_gradients(matmul: Matmul, tolerance: float, bias: bool) -> None:
    layer = _layer(matmul, bias)
    x = torch.randn(3, 7, 19, requires_grad=True)
    out = layer(x)
    upstream = torch.randn(3, 7, 45)
    out.backward(upstream.to(out.dtype))

    x64 = x.detach().double().requires_grad_()
    params = [p.detach().double().requires_grad_() for p in layer.parameters()]
    expected = F.linear(x64, *params)
    expected.backward(upstream.double())

    assert out.dtype == matmul.dtype
    assert out.shape == (3, 7, 45)
    _close(out, expected, tolerance)
    assert x.grad is not None and x.grad.dtype == x.dtype
    _close(x.grad, x64.grad, tolerance)  # type: ignore[arg-type]
    for param, reference in zip(layer.parameters(), params, strict=True):
        assert param.grad is not None and param.grad.dtype == torch.float32
        _close(param.grad, reference.grad, tolerance)  # type: ignore[arg-type]


def _saved_sizes(layer: Linear, x: Tensor) -> list[int]:
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sorted(saved)


@pytest.mark.parametrize("matmul", [FP32, BF16])
def test_frozen_weight_saves_no_input(matmul: Matmul) -> None:
    layer = _layer(matmul, bias=False)
    x = torch.randn(50, 19, requires_grad=True)
    assert _saved_sizes(layer, x) == [19 * 45, 50 * 19]
    layer.weight.requires_grad_(False)
    assert _saved_sizes(layer, x) == [19 * 45]
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is None


def test_input_without_gradient_saves_no_weight() -> None:
    assert _saved_sizes(_layer(FP32, bias=False), torch.randn(50, 19)) == [50 * 19]


def test_matmul_for_knows_its_dtypes() -> None:
    assert matmul_for(torch.bfloat16) is BF16
    assert matmul_for(torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match=r"float16; there are float32 and bfloat16"):
        matmul_for(torch.float16)


def _is_current(layer: Linear) -> bool:
    return torch.equal(layer.operand(), layer.weight.detach().bfloat16())


def test_cast_weight_is_shared_by_forward_passes_until_it_changes() -> None:
    layer = _layer(BF16)
    first = layer.operand()
    layer(torch.randn(2, 19)).sum().backward()
    assert layer.operand() is first
    with torch.no_grad():
        layer.weight.mul_(2)
    assert _is_current(layer)
    assert layer.operand().data_ptr() == first.data_ptr(), "memory of the copy is reused"


@pytest.mark.parametrize("fused", [True, False])
def test_cast_weight_follows_the_optimizer(fused: bool) -> None:
    layer = _layer(BF16)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused, foreach=False)
    before = layer.operand().clone()
    for _ in range(3):
        layer(torch.randn(2, 19)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert _is_current(layer)
    assert not torch.equal(before, layer.operand())


def test_cast_weight_follows_foreach_load_swap_and_copy() -> None:
    layer = _layer(BF16)
    layer.operand()
    with torch.no_grad():
        torch._foreach_add_([layer.weight], 1.0)
    assert _is_current(layer)
    layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()})
    assert _is_current(layer)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.add_(1.0)
    assert _is_current(twin) and _is_current(layer)
    layer.weight = torch.nn.Parameter(torch.randn(45, 19))
    assert _is_current(layer)


def test_cast_made_in_inference_mode_can_be_trained_with() -> None:
    layer = _layer(BF16)
    with torch.inference_mode():
        layer(torch.randn(2, 19))
    layer(torch.randn(2, 19)).sum().backward()
    assert layer.weight.grad is not None


def test_change_between_forward_and_backward_is_refused() -> None:
    """As with torch's own layers: the gradient would be that of another weight."""
    layer = _layer(BF16)
    out = layer(torch.randn(2, 19, requires_grad=True))
    with torch.no_grad():
        layer.weight.add_(1.0)
    layer.operand()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("matmul", [FP32, BF16], ids=["the weight itself", "its cast"])
def test_compiled_without_a_break(matmul: Matmul) -> None:
    layer, x = _layer(matmul), torch.randn(24, 19)
    found = []
    for compiled in (False, True):
        layer.zero_grad()
        if compiled:
            layer.compile(backend="aot_eager", fullgraph=True)
        out = layer(x)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
        found.append([out.detach(), *(p.grad for p in layer.parameters() if p.grad is not None)])
    for ours, reference in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-6, atol=2e-5)
