"""2:4 and block-sparse products on a GPU against float64 products with a dense mask."""

from __future__ import annotations

import pytest
import torch
from helpers.masks import products_masks
from helpers.near import near
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from llmtrain.linear import BF16, BLOCKS, Linear, sparse_matmul
from llmtrain.ops import cuda_fault
from llmtrain.ops.block_sparse import (
    block_dgrad,
    block_fprop,
    block_index,
    block_pack_,
    block_values,
    block_wgrad,
)
from llmtrain.ops.masking import transposable_mask_reference
from llmtrain.ops.semi import (
    LIBRARIES,
    compress_once,
    library_fault,
    semi_meta,
    semi_meta_reference,
    semi_repack_,
)
from llmtrain.ops.sparse import expand
from llmtrain.sparsity import Case, pick_products
from llmtrain.sparsity.case import BOTH, FORWARD

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_kernels_are_there() -> None:
    """Everything else would pass on the references."""
    assert cuda_fault() is None


@pytest.mark.parametrize("turned", [False, True])
def test_packing_is_torchs(turned: bool) -> None:
    gen = torch.Generator().manual_seed(1)
    for shape in ((64, 128), (1024, 320)):
        kept = transposable_mask_reference(torch.rand(shape, generator=gen))
        for mask in (kept, kept & (torch.rand(shape, generator=gen) < 0.7)):
            weight = torch.rand(shape, generator=gen).add_(0.1)
            dense = torch.where(mask, weight, 0.0).bfloat16()
            dense = dense.t().contiguous() if turned else dense
            values, meta = sparse_semi_structured_from_dense_cutlass(dense)
            assert torch.equal(semi_meta(mask.cuda(), turned).cpu(), meta)
            assert torch.equal(semi_meta_reference(mask, turned), meta)
            for given in (weight, weight.bfloat16()):
                ours = torch.empty_like(values, device="cuda")
                semi_repack_(ours, given.cuda(), mask.cuda(), turned)
                assert torch.equal(ours.cpu(), values)


@pytest.mark.parametrize("turned", [False, True])
def test_where_cusparselt_keeps_values(turned: bool) -> None:
    """Else it packs all anew after every step, which is right and slower."""
    device = torch.device("cuda", torch.cuda.current_device())
    if (fault := library_fault("cusparselt", device)) is not None:
        pytest.skip(fault)
    kept = transposable_mask_reference(torch.rand(256, 192)).cuda()
    assert compress_once(kept, turned) is not None
    assert compress_once(kept & (torch.rand(256, 192) < 0.7).cuda(), turned) is not None


CASES = pytest.mark.parametrize(
    ("n", "shape", "block"),
    [
        (1, (64, 64), (64, 64)),
        (333, (192, 256), (64, 64)),
        (1000, (200, 136), (64, 64)),
        (4096, (1024, 512), (128, 64)),
    ],
)


@CASES
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_block_products(
    n: int, shape: tuple[int, int], block: tuple[int, int], density: float
) -> None:
    gen = torch.Generator().manual_seed(n)
    grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    kept = torch.rand(grid, generator=gen) < density
    weight = torch.randn(shape, generator=gen)
    mask = expand(kept, block, shape)
    dense = torch.where(mask, weight.bfloat16().double(), 0.0)
    index = block_index(kept.cuda(), block, shape)
    values = block_pack_(block_values(index), weight.cuda(), index)
    x, dy = (torch.randn(n, size, generator=gen).bfloat16() for size in shape[::-1])
    bias, scale = torch.randn(shape[0], generator=gen).bfloat16(), 0.37
    y = block_fprop(x.cuda(), values, index, bias.cuda(), scale)
    near(y, scale * x.double() @ dense.t() + bias.double(), 2**-8)
    near(block_dgrad(dy.cuda(), values, index, scale), scale * dy.double() @ dense, 2**-8)
    into = torch.ones(shape, device="cuda")
    block_wgrad(dy.cuda(), x.cuda(), index, into, scale)
    reference = torch.where(mask, scale * dy.double().t() @ x.double(), 0.0)
    near(into - 1, reference, 1e-4)
    assert torch.equal(into.cpu()[~mask], torch.ones(shape)[~mask])


def test_no_tokens() -> None:
    index = block_index(torch.ones(1, 1, dtype=torch.bool).cuda(), (64, 64), (64, 64))
    values = block_pack_(block_values(index), torch.randn(64, 64).cuda(), index)
    x = torch.empty(0, 64, dtype=torch.bfloat16, device="cuda")
    assert block_fprop(x, values, index).shape == (0, 64)
    assert not block_wgrad(x, x, index).any()


@pytest.mark.parametrize("tokens", [48, 37])
@pytest.mark.parametrize(
    ("kind", "library"),
    [(BLOCKS, BLOCKS), *((k, n) for k in ("2:4", "2:4t", "slope") for n in LIBRARIES)],
)
def test_layer(kind: str, library: str, tokens: int) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    if library in LIBRARIES and (fault := library_fault(library, device)) is not None:
        pytest.skip(fault)
    shape = (256, 192)
    mask, back = products_masks(kind, shape, "cuda")
    layer = Linear(shape[1], shape[0], True, matmul=BF16, scale=0.5).cuda()
    torch.nn.init.normal_(layer.weight)
    assert layer.bias is not None
    torch.nn.init.normal_(layer.bias)
    layer.set_mask(mask, back, sparse=True, kind=library)
    assert type(layer.matmul) is type(sparse_matmul(BF16, mask, back, library))
    gen = torch.Generator().manual_seed(4)
    for _ in range(2):  # the second time with another weight
        x = torch.randn(tokens, shape[1], generator=gen).bfloat16()
        upstream = torch.randn(tokens, shape[0], generator=gen).bfloat16()
        leaf = x.cuda().requires_grad_()
        layer.zero_grad()
        y = layer(leaf)
        y.backward(upstream.cuda())
        kept = mask.box((0, 0), shape).cpu()
        second = kept if back is None else back.box((0, 0), shape).cpu()
        weight = layer.weight.detach().cpu().bfloat16().double()
        bias = layer.bias.detach().cpu().bfloat16().double()
        near(y.detach(), 0.5 * x.double() @ torch.where(kept, weight, 0).t() + bias, 2**-6)
        assert leaf.grad is not None and layer.weight.grad is not None
        near(leaf.grad, 0.5 * upstream.double() @ torch.where(second, weight, 0), 2**-6)
        dw = 0.5 * upstream.double().t() @ x.double()
        # Dense ones are rounded to bfloat16 by torch.
        rounding = 1e-4 if library == BLOCKS else 2**-7
        near(layer.weight.grad, torch.where(kept, dw, 0.0), rounding)
        assert torch.equal(layer.weight.grad.cpu()[~kept], torch.zeros_like(dw)[~kept].float())
        with torch.no_grad():
            layer.weight.mul_(-0.5)


def test_the_choice_is_made_and_remembered(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path))
    device = torch.device("cuda", torch.cuda.current_device())
    cases = [
        Case(1024, 1024, (1, 1), 50, "bfloat16", FORWARD),
        Case(1024, 1024, (1, 1), 50, "bfloat16", BOTH),
        Case(1024, 1024, (64, 64), 10, "bfloat16"),
        Case(1024, 1024, (4, 4), 10, "bfloat16"),
    ]
    first = pick_products(cases, gpu=device)
    for case in cases[:3]:
        assert first[case].reason or (first[case].dense > 0 and first[case].kind), first[case]
    assert not first[cases[2]].reason
    assert "64x64 alone" in first[cases[3]].reason
    assert pick_products(cases, gpu=device) == first
