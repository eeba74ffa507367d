"""The masked matmuls of a GPU: what they pack and multiply, with torch's products replaced."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.layout_runs import build, case, one_step, outcome
from helpers.masks import products_masks
from helpers.ranks import run_ranks
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from llmtrain.config.sparsity import SparsityConfig
from llmtrain.linear import (
    BF16,
    BLOCKS,
    FP32,
    BlockMatmul,
    Linear,
    MaskedMatmul,
    SemiMatmul,
    SparseMatmul,
    fp8_matmul,
    sparse_gpu,
    sparse_matmul,
)
from llmtrain.ops.semi import LIBRARIES
from llmtrain.sparsity import Masks, sparse_layers

SHAPE = (64, 128)


def compress(dense: torch.Tensor) -> torch.Tensor:
    """A library that keeps bits behind the values, as cuSPARSELt does."""
    values, meta = sparse_semi_structured_from_dense_cutlass(dense)
    return torch.cat((values.flatten(), meta.view(torch.bfloat16).flatten()))


def compress_elsewhere(dense: torch.Tensor) -> torch.Tensor:
    """One with another layout."""
    return compress(dense).flip(0)


@pytest.fixture(autouse=True)
def product(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's 2:4 product, by way of its own conversion back to a dense matrix."""

    def semi_product(
        x: torch.Tensor, packed: torch.Tensor, meta: torch.Tensor | None
    ) -> torch.Tensor:
        if meta is None:
            flat = packed.flip(0) if torch._cslt_compress is compress_elsewhere else packed
            rows = packed.numel() * 16 // 9 // x.shape[1]
            packed = flat[: rows * x.shape[1] // 2].view(rows, -1)
            meta = flat[packed.numel() :].contiguous().view(torch.int16).view(rows, -1)
        dense = sparse_semi_structured_to_dense_cutlass(packed, meta)
        return (x.float() @ dense.float().t()).to(x.dtype)

    monkeypatch.setattr(sparse_gpu, "semi_product", semi_product)
    monkeypatch.setattr(torch, "_cslt_compress", compress)


@pytest.mark.parametrize(
    ("kind", "library"),
    [(BLOCKS, BLOCKS), *((k, n) for k in ("2:4", "2:4t", "slope") for n in LIBRARIES)],
)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_layer_is_the_masked_one(
    kind: str, library: str, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = 0.3 if elsewhere else 1.0
    if elsewhere:
        monkeypatch.setattr(torch, "_cslt_compress", compress_elsewhere)
    gen = torch.Generator().manual_seed(1)
    mask, back = products_masks(kind, SHAPE)
    weight, bias = torch.randn(SHAPE, generator=gen), torch.randn(64, generator=gen)
    layers = []
    for sparse in (True, False):
        layer = Linear(128, 64, True, matmul=BF16, scale=scale)
        with torch.no_grad():
            layer.weight.copy_(weight)
            assert layer.bias is not None
            layer.bias.copy_(bias)
        layer.set_mask(mask, back, sparse=sparse, kind=library)
        assert isinstance(layer.matmul, SemiMatmul | BlockMatmul) is sparse
        layers.append(layer)
    matmul = layers[0].matmul
    if isinstance(matmul, SemiMatmul):
        assert (matmul._backward is not None) is (kind != "2:4")
        again = elsewhere and library == "cusparselt"  # packed by the library each time
        assert (matmul._forward.packed is None) is again
    for _ in range(2):  # the second time with another weight
        x, upstream = torch.randn(3, 5, 128, generator=gen), torch.randn(3, 5, 64, generator=gen)
        found = []
        for layer in layers:
            leaf = x.bfloat16().requires_grad_()
            y = layer(leaf)
            layer.zero_grad()
            y.backward(upstream.bfloat16())
            grads = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
            found.append([y.detach(), leaf.grad, *grads])
            with torch.no_grad():
                layer.weight.add_(0.25)
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, atol=0.06, rtol=0.02)
        pruned = ~mask.box((0, 0), SHAPE)
        assert torch.equal(found[0][2][pruned], torch.zeros_like(weight)[pruned])


@pytest.mark.parametrize("kind", ["2:4t", BLOCKS])
def test_gradients_may_be_whole(kind: str) -> None:
    mask, _ = products_masks(kind, SHAPE)
    matmul = sparse_matmul(BF16, mask, kind=BLOCKS if kind == BLOCKS else "cutlass")
    matmul.dense_gradients = True
    grad, x = (matmul.pack_input(torch.randn(7, n).bfloat16()) for n in SHAPE)
    assert grad.values is not None and x.values is not None
    whole = grad.values.double().t() @ x.values.double()
    torch.testing.assert_close(matmul.wgrad(grad, x).double(), whole, atol=0.06, rtol=0.02)


def test_an_adapter_that_scales_rows_reads_the_weight() -> None:
    """DoRA's norms are of W * M, whatever the values are packed into."""
    mask, _ = products_masks("2:4t", SHAPE)
    layer = Linear(128, 64, matmul=BF16)
    torch.nn.init.normal_(layer.weight)
    layer.set_mask(mask, sparse=True, kind="cutlass")
    masked = torch.where(mask.kept, layer.weight.detach(), 0.0).bfloat16()
    assert torch.equal(layer._numbers(layer.operand()), masked)


def test_what_no_product_takes_is_masked() -> None:
    mask, back = products_masks("slope", SHAPE)
    assert type(sparse_matmul(fp8_matmul("mus_fp8", torch.bfloat16), mask)) is MaskedMatmul
    assert type(sparse_matmul(FP32, mask, back)) is MaskedMatmul
    assert type(sparse_matmul(FP32, mask)) is SparseMatmul


def trained(rank: int, text: str, kind: str) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of two steps under tensor parallelism and FSDP2."""
    what = case(steps=2, n_layers=1, d_model=128, d_ff=128)
    module = build(rank, 4, replace(what, compute=torch.bfloat16), {"tensor": 2})
    section = SparsityConfig(granularity=text, density=0.5)
    layers = sparse_layers(module.model_cfg, section)
    masks = Masks(module.model, module.params, module.layout, layers)
    masks.draw(1)
    for name, layer in masks.layers.items():
        layer.set_mask(masks.mask(name), sparse=bool(kind), kind=kind)
        assert type(layer.matmul) is ({"": MaskedMatmul, BLOCKS: BlockMatmul}.get(kind, SemiMatmul))
    ours = outcome(module, [one_step(module, step) for step in range(2)])
    return ours.losses, ours.norms


@pytest.mark.dist
@pytest.mark.parametrize(("text", "kind"), [("64x64", BLOCKS), ("2:4t", "cutlass")])
def test_layouts_train_as_with_dense_products(text: str, kind: str) -> None:
    """Weights are gathered, packed for forward and freed, and packed again for backward."""
    sparse, dense = run_ranks(4, lambda rank: [trained(rank, text, k) for k in (kind, "")])[0]
    assert sparse[0] == pytest.approx(dense[0], rel=2e-3)
    assert sparse[1] == pytest.approx(dense[1], rel=2e-2)
