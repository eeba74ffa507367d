"""Norms and activations with their casts: results and gradients against float64, bytes against the
separate passes, on inputs of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.kernel_sets import passes_on
from ops.test_fp8 import by_search, same_bytes
from torch import Tensor

from llmtrain import ops
from llmtrain.ops import E4M3, E5M2
from llmtrain.ops.fused import (
    ACTIVATIONS,
    NormTerms,
    activation_backward_cast,
    activation_cast,
    activation_reference,
    add_norm_cast,
    norm_join_cast,
)

NATIVE = pytest.mark.skipif(not ops.native_loaded(), reason="the compiled kernels are not built")
DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 7e-3)], ids=["fp32", "bf16"]
)
SHAPES = [(3, 5, 48), (131, 7), (67, 129), (1, 5), (0, 16), (64, 64)]
EPS = 1e-5
STAY = 0.8**0.5


def _randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _near(value: Tensor | None, exact: Tensor | None, tolerance: float) -> None:
    assert value is not None and exact is not None and value.shape == exact.shape
    error = (value.double() - exact).norm()
    assert error <= tolerance * exact.norm() + 1e-12, error / exact.norm()


def _norm(x: Tensor, terms: NormTerms) -> Tensor:
    """By its formula."""
    if not terms.layer:
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * terms.weight
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * terms.weight
    return y if terms.bias is None else y + terms.bias


def _same_casts(casts: Any, stored: Tensor, dtype: torch.dtype, turned: bool) -> None:
    same_bytes(casts.plain, by_search(stored.detach(), dtype))
    if turned:
        same_bytes(casts.turned, by_search(stored.detach().flatten(0, -2).t(), dtype))
    else:
        assert casts.turned is None


@pytest.fixture(params=["compiled", "reference"])
def kind_of_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    from llmtrain.ops import fused

    if request.param == "reference":
        monkeypatch.setattr(fused, "_runs", lambda *args: False)
    elif not ops.native_loaded():
        pytest.skip("the compiled kernels are not built")
    return str(request.param)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layer", [True, False], ids=["layernorm", "rmsnorm"])
@pytest.mark.parametrize("turned", [True, False])
def test_norms(
    kind_of_kernels: str,
    dtype: torch.dtype,
    tolerance: float,
    shape: tuple[int, ...],
    layer: bool,
    turned: bool,
) -> None:
    """Both forms, with their residuals, random upstream gradients of all that is differentiable."""
    d = shape[-1]
    inputs = [_randn(*shape, seed=i, dtype=dtype) * 3 for i in (1, 2)]
    inputs += [_randn(d, seed=i) for i in ((3, 4) if layer else (3,))]

    def run(x: Tensor, branch: Tensor, *params: Tensor, exact: bool = False) -> list[Any]:
        terms = NormTerms(params[0], params[1] if layer else None, EPS, layer)
        if exact:
            total = x + branch
            return [total, _norm(total, terms), STAY * x + _norm(branch, terms), _norm(x, terms)]
        total, y, casts = add_norm_cast(x, branch, terms, turned)
        joined, joined_casts = norm_join_cast(x, branch, terms, STAY, turned)
        same, alone, _ = add_norm_cast(x, None, terms)
        assert torch.equal(same, x)
        _same_casts(casts, y, E4M3, turned)
        _same_casts(joined_casts, joined, E4M3, turned)
        return [total, y, joined, alone]

    low = [x.clone().requires_grad_() for x in inputs]
    high = [x.double().requires_grad_() for x in inputs]
    outs, exact = run(*low), run(*high, exact=True)
    upstream = [_randn(*o.shape, seed=9 + i, dtype=o.dtype) for i, o in enumerate(outs)]
    torch.autograd.backward(outs, upstream)
    torch.autograd.backward(exact, [u.double() for u in upstream])
    for a, b in zip(outs, exact, strict=True):
        _near(a, b, tolerance)
    # Torch's own norm sums the gradients of bfloat16 parameters in bfloat16.
    slack = 2 if kind_of_kernels == "compiled" else 5
    for i, (c, e) in enumerate(zip(low, high, strict=True)):
        assert c.grad is not None and c.grad.dtype == c.dtype
        _near(c.grad, e.grad, (2 if i < 2 else slack) * tolerance)


def _exact_activation(x: Tensor, name: str) -> Tensor:
    if name == "swiglu":
        gate, up = x[..., 0::2], x[..., 1::2]
        return gate / (1 + (-gate).exp()) * up
    if name == "gelu":
        return x * 0.5 * torch.special.erfc(-x / 2**0.5)
    if name == "gelu_tanh":
        return 0.5 * x * (1 + ((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh())
    return x / (1 + (-x).exp()) if name == "silu" else x.clamp(min=0)


@DTYPES
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 5, 48), (131, 14), (67, 130), (1, 2), (0, 16)], ids=str)
def test_activations(
    kind_of_kernels: str, dtype: torch.dtype, tolerance: float, name: str, shape: tuple[int, ...]
) -> None:
    x = (_randn(*shape, seed=4) * 3).to(dtype)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    y, casts = activation_cast(leaf, name, turned=True)
    exact = _exact_activation(wide, name)
    _near(y, exact, tolerance)
    _same_casts(casts, y, E4M3, True)
    dy = _randn(*y.shape, seed=5, dtype=dtype)
    y.backward(dy)
    exact.backward(dy.double())
    _near(leaf.grad, wide.grad, 2 * tolerance)
    for factor, turned in ((1.0, False), (2.0**9, True)):
        dx, casts = activation_backward_cast(dy, x, name, factor, turned)
        assert leaf.grad is not None and torch.equal(dx, leaf.grad)
        _same_casts(casts, dx * factor, E5M2, turned)


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bytes_are_those_of_the_separate_passes(dtype: torch.dtype) -> None:
    """Where the plain operators are kernels of ours or have one result only."""
    x, branch = (_randn(70, 33, seed=i, dtype=dtype) * 40 for i in (1, 2))
    weight = _randn(33, seed=3)
    terms = NormTerms(weight, None, EPS, False)
    total, y, casts = add_norm_cast(x, branch, terms)
    plain_total, plain = ops.add_rms_norm(x, branch, weight, EPS)
    assert torch.equal(total, plain_total) and torch.equal(y, plain)
    same_bytes(casts.plain, ops.fp8_cast(plain, E4M3).view(torch.uint8))
    wide = x.repeat(1, 2)
    for name, inner, expected in (
        ("swiglu", wide, ops.swiglu(wide)),
        ("relu", x, torch.relu(x)),
    ):
        y, casts = activation_cast(inner, name)
        assert torch.equal(y, expected)
        same_bytes(casts.plain, ops.fp8_cast(expected, E4M3).view(torch.uint8))


@NATIVE
def test_views_that_are_not_contiguous_or_begin_off_any_boundary() -> None:
    base = _randn(40, 66, seed=1, dtype=torch.bfloat16) * 3
    weight, bias = _randn(66, seed=2), _randn(66, seed=3)
    flat = base.flatten()
    views: list[Tensor] = [base[::2], flat[1 : 1 + 66 * 9].view(9, 66), base.t().contiguous().t()]
    for x in views:
        same = x.clone(memory_format=torch.contiguous_format)
        for layer in (True, False):
            terms = NormTerms(weight, bias if layer else None, EPS, layer)
            for f in (
                lambda v, t=terms: add_norm_cast(v, v, t, True)[2],
                lambda v, t=terms: norm_join_cast(v, v, t, STAY, True)[1],
            ):
                for a, b in zip(f(x), f(same), strict=True):
                    same_bytes(a, b.view(torch.uint8))
        for name in ACTIVATIONS:
            for a, b in zip(
                activation_cast(x, name)[:1], activation_cast(same, name)[:1], strict=True
            ):
                assert torch.equal(a, b)


def _no_worse(value: Tensor, exact: Tensor, name: str) -> None:
    """Where the formula is finite, near; where it is not, not finite either."""
    finite = exact.isfinite()
    assert not value[~finite].isfinite().any(), name
    scale = exact[finite].abs().clamp(min=1.0)
    assert ((value[finite].double() - exact[finite]).abs() <= 1e-6 * scale).all(), name


@NATIVE
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_huge_and_not_finite_numbers(name: str) -> None:
    far = [0.5, 5.0, 12.0, 14.0, 40.0, 79.0, 81.0, 1e3, 1e8, 1e18, 1e30, 3e38]
    x = torch.tensor([s * v for v in far for s in (1, -1)] + [0.0, -0.0])
    x = torch.stack((x, torch.ones_like(x)), 1).flatten() if name == "swiglu" else x
    dy = torch.ones(len(x) // (2 if name == "swiglu" else 1))
    value, casts = activation_cast(x, name)
    dx, _ = activation_backward_cast(dy, x, name)
    wide = x.double().requires_grad_()
    exact = activation_reference(wide, name)
    exact.backward(dy.double())
    assert wide.grad is not None
    _no_worse(value, exact.detach(), name)
    _no_worse(dx, wide.grad, name)
    assert not (casts.plain.view(torch.uint8) == 127).any()
    for bad in (torch.nan, torch.inf):
        x = torch.tensor([bad, 1.0, bad, 1.0])
        value, casts = activation_cast(x, name)
        assert not value[0].isfinite()
        code = casts.plain.view(torch.uint8)[0]
        assert code == (127 if value[0].isnan() else 126)


@NATIVE
@pytest.mark.parametrize("layer", [True, False])
def test_rows_with_nan_or_infinity_say_so_and_leave_the_others_alone(layer: bool) -> None:
    x = _randn(5, 20, seed=1)
    clean = x.clone()
    x[1, 3], x[3, 4] = torch.nan, torch.inf
    x[4] *= 1e17
    terms = NormTerms(torch.ones(20), None, EPS, layer)
    for f in (lambda v: add_norm_cast(v, v, terms)[1:], lambda v: norm_join_cast(v, v, terms, 1.0)):
        (y, casts), (good, good_casts) = f(x), f(clean)
        assert y[1].isnan().all() and not y[3].isfinite().all()
        assert torch.equal(y[[0, 2]], good[[0, 2]]) and y[4].isfinite().all()
        assert (casts.plain.view(torch.uint8)[1] == 127).all()
        same_bytes(casts.plain[[0, 2]], good_casts.plain[[0, 2]].view(torch.uint8))


@NATIVE
def test_results_do_not_depend_on_threads() -> None:
    x, w = _randn(700, 65, seed=1), _randn(65, seed=2)
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
            total, casts = norm_join_cast(
                leaves[0], leaves[0] * 2, NormTerms(leaves[1], leaves[1], EPS, True), STAY, True
            )
            total.backward(x)
            found = activation_backward_cast(x, x, "gelu", 4.0, True)
            outs.append([total, casts.plain, casts.turned, found[0], *found[1]])
            outs[-1] += [leaf.grad for leaf in leaves]
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*outs, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@NATIVE
def test_wrong_arguments_are_refused() -> None:
    kernels = torch.ops.llmtrain
    x, w = torch.randn(4, 6), torch.ones(6)
    calls: list[tuple[str, Callable[[], Any]]] = [
        (
            "weight: wrong length",
            lambda: kernels.add_norm_cast(x, None, w[:5], None, EPS, True, False),
        ),
        ("of LayerNorm only", lambda: kernels.add_norm_cast(x, None, w, w, EPS, False, False)),
        ("branch: wrong shape", lambda: kernels.add_norm_cast(x, x[:2], w, None, EPS, True, False)),
        ("wrong shape", lambda: kernels.norm_join_cast(x[:2], x, w, None, EPS, True, 1.0, False)),
        ("no such number", lambda: kernels.activation_cast(x, 5, False)),
        ("odd width", lambda: kernels.activation_cast(x[:, :5].contiguous(), 4, False)),
        ("wrong shapes", lambda: kernels.activation_backward_cast(x, x, 4, 1.0, False)),
        ("float32 or bfloat16", lambda: kernels.activation_cast(x.half(), 0, False)),
    ]
    for says, call in calls:
        with pytest.raises(RuntimeError, match=says):
            call()


OTHER_SETS = """
import pytest, torch
from ops import test_fused as t
from llmtrain import ops
print(ops.kernels_line())
for dtype, tolerance in ((torch.float32, 3e-6), (torch.bfloat16, 7e-3)):
    for layer in (True, False):
        t.test_norms("compiled", dtype, tolerance, (67, 129), layer, True)
    for name in t.ACTIVATIONS:
        t.test_activations("compiled", dtype, tolerance, name, (67, 130))
    t.test_bytes_are_those_of_the_separate_passes(dtype)
for name in t.ACTIVATIONS:
    t.test_huge_and_not_finite_numbers(name)
"""


@NATIVE
@pytest.mark.parametrize("level", ["avx2", "baseline"])
def test_other_instruction_sets(level: str) -> None:
    if level == ops.kernels_line().split()[-1]:
        return  # the tests above
    passes_on(level, OTHER_SETS)
