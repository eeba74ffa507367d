"""The part of ``make check-kernels`` about CUDA's kernels of sparse training, emulated on the CPU.

csrc/cuda's own source runs, a thread for each CUDA thread. Packed 2:4 weights are compared bit for
bit with torch's conversion, block-sparse products with float64, the others with their references.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable

import torch
from helpers.near import near
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from llmtrain.ops import block_sparse, masking
from llmtrain.ops.sparse_update import Rule

Build = Callable[..., ctypes.CDLL]
SOURCE = "sparse_on_cpu.cpp"


def at(x: Tensor | None) -> int | None:
    """The address of a tensor."""
    return None if x is None else x.data_ptr()


class BlockMask(ctypes.Structure):
    """As csrc/cuda/sparse.h has it."""

    _fields_ = [
        ("kept", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "high", "wide", "across")),
    ]


class MaskedAdamW(ctypes.Structure):
    """As csrc/cuda/sparse.h has it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "first", "second", "grad")),
        *((n, ctypes.c_float) for n in ("decay", "beta1", "beta2", "rate", "eps", "root")),
    ]


class SemiMask(ctypes.Structure):
    """As csrc/cuda/semi.h has it."""

    _fields_ = [
        ("kept", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "cols")),
        ("turned", ctypes.c_bool),
    ]


class BlockProduct(ctypes.Structure):
    """As csrc/cuda/blocks.h has it."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("x", "values", "bias", "y", "starts", "others", "place")),
        *((name, ctypes.c_int64) for name in ("n", "depth", "width")),
        ("scale", ctypes.c_float),
    ]


class BlockGradient(ctypes.Structure):
    """As csrc/cuda/blocks.h has it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("dy", "x", "out", "partial", "rows_of", "cols_of")),
        *((name, ctypes.c_int64) for name in ("n", "rows", "cols", "tiles", "parts")),
        ("scale", ctypes.c_float),
    ]


class BlockPack(ctypes.Structure):
    """As csrc/cuda/blocks.h has it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "values", "rows_of", "cols_of")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "tiles")),
        ("bfloat16", ctypes.c_bool),
    ]


def same_bits(a: Tensor, b: Tensor) -> None:
    """Equal with the signs of zeros."""
    assert torch.equal(a, b) and torch.equal(torch.signbit(a), torch.signbit(b))


def check_masks(library: ctypes.CDLL) -> None:
    """Masks applied, the transposable search, and AdamW under a mask."""
    rows, cols = 37, 53
    for block in ((1, 1), (4, 4), (16, 8)):
        kept = torch.rand(-(-rows // block[0]), -(-cols // block[1])) < 0.5
        mask = BlockMask(at(kept), rows, cols, *block, kept.shape[1])
        for dtype in (torch.float32, torch.bfloat16):
            x = -torch.rand(rows, cols).to(dtype)
            expected = masking.mask_apply_reference_(x.clone(), kept, block)
            library.run_mask_apply(ctypes.c_void_p(at(x)), x.element_size(), ctypes.byref(mask))
            same_bits(x, expected)
        here = [torch.randn(rows, cols), *torch.rand(2, rows, cols).unbind()]
        there, grad = [x.clone() for x in here], torch.randn(rows, cols)
        rule, step = Rule(0.02, (0.9, 0.95), 0.1), 3
        masking.masked_adamw_reference_(
            here[0], grad, (here[1], here[2]), (kept, block), rule, step
        )
        factors = (1 - 0.02 * 0.1, 0.9, 0.95, 0.02 / (1 - 0.9**step), 1e-8)
        job = MaskedAdamW(*map(at, (*there, grad)), *factors, (1 - 0.95**step) ** -0.5)
        library.run_masked_adamw(ctypes.byref(job), ctypes.byref(mask))
        for a, b in zip(there, here, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    scores, kept = torch.rand(64, 36), torch.empty(64, 36, dtype=torch.bool)
    patterns = masking.patterns_24(scores.device)
    where = ctypes.c_void_p(at(scores)), ctypes.c_void_p(at(kept))
    sizes = ctypes.c_int64(64), ctypes.c_int64(36), ctypes.c_void_p(at(patterns))
    library.run_transposable(*where, *sizes, patterns.numel())
    assert torch.equal(kept, masking.transposable_mask_reference(scores))


def semi_masks(rows: int, cols: int) -> list[Tensor]:
    """2:4 both ways, and one with fewer than two kept in places, both ways."""
    whole = masking.transposable_mask_reference(torch.rand(rows, cols))
    return [whole, whole & (torch.rand(rows, cols) < 0.7)]


def check_semi(library: ctypes.CDLL) -> None:
    """Metadata and values are those of torch's own conversion."""
    for (rows, cols), turned in itertools.product(((32, 64), (96, 160), (64, 32)), (False, True)):
        height, length = (cols, rows) if turned else (rows, cols)
        for kept in semi_masks(rows, cols):
            mask = SemiMask(at(kept), rows, cols, turned)
            # No kept weight rounds to zero, which torch would take for a pruned one.
            weight = torch.rand(rows, cols).add_(0.1).copysign(torch.randn(rows, cols))
            for given in (weight, weight.bfloat16()):
                dense = torch.where(kept, given, 0).bfloat16()
                dense = dense.t().contiguous() if turned else dense
                values, meta = sparse_semi_structured_from_dense_cutlass(dense)
                ours = torch.empty(height, length // 16, dtype=torch.int16)
                library.run_semi_meta(ctypes.byref(mask), ctypes.c_void_p(at(ours)))
                assert torch.equal(ours, meta)
                packed = torch.empty(height, length // 2, dtype=torch.bfloat16)
                half = ctypes.c_bool(given.dtype == torch.bfloat16)
                where = ctypes.c_void_p(at(given)), half, ctypes.c_void_p(at(packed))
                library.run_semi_repack(ctypes.byref(mask), *where)
                same_bits(packed, values)
        zeros, packed = torch.full((rows, cols), -0.0), packed.fill_(1)
        where = ctypes.c_void_p(at(zeros)), ctypes.c_bool(False), ctypes.c_void_p(at(packed))
        library.run_semi_repack(ctypes.byref(mask), *where)
        same_bits(packed, torch.zeros_like(packed))


def check_blocks(library: ctypes.CDLL, late: bool) -> None:
    """All three products of odd numbers of tokens, tiles that stick out and empty bands."""
    library.set_late_copies(ctypes.c_bool(late))
    cases = ((133, (192, 256), (64, 64)), (45, (72, 136), (64, 64)), (30, (200, 144), (128, 64)))
    # Copies at once: nothing but the order of stages is new.
    densities = (0.0, 0.4, 1.0) if late else (1.0,)
    for (n, shape, block), density in itertools.product(cases, densities):
        kept = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1])) < density
        index = block_sparse.block_index(kept, block, shape)
        weight, values = torch.randn(shape), block_sparse.block_values(index)
        weight[0, :9] = -0.0
        given = weight.bfloat16() if n % 2 else weight
        pack = BlockPack(*map(at, (given, values, index.rows_of, index.cols_of)), *shape)
        pack.tiles, pack.bfloat16 = index.tiles, given is not weight
        library.run_block_pack(ctypes.byref(pack))
        expected = block_sparse.block_pack_(torch.empty_like(values), weight, index)
        same_bits(values, expected)
        mask = block_sparse.expand(kept, block, shape)
        dense = torch.where(mask, weight.bfloat16().double(), 0.0)
        x, dy = torch.randn(n, shape[1]).bfloat16(), torch.randn(n, shape[0]).bfloat16()
        bias, scale = torch.randn(shape[0]).bfloat16(), 0.37
        for turned, side, bias_ in (
            (False, index.forward, bias),
            (False, index.forward, None),
            (True, index.backward, None),
        ):
            given, width = (dy, shape[1]) if turned else (x, shape[0])
            y = torch.full((n, width), torch.nan, dtype=torch.bfloat16)
            tensors = (given, values, bias_, y, side.starts, side.others, side.place)
            job = BlockProduct(*map(at, tensors), n, given.shape[1], width, scale)
            library.run_block_product(ctypes.byref(job), ctypes.c_bool(turned))
            reference = scale * (given.double() @ (dense if turned else dense.t()))
            near(y, reference if bias_ is None else reference + bias_.double(), 2**-8)
        reference = torch.where(mask, scale * (dy.double().t() @ x.double()), 0.0)
        for parts in (1, 3):
            out, partial = torch.ones(shape), torch.full((parts, index.tiles, 64, 64), torch.nan)
            tensors = (dy, x, out, partial, index.rows_of, index.cols_of)
            job = BlockGradient(*map(at, tensors), n, *shape, index.tiles, parts, scale)
            library.run_block_gradient(ctypes.byref(job))
            near(out - 1, reference, 1e-5)
            assert torch.equal(out[~mask], torch.ones(shape)[~mask])


def check_sparse(build: Build) -> None:
    """All of them. build: compiles csrc/cuda/NAME.cu for the CPU, ``check_kernels.emulated``."""
    check_masks(build("sparse", "-DMASKS", source=SOURCE))
    check_semi(build("semi", "-DSEMI", source=SOURCE))
    blocks = build("blocks", "-DBLOCKS", source=SOURCE)
    for late in (True, False):
        check_blocks(blocks, late)
    print(
        "CUDA's sparse kernels, emulated on the CPU: torch's 2:4 layout to the bit, float64's sums"
    )
