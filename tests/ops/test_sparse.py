"""Sparse products against dense products with masked weights in float64."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.kernel_sets import passes_on
from torch import Tensor

from llmtrain import ops
from llmtrain.ops import sparse
from llmtrain.ops.sparse import expand, pack, unpack

NATIVE = pytest.mark.skipif(not ops.native_loaded(), reason="the compiled kernels are not built")
BLOCKS = [(1, 1), (1, 2), (2, 4), (4, 2), (8, 2), (4, 4), (16, 16), (3, 6)]
# (rows, cols, tokens): one chunk and several, ragged in all three, with a panel that is not full.
SIZES = [(24, 48, 7), (67, 541, 101), (130, 33, 800), (1, 1, 1)]


def draw(
    rows: int, cols: int, tokens: int, block: tuple[int, int], density: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight, kept, x, dy."""
    gen = torch.Generator().manual_seed(rows * cols + tokens)
    blocks = (-(-rows // block[0]), -(-cols // block[1]))
    kept = torch.rand(blocks, generator=gen) < density
    shapes = ((rows, cols), (tokens, cols), (tokens, rows))
    weight, x, dy = (torch.randn(shape, generator=gen) for shape in shapes)
    return weight, kept, x, dy


def bfloat16_products() -> bool:
    """Whether bfloat16 inputs meet weights rounded to bfloat16 (csrc/cpu/sparse_pairs.cpp)."""
    return ops.kernels_line().split()[-1] in ("amx", "avx512_bf16")


def close(ours: Tensor, exact: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    """Within the rounding of ``dtype``'s result and float32's sums of products ``scale``."""
    assert ours.shape == exact.shape
    bound = 2e-6 * scale + (0 if ours.dtype == torch.float32 else 2.0**-8) * exact.abs() + 1e-12
    worst = ((ours.double() - exact).abs() - bound).max() if ours.numel() else torch.tensor(-1)
    assert worst <= 0, f"{dtype}: {worst}"


def check(
    block: tuple[int, int],
    size: tuple[int, int, int],
    density: float,
    dtype: torch.dtype,
    plain: bool = False,
) -> None:
    """All three products, and what is packed."""
    rows, cols, _ = size
    weight, kept, x, dy = draw(*size, block, density)
    x, dy = x.to(dtype), dy.to(dtype)
    mask = expand(kept, block, (rows, cols))
    dense = weight.double() * mask
    packed = pack(weight, kept, block)
    assert torch.equal(unpack(packed.values, packed).double(), dense)
    names = ("sparse_fprop", "sparse_dgrad", "sparse_wgrad")
    fprop, dgrad, wgrad = (getattr(sparse, n + ("_reference" if plain else "")) for n in names)
    y, dx, dw = fprop(x, packed), dgrad(dy, packed), unpack(wgrad(dy, x, packed), packed)
    assert y.dtype == dx.dtype == dtype and dw.dtype == torch.float32
    x, dy = x.double(), dy.double()
    if dtype == torch.bfloat16 and not plain and bfloat16_products():
        dense = weight.bfloat16().double() * mask
    close(y, x @ dense.t(), x.abs() @ dense.abs().t(), dtype)
    close(dx, dy @ dense, dy.abs() @ dense.abs(), dtype)
    close(dw, dy.t() @ x * mask, dy.abs().t() @ x.abs(), dtype)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_are_those_of_the_masked_weight(
    block: tuple[int, int], size: tuple[int, int, int]
) -> None:
    for density in (0.0, 0.1, 0.5, 1.0):
        check(block, size, density, torch.float32)
    for density in (0.0, 0.25, 1.0):
        check(block, size, density, torch.bfloat16)
    check(block, size, 0.25, torch.float32, plain=True)


@pytest.mark.parametrize("size", [(0, 5, 3), (5, 0, 3), (5, 8, 0), (0, 0, 0)], ids=str)
def test_nothing_to_multiply(size: tuple[int, int, int]) -> None:
    for block in ((1, 1), (4, 4)):
        check(block, size, 0.5, torch.float32)


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "reference"])
def test_new_values_reach_both_directions_and_zeros_have_no_sign(fast: bool) -> None:
    weight, kept, x, dy = draw(20, 30, 9, (4, 2), 0.6)
    packed = pack(torch.full_like(weight, torch.nan), kept, (4, 2))
    weight[::3] = -0.0
    (sparse.repack if fast else sparse.repack_reference)(packed, weight)
    fresh = pack(weight, kept, (4, 2))
    for side in ("forward", "backward"):
        assert torch.equal(getattr(packed, side).values, getattr(fresh, side).values)
        assert not torch.signbit(
            getattr(packed, side).values[getattr(packed, side).values == 0]
        ).any()
    dense = unpack(packed.values, packed)
    assert torch.equal(dense, sparse.masked(weight, kept, (4, 2)))
    for zeros in (dense, sparse.masked(weight, kept, (4, 2)), unpack(-packed.values, packed)):
        assert not torch.signbit(zeros[zeros == 0]).any()
    torch.testing.assert_close(sparse.sparse_fprop(x, packed), x @ dense.t())
    torch.testing.assert_close(sparse.sparse_dgrad(dy, packed), dy @ dense)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="a mask of 3 x 3 blocks of 4 x 4"):
        pack(torch.zeros(12, 8), torch.ones(3, 3, dtype=torch.bool), (4, 4))


def test_inputs_of_any_stride() -> None:
    weight, kept, x, dy = draw(20, 30, 9, (4, 4), 0.6)
    packed = pack(weight.t().contiguous().t(), kept, (4, 4))
    y = sparse.sparse_fprop(x.t().contiguous().t(), packed)
    assert torch.equal(y, sparse.sparse_fprop(x, packed))
    grads = [sparse.sparse_wgrad(g, x, packed) for g in (dy, dy.t().contiguous().t())]
    assert torch.equal(*grads)


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [(1, 1), (4, 4)], ids=str)
def test_results_do_not_depend_on_threads(block: tuple[int, int], dtype: torch.dtype) -> None:
    weight, kept, x, dy = draw(200, 300, 1001, block, 0.3)
    x, dy = x.to(dtype), dy.to(dtype)
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            packed = pack(weight, kept, block)
            outs.append(
                (
                    packed.values,
                    packed.backward.values,
                    sparse.sparse_fprop(x, packed),
                    sparse.sparse_dgrad(dy, packed),
                    sparse.sparse_wgrad(dy, x, packed),
                )
            )
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*outs, strict=True):
        assert torch.equal(a, b)


@NATIVE
def test_wrong_arguments_are_refused() -> None:
    weight, kept, x, _ = draw(20, 30, 9, (4, 4), 0.6)
    side = pack(weight, kept, (4, 4)).forward
    product = torch.ops.llmtrain.sparse_product
    index = (side.starts, side.columns_of, side.values)
    with pytest.raises(RuntimeError, match="x: wrong shape"):
        product(x[:, 1:].contiguous(), *index, side.layout)
    with pytest.raises(RuntimeError, match="float32 or bfloat16 only"):
        product(x.half(), *index, side.layout)
    with pytest.raises(RuntimeError, match="starts: wrong length"):
        product(x, side.starts[1:].contiguous(), *index[1:], side.layout)
    with pytest.raises(RuntimeError, match="starts: not of these tiles"):
        product(x, side.starts, side.columns_of[1:].contiguous(), side.values, side.layout)
    with pytest.raises(RuntimeError, match="tiles of 1, 2 or 4"):
        product(x, *index, [20, 30, 3, 4, 256])


OTHER_SETS = """
import torch
from ops import test_sparse as t
from llmtrain import ops
print(ops.kernels_line())
for block in ((1, 1), (2, 4), (4, 4)):
    for dtype in (torch.float32, torch.bfloat16):
        t.check(block, (67, 541, 101), 0.4, dtype)
"""


@NATIVE
@pytest.mark.parametrize("level", ["avx2", "baseline"])
def test_other_instruction_sets(level: str) -> None:
    passes_on(level, OTHER_SETS)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(tmp_path: Path, sanitizer: str) -> None:
    """The kernels alone, on two threads; what torch hands them is checked by the operators."""
    root = Path(__file__).parents[2]
    wide = ops.native_loaded() and "baseline" not in ops.kernels_line()
    flags = ("-DKERNEL_SET=avx2", "-march=x86-64-v3") if wide else ("-DKERNEL_SET=baseline",)
    sources = (root / "tests/ops/sparse_sanitize.cpp", root / "csrc/cpu/sparse.cpp")
    program = tmp_path / "sanitized"
    compiler = f"g++ -std=c++20 -O0 -g -fsanitize={sanitizer} -fno-sanitize-recover=all -pthread"
    headers = ("-Wno-unknown-pragmas", f"-I{root / 'csrc/cpu'}")
    command = [*compiler.split(), *headers, *flags, *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "clean\n"
