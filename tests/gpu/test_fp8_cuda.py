"""FP8 on a GPU: the kernels against the formats' definition, the products against float64 and
against the CPU's emulation."""

from __future__ import annotations

import pytest
import torch
from ops.test_fp8 import by_search, every_bf16, inputs, same_bytes
from torch import Tensor

from llmtrain import ops
from llmtrain.linear import Linear, fp8_matmul
from llmtrain.ops import E4M3, E5M2, FP8_MAX

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
PRODUCTS = pytest.mark.skipif(not HAS_FP8, reason="needs compute capability 8.9")
FORMATS = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])


def test_the_library_is_built_and_loads() -> None:
    assert ops.cuda_fault() is None


@FORMATS
def test_cast_is_the_nearest_number(dtype: torch.dtype) -> None:
    for x in inputs(dtype):
        same_bytes(ops.fp8_cast(x.cuda(), dtype).cpu(), by_search(x, dtype))
    x = every_bf16()
    scaled = ops.fp8_cast(x.cuda(), dtype, 2.0**7).cpu()
    same_bytes(scaled, by_search(x.float() * 2.0**7, dtype))


@FORMATS
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("n", "m"),
    [(1, 1), (0, 5), (5, 0), (3, 130), (128, 128), (67, 61), (129, 2065), (16, 48), (272, 400)],
)
def test_cast_transpose(dtype: torch.dtype, to: torch.dtype, n: int, m: int) -> None:
    x = (torch.randn(n, m, generator=torch.Generator().manual_seed(n + m)) * 300).to(to)
    y, t = ops.fp8_cast_transpose(x.cuda(), dtype)
    same_bytes(y.cpu(), by_search(x, dtype))
    same_bytes(t.cpu(), by_search(x.t(), dtype))
    same_bytes(ops.fp8_transpose(y).cpu(), by_search(x.t(), dtype))


@FORMATS
def test_views_of_any_kind(dtype: torch.dtype) -> None:
    base = torch.randn(160, 272, generator=torch.Generator().manual_seed(1)).bfloat16() * 40
    there = base.cuda()
    for view in (
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: x[3:, 7:150],
        lambda x: x.flatten()[1 : 1 + 64 * 64].view(64, 64),
    ):
        y, t = ops.fp8_cast_transpose(view(there), dtype)
        same_bytes(y.cpu(), by_search(view(base), dtype))
        same_bytes(t.cpu(), by_search(view(base).t(), dtype))


def test_compiled_without_a_break() -> None:
    def work(x: Tensor) -> Tensor:
        y, t = ops.fp8_cast_transpose(x * 2, E4M3)
        return y.float() + t.float().t()

    x = torch.randn(160, 144, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(work, fullgraph=True)
    assert torch.equal(compiled(x), work(x))


def _exact(x: Tensor, fp8: torch.dtype) -> Tensor:
    top = FP8_MAX[fp8]
    return x.float().clamp(-top, top).to(fp8).double()


@PRODUCTS
@pytest.mark.parametrize("name", ["mus_fp8", "fp8_current"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_is_what_the_cpu_emulates(name: str, compute: torch.dtype, bias: bool) -> None:
    """Forward sums on tensor cores have fewer bits than float32: up to 2^-13 of the summands."""
    draw = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(64, n, generator=draw) for n in (96, 160))
    results = []
    for device in ("cpu", "cuda"):
        matmul = fp8_matmul(name, compute, 2.0**4)
        layer = Linear(96, 160, bias, matmul=matmul, scale=96**-0.5)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for param in layer.parameters():
                param.copy_(torch.randn(param.shape, generator=generator))
        layer = layer.to(device)
        leaf = x.to(device).requires_grad_()
        out = layer(leaf)
        out.backward(upstream.to(device, out.dtype))
        grads = [leaf.grad, *(p.grad for p in layer.parameters())]
        results.append([out.detach().cpu(), *(g.cpu() for g in grads if g is not None)])
    for ours, reference in zip(results[1], results[0], strict=True):
        error = (ours.double() - reference.double()).norm() / reference.double().norm()
        assert error < (6e-3 if compute == torch.bfloat16 else 1e-3), error


@PRODUCTS
def test_saved_tensors_are_one_byte_an_element() -> None:
    layer = Linear(96, 160, matmul=fp8_matmul("mus_fp8", torch.bfloat16)).cuda()
    torch.nn.init.normal_(layer.weight)
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        layer(torch.randn(64, 96, device="cuda").requires_grad_())
    assert all(x.element_size() == 1 for x in saved)
    # The input transposed only; the weight both ways, shared by all micro-batches.
    assert sorted(x.numel() for x in saved) == [64 * 96, 96 * 160, 96 * 160]
