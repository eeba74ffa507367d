"""The sparse matmul inside a linear layer, against the masked one it replaces."""

from __future__ import annotations

import pytest
import torch

from llmtrain.linear import BF16, FP32, Linear, Mask, MaskedMatmul, SparseMatmul, fp8_matmul


def layers(matmul: object, block: tuple[int, int]) -> tuple[Linear, Linear]:
    """The same layer twice, masked; the first with sparse products."""
    gen = torch.Generator().manual_seed(1)
    kept = torch.rand(-(-45 // block[0]), -(-70 // block[1]), generator=gen) < 0.4
    weight, bias = torch.randn(45, 70, generator=gen), torch.randn(45, generator=gen)
    pair = []
    for sparse in (True, False):
        layer = Linear(70, 45, True, matmul=matmul, scale=0.3)  # type: ignore[arg-type]
        with torch.no_grad():
            layer.weight.copy_(weight)
            assert layer.bias is not None
            layer.bias.copy_(bias)
        layer.set_mask(Mask(kept, block, (45, 70)), sparse=sparse)
        assert isinstance(layer.matmul, SparseMatmul) is sparse
        pair.append(layer)
    return pair[0], pair[1]


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (16, 16)], ids=str)
@pytest.mark.parametrize("dense_gradients", [False, True])
def test_layer_is_the_masked_one(block: tuple[int, int], dense_gradients: bool) -> None:
    gen = torch.Generator().manual_seed(2)
    ours, masked = layers(FP32, block)
    for layer in (ours, masked):
        assert isinstance(layer.matmul, MaskedMatmul)
        layer.matmul.dense_gradients = dense_gradients
    for _ in range(2):  # the second time with another weight
        x, upstream = torch.randn(3, 11, 70, generator=gen), torch.randn(3, 11, 45, generator=gen)
        grads = []
        for layer in (ours, masked):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            layer.zero_grad()
            y.backward(upstream)
            grads.append([y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())])
            with torch.no_grad():
                layer.weight.add_(0.01)
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=3e-5, rtol=1e-5)


def test_bfloat16_reads_unrounded_weights() -> None:
    ours, masked = layers(BF16, (4, 4))
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(3)).bfloat16()
    y, other = ours(x), masked(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, other, atol=0.06, rtol=0.02)


def test_other_formats_and_a_second_mask_stay_dense() -> None:
    mask = Mask(torch.ones(16, 16, dtype=torch.bool), (1, 1), (16, 16))
    layer = Linear(16, 16)
    layer.set_mask(mask, sparse=True)
    layer.set_matmul(fp8_matmul("mus_fp8", torch.float32))
    assert not isinstance(layer.matmul, SparseMatmul)
    layer.set_matmul(FP32)
    assert isinstance(layer.matmul, SparseMatmul)
    layer.set_mask(mask, mask, sparse=True)
    assert not isinstance(layer.matmul, SparseMatmul)
    layer.set_mask(None)
    assert layer.matmul is FP32
