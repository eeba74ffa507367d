"""Bounds of documents, and the block mask made of them."""

from __future__ import annotations

import torch
from torch.nn.attention.flex_attention import flex_attention

from llmtrain.model.masks import document_block_mask, first_of_document
from llmtrain.ops import attention_reference

DOC_IDS = torch.tensor(
    [[0, 0, 1, 1, 1, 1, 2, 3, 3, 3, -1, -1], [5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5]]
)


def test_first_of_document() -> None:
    first = first_of_document(DOC_IDS)
    assert first.dtype == torch.int32
    assert first[0].tolist() == [0, 0, 2, 2, 2, 2, 6, 7, 7, 7, 10, 10]
    assert not first[1].any()


def test_documents_are_runs_of_equal_numbers() -> None:
    first = first_of_document(torch.tensor([[4, 4, 7, 4]], dtype=torch.int32))
    assert first[0].tolist() == [0, 0, 2, 3]


def test_flex_attention_with_the_block_mask_equals_sdpa() -> None:
    """The forward pass only: flex_attention has no backward on the CPU."""
    first = first_of_document(DOC_IDS.repeat_interleave(12, 1))
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 144, 16, generator=generator)
    k, v = (torch.randn(2, 2, 144, 16, generator=generator) for _ in range(2))
    mask = document_block_mask(first)
    out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    assert isinstance(out, torch.Tensor)
    torch.testing.assert_close(out.transpose(1, 2), attention_reference(q, k, v, first))
