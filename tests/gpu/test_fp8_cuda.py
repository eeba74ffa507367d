"""FP8 on a GPU: the kernels against the formats' definition, the products against float64 and
against the CPU's emulation."""

from __future__ import annotations

import pytest
import torch
from helpers.unit_scaled import assert_as_exact, batch, gpt, step
from ops.test_fp8 import by_search, every_bf16, inputs, same_bytes
from torch import Tensor

from llmtrain import ops
from llmtrain.linear import Linear, fp8_matmul, summing_gradients
from llmtrain.model import compile_blocks
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(16, 16), (48, 272), (3, 32, 1040), (0, 64), (7, 13)], ids=str)
@pytest.mark.parametrize("layer", [True, False], ids=["layernorm", "rmsnorm"])
def test_norms_with_casts(dtype: torch.dtype, shape: tuple[int, ...], layer: bool) -> None:
    """Against the CPU's, whose own tests are against float64; (7, 13) takes torch's passes."""
    draw = torch.Generator().manual_seed(0)
    x, branch, upstream = (torch.randn(shape, generator=draw).to(dtype) for _ in range(3))
    weight, bias = torch.randn(2, shape[-1], generator=draw)
    found = []
    for device in ("cpu", "cuda"):
        leaves = [t.clone().to(device).requires_grad_() for t in (x, branch, weight, bias)]
        a, b, w, s = leaves
        terms = ops.NormTerms(w, s if layer else None, 1e-5, layer)
        total, y, casts = ops.add_norm_cast(a, b, terms, turned=True)
        joined, joined_casts = ops.norm_join_cast(a, b, terms, 0.8, turned=True)
        for values, copies in ((y, casts), (joined, joined_casts)):
            same_bytes(copies.plain.cpu(), by_search(values.detach().cpu(), E4M3))
            flat = values.detach().flatten(0, -2).cpu()
            assert copies.turned is not None
            same_bytes(copies.turned.cpu(), by_search(flat.t(), E4M3))
        to = upstream.to(device)
        torch.autograd.backward([total, y, joined], [to, to * 2, to * 3])
        grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
        found.append([t.detach().cpu() for t in (total, y, joined, *grads)])
    for ours, reference in zip(found[1], found[0], strict=True):
        gap = (ours.double() - reference.double()).norm()
        assert gap <= (1e-5 if dtype == torch.float32 else 2e-2) * reference.double().norm()
    if all(n % 16 == 0 for n in shape):
        left_out = ops.add_norm_cast(
            x.cuda(), None, ops.NormTerms(weight.cuda(), None, 1e-5, layer), keep=False
        )
        assert left_out[1].shape == shape and left_out[1].untyped_storage().nbytes() <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "relu", "swiglu"])
@pytest.mark.parametrize("shape", [(16, 32), (48, 288), (130, 46), (0, 32)], ids=str)
def test_activations_with_casts(dtype: torch.dtype, name: str, shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=draw) * 3).to(dtype)
    y, _ = ops.activation_cast(x, name)
    dy = torch.randn(y.shape, generator=draw).to(dtype)
    dx, _ = ops.activation_backward_cast(dy, x, name)
    there, casts = ops.activation_cast(x.cuda(), name, turned=True)
    back, grads = ops.activation_backward_cast(dy.cuda(), x.cuda(), name, 2.0**9, True)
    for ours, reference in ((there, y), (back, dx)):
        gap = (ours.cpu().double() - reference.double()).norm()
        assert gap <= (2e-6 if dtype == torch.float32 else 1e-2) * reference.double().norm()
    for copies, values, fp8 in ((casts, there, E4M3), (grads, back * 2.0**9, E5M2)):
        same_bytes(copies.plain.cpu(), by_search(values.cpu(), fp8))
        assert copies.turned is not None
        same_bytes(copies.turned.cpu(), by_search(values.t().cpu(), fp8))


def test_weights_are_rounded_and_cast_in_one_pass() -> None:
    weight = torch.randn(272, 144, generator=torch.Generator().manual_seed(0)) * 50
    values, turned = ops.fp8_weight(weight.cuda(), torch.bfloat16)
    same_bytes(values.cpu(), by_search(weight.bfloat16(), E4M3))
    same_bytes(turned.cpu(), by_search(weight.bfloat16().t(), E4M3))


def test_kernels_replay_in_a_cuda_graph() -> None:
    x = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(64, device="cuda")

    def work() -> list[Tensor]:
        total, y, casts = ops.add_norm_cast(x, x, ops.NormTerms(weight, None, 1e-5, False), True)
        active, more = ops.activation_cast(y, "gelu", True)
        back, grads = ops.activation_backward_cast(y, active, "gelu", 2.0, True)
        kept = [total, y, active, back, *ops.fp8_weight(x.float(), torch.bfloat16)]
        return [*kept, *casts, *more, *grads, *ops.fp8_cast_transpose(x, E4M3)]  # type: ignore[list-item]

    with torch.no_grad():
        work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = work()
        x.copy_(torch.randn(64, 64, device="cuda"))
        graph.replay()
        for ours, reference in zip(outs, work(), strict=True):
            assert torch.equal(ours.view(torch.uint8), reference.view(torch.uint8))


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


@PRODUCTS
@pytest.mark.skipif(ops.cublaslt_fault() is not None, reason=str(ops.cublaslt_fault()))
@pytest.mark.parametrize("scaled", [False, True], ids=["static", "scales"])
@pytest.mark.parametrize(("out", "width", "n"), [(160, 96, 64), (16, 16, 16), (48, 4096, 2064)])
def test_sums_within_the_product(out: int, width: int, n: int, scaled: bool) -> None:
    """Against float64, added twice; an operand that begins 16 bytes into its storage."""
    draw = torch.Generator().manual_seed(0)
    grad = ops.fp8_cast(torch.randn(out, n, generator=draw).cuda(), E5M2)
    x = ops.fp8_cast(torch.randn(width, n, generator=draw).cuda(), E4M3)
    room = torch.empty(x.numel() + 16, dtype=torch.uint8, device="cuda")
    x = room[16:].copy_(x.view(torch.uint8).flatten()).view(width, n).view(E4M3)
    scales = (torch.tensor(0.25, device="cuda"), torch.tensor(3.0, device="cuda"))
    total = torch.randn(out, width, generator=draw).cuda()
    exact = total.double()
    for factor in (2.0**-4, 0.3):
        assert ops.fp8_wgrad_(total, grad, x, factor, *(scales if scaled else ()))
        exact += factor * (0.75 if scaled else 1.0) * (grad.double() @ x.double().t())
    assert (total - exact).norm() < 1e-3 * exact.norm()
    with pytest.raises(RuntimeError, match=r"another number of tokens|wrong shape"):
        ops.fp8_wgrad_(total, grad, x[:, : n - 16].contiguous())


@PRODUCTS
@pytest.mark.parametrize("name", ["mus_fp8", "fp8_current"])
def test_gradients_of_micro_batches_within_the_product(name: str) -> None:
    layer = Linear(96, 160, matmul=fp8_matmul(name, torch.bfloat16, 4.0)).cuda()
    torch.nn.init.normal_(layer.weight)
    exact = torch.zeros(160, 96, dtype=torch.float64, device="cuda")
    sums = None
    for i in range(3):
        draw = torch.Generator().manual_seed(i)
        x, upstream = (torch.randn(64, k, generator=draw).cuda().bfloat16() for k in (96, 160))
        (alone,) = torch.autograd.grad(layer(x), layer.weight, upstream)
        exact += alone.double()
        with summing_gradients():
            layer(x).backward(upstream)
        assert sums in (None, layer.weight.grad.data_ptr())  # type: ignore[union-attr]
        sums = layer.weight.grad.data_ptr()  # type: ignore[union-attr]
    assert layer.weight.grad is not None
    assert (layer.weight.grad - exact).norm() < 1e-3 * exact.norm()


def test_operands_that_begin_anywhere() -> None:
    """As compiled code may pass them; the rows are multiples of 16."""
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(1 + 32 * 64, generator=draw).bfloat16().cuda()
    x, same = base[1:].view(32, 64), base[1:].clone().view(32, 64)
    weight = torch.randn(65, generator=draw).bfloat16().cuda()
    terms = ops.NormTerms(weight[1:], None, 1e-5, False)
    clean = ops.NormTerms(weight[1:].clone(), None, 1e-5, False)
    for ours, reference in (
        (ops.add_norm_cast(x, x, terms, True), ops.add_norm_cast(same, same, clean, True)),
        (
            ops.norm_join_cast(x, x, terms, 0.5, True),
            ops.norm_join_cast(same, same, clean, 0.5, True),
        ),
        (ops.activation_cast(x, "gelu", True), ops.activation_cast(same, "gelu", True)),
        (
            ops.activation_backward_cast(x, x, "silu", 2.0, True),
            ops.activation_backward_cast(same, same, "silu", 2.0, True),
        ),
    ):
        assert torch.equal(ours[0], reference[0])
        for a, b in zip(ours[-1], reference[-1], strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_more_elements_than_32_bits_count() -> None:
    """2^31 and some, in every kernel that goes by rows; the last rows are compared."""
    rows, columns = 2**15 + 16, 2**16
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.ones(rows, columns, dtype=torch.bfloat16, device="cuda")
    x[-16:] = torch.randn(16, columns, generator=torch.Generator().manual_seed(0)).to(x)
    end = x[-16:].clone()
    y, t = ops.fp8_cast_transpose(x, E4M3)
    expected = ops.fp8_cast(end, E4M3).view(torch.uint8)
    assert torch.equal(y[-16:].view(torch.uint8), expected)
    assert torch.equal(t[:, -16:].view(torch.uint8), expected.t())
    del y, t
    assert torch.equal(ops.fp8_cast(x, E4M3)[-16:].view(torch.uint8), expected)
    terms = ops.NormTerms(torch.ones(columns, device="cuda"), None, 1e-5, False)
    for work in (
        lambda v: ops.add_norm_cast(v, None, terms, True, False)[2],
        lambda v: ops.activation_cast(v, "relu", True, False)[1],
    ):
        casts, few = work(x), work(end)
        assert torch.equal(casts.plain[-16:].view(torch.uint8), few.plain.view(torch.uint8))
        assert torch.equal(casts.turned[:, -16:].view(torch.uint8), few.turned.view(torch.uint8))
        del casts


@PRODUCTS
def test_a_block_with_fused_casts_is_as_exact_as_one_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fused = step(gpt("cuda"), *batch("cuda"))
    for where in ("llmtrain.model.norm.fuses_norm", "llmtrain.model.pair.fuses_activation"):
        monkeypatch.setattr(where, lambda *args: False)
    assert_as_exact(fused, step(gpt("cuda"), *batch("cuda")))


@PRODUCTS
def test_compiled_blocks_are_as_exact_as_eager_ones() -> None:
    """One graph for all blocks; inductor's own code between our kernels rounds elsewhere."""
    eager, model = step(gpt("cuda"), *batch("cuda")), gpt("cuda")
    compile_blocks(model)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            found = step(model, *batch("cuda"))
    assert_as_exact(found, eager)


@PRODUCTS
def test_a_training_step_replays_in_a_cuda_graph() -> None:
    """Forward, backward and the casts of weights that have changed: no synchronisation, no memory
    of the host on the way."""
    model, stream = gpt("cuda"), torch.cuda.Stream()
    tokens, upstream = batch("cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(model, tokens, upstream)
            with torch.no_grad():  # as an optimizer does: the weights are cast within the graph
                for param in model.parameters():
                    param.add_(0.0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step(model, tokens, upstream)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1.25)
    tokens.copy_(tokens.flip(0))
    graph.replay()
    replayed = [t.clone() for t in kept]
    for a, b in zip(replayed, step(model, tokens, upstream), strict=True):
        assert (a - b).float().norm() <= 1e-3 * b.float().norm()
