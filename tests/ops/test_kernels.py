"""Every fused operator, compiled and reference, against float64 with random upstream gradients."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import xxhash
from helpers import warm
from helpers.kernel_sets import passes_on
from torch import Tensor

from llmtrain import ops

NATIVE = pytest.mark.skipif(not ops.native_loaded(), reason="the compiled kernels are not built")
DTYPES = [
    pytest.param(torch.float32, 3e-6, id="fp32"),
    pytest.param(torch.bfloat16, 7e-3, id="bf16"),
]
EPS = 1e-5


def _randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _compare(
    ours: Callable[..., object],
    exact: Callable[..., object],
    inputs: list[Tensor],
    tolerance: float,
) -> None:
    """Outputs and gradients of ``ours`` (at the inputs' dtypes) and ``exact`` (in float64)."""
    low = [x.clone().requires_grad_() for x in inputs]
    high = [x.double().requires_grad_() for x in inputs]
    results = ours(*low), exact(*high)
    outs, references = ([r] if isinstance(r, Tensor) else list(r) for r in results)  # type: ignore[call-overload]
    upstream = [
        _randn(*r.shape, seed=i, dtype=o.dtype)
        for i, (o, r) in enumerate(zip(outs, references, strict=True))
    ]
    torch.autograd.backward(outs, upstream)
    torch.autograd.backward(references, [u.double() for u in upstream])
    pairs = [
        *zip(outs, references, strict=True),
        *((a.grad, b.grad) for a, b in zip(low, high, strict=True)),
    ]
    for i, (a, b) in enumerate(pairs):
        assert a is not None and b is not None and a.shape == b.shape
        error = (a.double() - b).norm() / b.norm()
        assert error < tolerance, (i, error)
    assert [x.grad.dtype for x in low] == [x.dtype for x in inputs]  # type: ignore[union-attr]


def _exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight


@pytest.mark.parametrize("shape", [(3, 5, 48), (131, 7), (1, 1, 200)])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_rms_norm(dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]) -> None:
    x, w = _randn(*shape, seed=1, dtype=dtype), _randn(shape[-1], seed=2, dtype=torch.float32)
    for run in (ops.rms_norm, ops.rms_norm_reference):
        _compare(lambda x, w, f=run: f(x, w, EPS), _exact_norm, [x, w], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_add_rms_norm(dtype: torch.dtype, tolerance: float) -> None:
    x, branch = (_randn(150, 33, seed=i, dtype=dtype) for i in (1, 2))
    w = _randn(33, seed=3, dtype=torch.float32)
    _compare(
        lambda x, b, w: ops.add_rms_norm(x, b, w, EPS),
        lambda x, b, w: (x + b, _exact_norm(x + b, w)),
        [x, branch, w],
        tolerance,
    )
    _compare(
        lambda x, w: ops.add_rms_norm(x, None, w, EPS),
        lambda x, w: (x * 1.0, _exact_norm(x, w)),
        [x, w],
        tolerance,
    )


def test_norm_gradient_does_not_depend_on_threads() -> None:
    x, w = _randn(700, 65, seed=1, dtype=torch.float32), torch.ones(65, requires_grad=True)
    before, grads = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            w.grad = None
            ops.rms_norm(x, w, EPS).backward(_randn(700, 65, seed=2, dtype=torch.float32))
            grads.append(w.grad)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(grads[0], grads[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3, 5, 48), (131, 14), (2, 1, 70)])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_swiglu(dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]) -> None:
    x = _randn(*shape, seed=4, dtype=dtype) * 4

    def exact(x: Tensor) -> Tensor:
        gate, up = x[..., 0::2], x[..., 1::2]
        return gate / (1 + (-gate).exp()) * up

    for run in (ops.swiglu, ops.swiglu_reference):
        _compare(run, exact, [x], tolerance)


def test_swiglu_far_out() -> None:
    gate = torch.tensor([-1e4, -100.0, -85.0, 0.0, 85.0, 100.0, 1e4])
    x = torch.stack((gate, torch.full((7,), 2.0)), 1).flatten().requires_grad_()
    out = ops.swiglu(x)
    out.sum().backward()
    torch.testing.assert_close(out, 2 * F.silu(gate), atol=1e-30, rtol=1e-5)
    assert x.grad is not None and x.grad.isfinite().all()
    assert ops.swiglu(torch.full((2,), float("nan"))).isnan().all()


@pytest.mark.parametrize(("groups", "ratio", "d", "per_row"), [(2, 1, 8, False), (2, 3, 6, True)])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_split_rotary(
    dtype: torch.dtype, tolerance: float, groups: int, ratio: int, d: int, per_row: bool
) -> None:
    b, s = 3, 5
    qkv = _randn(b, s, groups, ratio + 2, d, seed=5, dtype=dtype)
    angle = _randn(b if per_row else 1, s, d // 2, seed=6, dtype=torch.float32) * 9
    cos, sin = angle.cos(), angle.sin()

    def exact(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        turn = torch.polar(torch.ones_like(angle).double(), torch.atan2(sin, cos).double())

        def turned(x: Tensor) -> Tensor:
            half = torch.complex(x[..., : d // 2], x[..., d // 2 :])
            out = half * turn[:, :, None]
            return torch.cat((out.real, out.imag), -1).transpose(1, 2)

        q = qkv[:, :, :, :ratio].reshape(b, s, groups * ratio, d)
        return turned(q), turned(qkv[:, :, :, ratio]), qkv[:, :, :, ratio + 1].transpose(1, 2)

    for run in (ops.split_rotary, ops.split_rotary_reference):
        _compare(lambda x, f=run: f(x, cos, sin), exact, [qkv], tolerance)


def _documents(b: int, s: int) -> Tensor:
    begins = torch.rand(b, s, generator=torch.Generator().manual_seed(8)) < 0.06
    begins[:, 0] = True
    return torch.where(begins, torch.arange(s), 0).cummax(1).values.int()


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("b", "s", "h", "g", "d"), [(2, 96, 2, 2, 64), (3, 37, 4, 1, 32), (1, 161, 6, 2, 96)]
)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_attention(
    dtype: torch.dtype, tolerance: float, b: int, s: int, h: int, g: int, d: int, documents: bool
) -> None:
    first = _documents(b, s) if documents else None
    q = _randn(b, h, s, d, seed=1, dtype=dtype) * 2
    k, v = (_randn(b, g, s, d, seed=i, dtype=dtype) for i in (2, 3))

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(h // g, 1) for x in (k, v))
        score = q @ k.transpose(-1, -2) / d**0.5
        i, j = torch.arange(s)[:, None], torch.arange(s)
        seen = (j <= i)[None, None]
        if first is not None:
            seen = seen & (j >= first[:, None, :, None])
        return (score.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2)

    for run in (ops.causal_attention, ops.attention_reference):
        _compare(lambda q, k, v, f=run: f(q, k, v, first), exact, [q, k, v], tolerance)


@pytest.mark.parametrize(("s", "d"), [(520, 520), (40, 1)])
def test_attention_of_very_wide_and_very_narrow_heads(s: int, d: int) -> None:
    # 480 keys are packed in one step of the sum, 520 in two of 264: the room must do for either.
    # Turned, so that heads of one number have a stride that their shape does not ask for.
    q, k, v = (_randn(d, s, 1, 1, seed=i).permute(2, 3, 1, 0) for i in range(3))

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = torch.ones(s, s, dtype=torch.bool).tril()
        score = (q @ k.transpose(-1, -2) / d**0.5).masked_fill(~seen, -torch.inf)
        return (score.softmax(-1) @ v).transpose(1, 2)

    _compare(ops.causal_attention, exact, [q, k, v], 1e-6)
    # The gradient of a sum has no memory of its own.
    q.requires_grad_()
    (ours,) = torch.autograd.grad(ops.causal_attention(q, k, v).sum(), q)
    (theirs,) = torch.autograd.grad(exact(q.double(), k.double(), v.double()).sum(), q)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_attention_hides_no_nan() -> None:
    q, k, v = (_randn(1, 1, 64, 32, seed=i, dtype=torch.bfloat16) for i in range(3))
    k[0, 0, 40] = float("nan")
    out = ops.causal_attention(q, k, v)
    assert out[0, 40:].isnan().all() and out[0, :40].isfinite().all()


@pytest.mark.parametrize(("n", "rows", "columns"), [(1, 1, 1), (70, 33, 130), (1100, 290, 520)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)])
def test_weight_gradient(
    dtype: torch.dtype, tolerance: float, n: int, rows: int, columns: int
) -> None:
    grad, x = _randn(n, rows, seed=1, dtype=dtype), _randn(n, columns, seed=2, dtype=dtype)
    exact = grad.double().t() @ x.double()
    for run in (ops.weight_gradient, ops.weight_gradient_reference):
        out = run(grad, x)
        assert out.dtype == torch.float32
        assert (out - exact).norm() <= tolerance * exact.norm()
        into = torch.full((rows, columns), 3.0)
        assert run(grad, x, into) is into
        assert (into - 3 - exact).norm() <= tolerance * (exact.norm() + 3)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (7, 17, 5), (100, 33, 1100), (13, 1601, 70)])
def test_product(m: int, n: int, k: int) -> None:
    for turned_a, turned_b in itertools.product((False, True), repeat=2):
        a = _randn(k, m, seed=1).t() if turned_a else _randn(m, k, seed=1)
        b = _randn(k, n, seed=2).t() if turned_b else _randn(n, k, seed=2)
        exact = a.double() @ b.double().t()
        for run in (ops.product, ops.product_reference):
            assert (run(a, b) - exact).norm() <= 1e-6 * exact.norm()
            wide = torch.full((m, n + 3), 3.0)
            into = wide[:, :n]
            assert run(a, b, -0.5, into) is into
            assert (into - 3 + 0.5 * exact).norm() <= 1e-6 * (exact.norm() + 3 * (m * n) ** 0.5)
            assert (wide[:, n:] == 3).all()
    assert not ops.product(torch.empty(3, 0), torch.empty(5, 0)).any()


@NATIVE
def test_elements_of_a_product_do_not_depend_on_the_others_nor_on_threads() -> None:
    a, b = _randn(200, 1100, seed=1), _randn(90, 1100, seed=2)
    if not ops.gemm_usable(a):
        pytest.skip("not this processor's products")
    whole, before = ops.product(a, b), torch.get_num_threads()
    assert torch.equal(ops.product(a[37:60], b[11:12]), whole[37:60, 11:12])
    assert torch.equal(ops.product(b.t().contiguous().t(), a), whole.t())
    try:
        torch.set_num_threads(3)
        assert torch.equal(ops.product(a, b), whole)
    finally:
        torch.set_num_threads(before)


@NATIVE
@pytest.mark.skipif(ops.kernels_line().split()[-1] != "amx", reason="needs AMX")
def test_weight_gradient_is_not_rounded_and_does_not_depend_on_threads() -> None:
    grad, x = (_randn(900, 700, seed=i, dtype=torch.bfloat16) for i in (1, 2))
    exact = grad.double().t() @ x.double()
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            outs.append(ops.weight_gradient(grad, x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1])
    assert (outs[0] - exact).norm() < 1e-6 * exact.norm()


COMPARISON = """
import torch
from llmtrain import ops
torch.manual_seed(0)
print(ops.kernels_line())
for dtype in (torch.float32, torch.bfloat16):
    for fused, plain, shapes in (
        (ops.swiglu, ops.swiglu_reference, [(37, 50)]),
        (lambda x, w: ops.rms_norm(x, w, 1e-5), lambda x, w: ops.rms_norm_reference(x, w, 1e-5),
         [(37, 50), (50,)]),
        (ops.causal_attention, lambda *x: ops.attention_reference(*x, None),
         [(2, 4, 70, 64), (2, 2, 70, 64), (2, 2, 70, 64)]),
    ):
        inputs = [torch.randn(s).to(dtype) for s in shapes]
        results = []
        for run in (fused, plain):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = run(*leaves)
            torch.manual_seed(1)
            out.backward(torch.randn(out.shape).to(dtype))
            results.append([out] + [x.grad for x in leaves])
        for a, b in zip(*results):
            error = ((a - b).float().norm() / b.float().norm()).item()
            assert error < (1e-6 if dtype == torch.float32 else 1e-2), (dtype, fused, error)
"""


@NATIVE
@pytest.mark.parametrize("level", ["avx512_bf16", "avx512", "avx2", "baseline"])
def test_other_instruction_sets(level: str) -> None:
    passes_on(level, COMPARISON)


@NATIVE
def test_wrong_arguments_are_refused() -> None:
    kernels = torch.ops.llmtrain
    x = torch.randn(4, 6)
    with pytest.raises(RuntimeError, match="weight: wrong length"):
        kernels.rms_norm(x, torch.ones(5), EPS)
    with pytest.raises(RuntimeError, match="weight: wrong dtype"):
        kernels.rms_norm(x, torch.ones(6).double(), EPS)
    with pytest.raises(RuntimeError, match="not contiguous"):
        kernels.swiglu(x.t())
    with pytest.raises(RuntimeError, match="float32 or bfloat16 only"):
        kernels.swiglu(x.half())


STALE = """
import sys, torch
from pathlib import Path
from llmtrain.ops import native
from llmtrain import ops
native.SOURCES = Path(sys.argv[1])
print(ops.kernels_line())
print(ops.kernels_warning())
print(torch.equal(ops.swiglu(torch.ones(3, 8)), ops.swiglu_reference(torch.ones(3, 8))))
"""


def test_a_library_left_from_before_a_change_fails_these_tests_instead_of_skipping_them() -> None:
    assert ops.kernels_warning() is None


@NATIVE
def test_a_library_of_other_sources_is_told_and_not_used(tmp_path: Path) -> None:
    """After a pull the kernels may have other signatures; without csrc there is no telling."""
    from llmtrain.ops import native

    sources = tmp_path / "cpu"
    shutil.copytree(native.SOURCES, sources)
    for changed, told in ((False, "compiled, "), (True, "out of date"), (None, "compiled, ")):
        if changed:
            with (sources / "rows.h").open("a") as file:
                file.write("// changed\n")
        elif changed is None:
            shutil.rmtree(sources)
        done = warm.python(STALE, str(sources))
        assert done.returncode == 0, done.stderr
        line, warning, same = done.stdout.splitlines()
        assert told in line and same == "True"
        assert (warning == "None") is not bool(changed)
        assert not changed or (warning + line).count("make build") == 2


def test_missing_library_is_told_and_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from llmtrain.ops import native

    x = torch.randn(5, 8)
    expected = ops.swiglu(x)
    native._load.cache_clear()
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "absent.so")
    try:
        assert "plain PyTorch, slower" in ops.kernels_line() and "make build" in ops.kernels_line()
        torch.testing.assert_close(ops.swiglu(x), expected)
        (tmp_path / "absent.so").write_bytes(b"not a library")
        native._load.cache_clear()
        assert "damaged or of another machine" in ops.kernels_line()
        assert "absent.so is damaged" in (ops.kernels_warning() or "")
        whole = Path(xxhash._xxhash.__file__).read_bytes()
        (tmp_path / "absent.so").write_bytes(
            whole[:-1000]
        )  # the loader alone would end the process
        native._load.cache_clear()
        assert "cut short" in ops.kernels_line() and "make build" in ops.kernels_line()
    finally:
        monkeypatch.undo()
        native._load.cache_clear()
