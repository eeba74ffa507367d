"""2:4 weights in CUTLASS's layout, against torch's own conversion."""

from __future__ import annotations

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from llmtrain.ops.masking import transposable_mask_reference
from llmtrain.ops.semi import filled_up, fits_semi, library_fault, semi_meta, semi_repack_


def masks(rows: int, cols: int) -> list[torch.Tensor]:
    """2:4 both ways, and one with fewer than two kept in places."""
    gen = torch.Generator().manual_seed(rows)
    whole = transposable_mask_reference(torch.rand(rows, cols, generator=gen))
    return [whole, whole & (torch.rand(rows, cols, generator=gen) < 0.7)]


@pytest.mark.parametrize("turned", [False, True])
def test_layout_is_torchs(turned: bool) -> None:
    for kept in masks(96, 160):
        # No kept weight is zero, which torch would take for a pruned one.
        weight = torch.rand(96, 160).add_(0.1).copysign(torch.randn(96, 160))
        dense = torch.where(kept, weight, 0.0).bfloat16()
        dense = dense.t().contiguous() if turned else dense
        values, meta = sparse_semi_structured_from_dense_cutlass(dense)
        assert torch.equal(semi_meta(kept, turned), meta)
        for given in (weight, weight.bfloat16()):
            ours = semi_repack_(torch.empty_like(values), given, kept, turned)
            assert torch.equal(ours, values)


def test_kept_zeros_keep_their_place_and_are_positive() -> None:
    kept, weight = masks(64, 64)[0], torch.randn(64, 64)
    weight[::2] = -0.0
    meta = semi_meta(kept)
    values = semi_repack_(torch.empty(64, 32, dtype=torch.bfloat16), weight, kept)
    dense = sparse_semi_structured_to_dense_cutlass(values, meta)
    assert torch.equal(dense, torch.where(kept, weight, 0.0).bfloat16())
    assert not torch.signbit(values[::2]).any()


def test_which_masks_fit() -> None:
    both, _ = masks(64, 64)
    rows = torch.tensor([True, True, False, False]).repeat(64, 16)
    assert fits_semi(both) and fits_semi(both, True)
    assert fits_semi(rows) and not fits_semi(rows, True)
    assert not fits_semi(torch.ones(4, 8, dtype=torch.bool))
    assert not fits_semi(torch.zeros(4, 6, dtype=torch.bool))


@pytest.mark.parametrize("turned", [False, True])
def test_what_is_stored_is_two_of_every_four(turned: bool) -> None:
    for kept in masks(64, 96):
        stored = filled_up(kept, turned)
        groups = (stored.t() if turned else stored).reshape(-1, 4)
        assert (groups.sum(-1) == 2).all() and not (kept & ~stored).any()
        assert torch.equal(semi_meta(stored, turned), semi_meta(kept, turned))


def test_a_library_that_refuses_is_told() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert library_fault("cusparselt", torch.device("cpu")) == "torch has no cuSPARSELt"
    fault = library_fault("cutlass", torch.device("cpu"))
    assert fault is not None and fault.startswith("CUTLASS refuses: ")
