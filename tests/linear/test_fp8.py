"""FP8 products against float64 products of the numbers that the formats' definition gives."""

from __future__ import annotations

import pytest
import torch
from helpers.ranks import run_ranks
from torch import Tensor

from llmtrain.linear import (
    BF16,
    FP32,
    Linear,
    Matmul,
    Numbers,
    Packed,
    Placement,
    fake_matmul,
    fp8_matmul,
)
from llmtrain.linear.fake import fake_quantize, fake_vectors
from llmtrain.ops import E4M3, E5M2, FP8_MAX
from llmtrain.parallel.tensor import TensorParallel

SCALE = 19**-0.5
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "bf16"])


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _exact(x: Tensor, fp8: torch.dtype) -> Tensor:
    """The FP8 numbers of ``x`` in float64. The casts have tests of their own."""
    top = FP8_MAX[fp8]
    return x.float().clamp(-top, top).to(fp8).double()


def _close(value: Tensor, reference: Tensor, tolerance: float) -> None:
    assert value.shape == reference.shape
    error = (value.double() - reference).norm() / reference.norm()
    assert error < tolerance, error


def _fill(layer: Linear) -> Linear:
    with torch.no_grad():
        for i, param in enumerate(layer.parameters()):
            param.copy_(_draw(*param.shape, seed=i))
    return layer


def _run(layer: Linear, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output, then gradients of x, weight and bias."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out = layer(x)
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(p.grad for p in (x, *layer.parameters()) if p.grad is not None)]


@DTYPES
@pytest.mark.parametrize("bias", [True, False])
def test_static_products(dtype: torch.dtype, bias: bool) -> None:
    """Values far out are clipped, 3 x 7 tokens and odd widths, a constant scale."""
    layer = _fill(Linear(19, 45, bias, matmul=fp8_matmul("mus_fp8", dtype), scale=SCALE))
    x, upstream = _draw(3, 7, 19, seed=5) * 200, _draw(3, 7, 45, seed=6)
    out, dx, dw, *db = _run(layer, x, upstream)
    flat = x.to(dtype).reshape(-1, 19)
    grads = upstream.to(dtype).reshape(-1, 45)
    assert (flat.abs() > 448).any()
    a, w = _exact(flat, E4M3), _exact(layer.weight.detach().to(dtype), E4M3)
    g = _exact(grads, E5M2)
    y = SCALE * a @ w.t()
    y = y if layer.bias is None else y + layer.bias.detach().double()
    _close(out.reshape(-1, 45), y, TOLERANCE[dtype])
    _close(dx.reshape(-1, 19), SCALE * g @ w, TOLERANCE[dtype])
    _close(dw, SCALE * g.t() @ a, 4e-3 if dtype == torch.bfloat16 else 2e-6)
    assert out.dtype == dtype and dx.dtype == dw.dtype == torch.float32
    if bias:
        _close(db[0], grads.double().sum(0), 2e-6)


@DTYPES
def test_scaled_bf16_results_are_rounded_once(dtype: torch.dtype) -> None:
    matmul = fp8_matmul("mus_fp8", dtype)
    x, w = _draw(64, 65, seed=0).to(dtype), _draw(33, 65, seed=1)
    exact = 65**-0.5 * (_exact(x, E4M3) @ _exact(w.to(dtype), E4M3).t())
    y = matmul.fprop(matmul.pack_input(x), matmul.operand(w), None, 65**-0.5)
    # Sums in another order may fall on the other side of a tie.
    if dtype == torch.bfloat16:
        assert (y == exact.bfloat16()).float().mean() > 0.995


@pytest.mark.parametrize("factor", [2.0**-30, 1.0, 2.0**30])
def test_dynamic_scale_makes_results_independent_of_the_inputs_scale(factor: float) -> None:
    layer = _fill(Linear(19, 45, matmul=fp8_matmul("fp8_current", torch.float32)))
    x, upstream = _draw(21, 19, seed=5), _draw(21, 45, seed=6)
    out, dx, dw = _run(layer, x * factor, upstream / factor)
    first = _run(layer, x, upstream)
    # Powers of two change nothing but the exponent.
    torch.testing.assert_close(out / factor, first[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(dx * factor, first[1], rtol=1e-6, atol=0)
    a, w, g = (
        _exact(v / (v.abs().max() / FP8_MAX[f]), f).mul(v.abs().max().double() / FP8_MAX[f])
        for v, f in ((x, E4M3), (layer.weight.detach(), E4M3), (upstream, E5M2))
    )
    for value, reference in zip(first, (a @ w.t(), g @ w), strict=False):
        _close(value, reference, 2e-6)
    _close(dw, g.t() @ a, 2e-6)


@pytest.mark.parametrize("name", ["mus_fp8", "fp8_current"])
def test_zeros_nan_and_infinities(name: str) -> None:
    matmul = fp8_matmul(name, torch.float32)
    weight = matmul.operand(torch.ones(2, 3))
    assert torch.equal(
        matmul.fprop(matmul.pack_input(torch.zeros(4, 3)), weight, None), torch.zeros(4, 2)
    )
    x = torch.ones(2, 3)
    x[0, 1] = torch.nan
    y = matmul.fprop(matmul.pack_input(x), weight, None)
    assert y[0].isnan().all()
    x[0, 1] = torch.inf
    y = matmul.fprop(matmul.pack_input(x), weight, None)
    # Static: the largest number. Dynamic: the scale of a tensor with infinities is 1.
    torch.testing.assert_close(y, torch.tensor([[450.0, 450.0], [3.0, 3.0]]), rtol=1e-6, atol=0)
    empty = matmul.fprop(matmul.pack_input(torch.zeros(0, 3)), weight, None)
    assert empty.shape == (0, 2)


def test_what_is_saved_is_one_byte_an_element() -> None:
    layer = _fill(Linear(32, 48, matmul=fp8_matmul("mus_fp8", torch.float32)))
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        layer(_draw(64, 32, seed=1).requires_grad_())
    assert sorted((x.numel(), x.element_size()) for x in saved) == [(32 * 48, 1), (64 * 32, 1)]


def test_weight_is_cast_once_until_it_changes() -> None:
    layer = _fill(Linear(32, 48, matmul=fp8_matmul("mus_fp8", torch.float32)))
    first = layer.operand()
    assert isinstance(first, Packed) and layer.operand() is first
    with torch.no_grad():
        layer.weight.mul_(2)
    second = layer.operand()
    assert isinstance(second, Packed) and first.values is not None and second.values is not None
    assert torch.equal(second.values.float(), _exact(layer.weight.detach(), E4M3).float())
    assert not torch.equal(first.values.float(), second.values.float())
    layer.set_matmul(FP32)
    assert layer.operand() is layer.weight


@pytest.mark.parametrize("name", ["mus_fp8", "fp8_current"])
def test_traced_without_a_break(name: str) -> None:
    layer = _fill(Linear(32, 48, True, matmul=fp8_matmul(name, torch.float32), scale=SCALE))
    x, upstream = _draw(24, 32, seed=5), _draw(24, 48, seed=6)
    eager = [value.clone() for value in _run(layer, x, upstream)]
    layer.compile(backend="aot_eager", fullgraph=True)
    for ours, reference in zip(_run(layer, x, upstream), eager, strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-6, atol=2e-5)


def _split(
    rank: int, matmul: Matmul, placement: Placement, sequence: bool, keep: bool
) -> list[Tensor]:
    """One rank's part of a layer [48, 32] on 24 tokens."""
    group = torch.distributed.group.WORLD
    assert group is not None
    tensor = TensorParallel(group, rank, 2, sequence, keep)
    whole = _integers(48, 32, seed=1)
    column = placement is Placement.COLUMN
    shape = (24, 32) if column else (48, 16)
    layer = Linear(shape[1], shape[0], matmul=matmul, placement=placement, tensor=tensor)
    with torch.no_grad():
        layer.weight.copy_(whole.chunk(2, 0 if column else 1)[rank])
    x, upstream = _integers(24, 32, seed=2), _integers(24, 48, seed=3)
    if column:
        upstream = upstream.chunk(2, 1)[rank]
        x = x.chunk(2)[rank] if sequence else x
    else:
        x = x.chunk(2, 1)[rank]
        upstream = upstream.chunk(2)[rank] if sequence else upstream
    return _run(layer, x, upstream.contiguous())


def _integers(*shape: int, seed: int) -> Tensor:
    """Numbers whose products have exact float32 sums in any order, some beyond e4m3's range."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-600, 600, shape, generator=draw).float()


FORMATS = [
    pytest.param(fp8_matmul("mus_fp8", torch.float32), id="mus_fp8"),
    pytest.param(fp8_matmul("fp8_current", torch.float32), id="fp8_current"),
    pytest.param(fake_matmul(Numbers("int4", "int8", "e5m2"), torch.float32), id="fake"),
    pytest.param(fake_matmul(Numbers("ternary", "e2m1", "none"), torch.float32), id="ternary"),
]


@pytest.mark.parametrize("placement", [Placement.COLUMN, Placement.ROW])
@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize("matmul", FORMATS)
def test_split_over_two_ranks_is_the_same(
    matmul: Matmul, placement: Placement, sequence: bool, keep: bool = False
) -> None:
    """Quantised first and gathered as bytes: the very numbers of the undivided layer.

    With static scales every sum is exact, so the results are equal to the last bit.
    """
    column = placement is Placement.COLUMN
    layer = Linear(32, 48, matmul=matmul)
    with torch.no_grad():
        layer.weight.copy_(_integers(48, 32, seed=1))
    alone = _run(layer, _integers(24, 32, seed=2), _integers(24, 48, seed=3))
    ranks = run_ranks(2, _split, matmul, placement, sequence, keep)
    dims = (1, 0, 0) if column else (0, 1, 1)
    for i, (whole, dim) in enumerate(zip(alone, dims, strict=True)):
        parts = [rank[i] for rank in ranks]
        joined = torch.cat(parts, dim)
        if joined.shape != whole.shape:  # not split: every rank has all of it
            assert torch.equal(parts[0], parts[1])
            joined = parts[0]
        exact = matmul.name == "mus_fp8"
        torch.testing.assert_close(
            joined,
            whole,
            rtol=0 if exact else 2e-6,
            atol=0 if exact else whole.abs().max().item() * 2e-6,
        )


def test_gathered_inputs_that_are_kept() -> None:
    test_split_over_two_ranks_is_the_same(
        fp8_matmul("mus_fp8", torch.float32), Placement.COLUMN, True, keep=True
    )


def _gathered_dtypes(rank: int) -> list[tuple[str, int]]:
    from llmtrain.linear import operand

    seen = []
    start = operand.start_all_gather

    def spy(x: Tensor, group: torch.distributed.ProcessGroup) -> object:
        seen.append((str(x.dtype), x.numel()))
        return start(x, group)

    operand.start_all_gather = spy  # type: ignore[assignment]
    for placement in (Placement.COLUMN, Placement.ROW):
        _split(rank, fp8_matmul("mus_fp8", torch.float32), placement, True, False)
    return seen


def test_what_travels_is_bytes() -> None:
    """A column-parallel input twice, a row-parallel gradient once."""
    expected = [("torch.uint8", 12 * 32)] * 2 + [("torch.uint8", 12 * 48)]
    assert run_ranks(2, _gathered_dtypes) == [expected, expected]


@pytest.mark.parametrize(
    ("number", "codes"),
    [
        ("int3", [-4, -3, -2, -1, 0, 1, 2, 3]),
        ("e2m1", [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6]),
        ("e3m0", [0, *(2.0**e for e in range(-2, 5)), *(-(2.0**e) for e in range(-2, 5))]),
        ("ternary", [-1, 0, 1]),
    ],
)
def test_fake_numbers(number: str, codes: list[float]) -> None:
    """Each element becomes the nearest code times the scale of its definition."""
    x = _draw(37, 53, seed=8) * 3
    values = torch.tensor(codes, dtype=torch.float64)
    scale = x.abs().max() / (3 if number == "int3" else max(codes))
    if number == "ternary":
        scale = x.abs().mean()
    y = fake_quantize(x, number)
    distance = ((x / scale).double()[..., None] - values).abs()
    assert torch.allclose((y / scale).double(), values[distance.argmin(-1)], atol=1e-6)


@pytest.mark.parametrize("fp8", [E4M3, E5M2])
def test_fake_e4m3_and_e5m2_are_the_hardware_formats(fp8: torch.dtype) -> None:
    x = torch.cat((_draw(9999, seed=9) * torch.logspace(-7, 3, 9999), torch.tensor([FP8_MAX[fp8]])))
    x = x.clamp(-FP8_MAX[fp8], FP8_MAX[fp8])[:, None]
    name = "e4m3" if fp8 == E4M3 else "e5m2"
    assert torch.equal(fake_quantize(x, name), x.to(fp8).float())


def test_fake_weights_have_a_scale_per_output_and_zero_rows_stay_zero() -> None:
    weight = _draw(5, 40, seed=3) * torch.tensor([1e-6, 1.0, 1e6, 0.0, 3.0])[:, None]
    rounded = fake_matmul(Numbers(weights="int8"), torch.float32).operand(weight)
    assert isinstance(rounded, Packed) and rounded.values is not None
    error = (rounded.values - weight).abs().amax(1)
    assert (error <= weight.abs().amax(1) / 127 / 2 * 1.001).all() and error[:3].min() > 0
    assert not rounded.values[3].any()


@pytest.mark.parametrize(("number", "codes"), [("int4", 7), ("ternary", 1), ("e2m1", 6)])
def test_vectors_have_a_scale_each_and_gradients_pass(number: str, codes: int) -> None:
    x = _draw(2, 3, 5, 8, seed=4) * torch.logspace(-6, 6, 5)[:, None]
    x[0, 0, 0] = 0.0
    x.requires_grad_()
    y = fake_vectors(x, number)
    upstream = _draw(2, 3, 5, 8, seed=5)
    y.backward(upstream)
    assert x.grad is not None and torch.equal(x.grad, upstream)
    wide = x.detach().double()
    scale = wide.abs().mean(-1, keepdim=True) if number == "ternary" else None
    scale = wide.abs().amax(-1, keepdim=True) / codes if scale is None else scale
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6] if number == "e2m1" else range(codes + 1)
    grid = torch.tensor([s * float(v) for v in values for s in (1, -1)], dtype=torch.float64)
    unit = (wide / scale).nan_to_num()
    nearest = grid[(unit[..., None] - grid).abs().argmin(-1)] * scale
    torch.testing.assert_close(y.detach().double(), nearest, rtol=1e-6, atol=0)


def test_gradients_pass_fake_rounding_unchanged() -> None:
    numbers = Numbers(weights="int4", inputs="int6")
    layer = _fill(Linear(19, 45, matmul=fake_matmul(numbers, torch.float32)))
    x, upstream = _draw(21, 19, seed=5), _draw(21, 45, seed=6)
    out, dx, dw = _run(layer, x, upstream)
    a = fake_quantize(x, "int6").double()
    w = fake_quantize(layer.weight.detach(), "int4", by_row=True).double()
    for value, reference in (
        (out, a @ w.t()),
        (dx, upstream.double() @ w),
        (dw, upstream.double().t() @ a),
    ):
        _close(value, reference, 2e-6)


@DTYPES
@pytest.mark.parametrize("plain", [FP32, BF16])
def test_plain_formats_pack_nothing(dtype: torch.dtype, plain: Matmul) -> None:
    x = _draw(4, 5, seed=1).to(dtype)
    assert plain.pack_input(x) is x and plain.pack_grad(x) is x and not plain.packs
