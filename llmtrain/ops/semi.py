"""2:4 weights packed for torch's semi-structured products on a GPU, for a mask that stays.

A sparse matrix [rows, length] keeps at most two of every aligned four numbers of a row: values
[rows, length / 2] beside two bits each that say which. The bits follow from the mask alone, so
they are made once (``semi_meta``) and only values are packed after an optimizer step
(``semi_repack_``); a kept weight that happens to be zero keeps its place. The layout is that of
CUTLASS for sm_80, as ``torch.sparse.SparseSemiStructuredTensorCUTLASS`` has it. cuSPARSELt has
bits in an order of its own behind the values, in one tensor that torch packs
(``torch._cslt_compress``); its values lie as CUTLASS's do (``compress_once``).

``turned`` packs the transposed matrix, without making it.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.ops.cuda import cuda_kernels, cuda_usable, ready

# The libraries that multiply, in the order of preference.
LIBRARIES = ("cusparselt", "cutlass")
NAMES = {"cusparselt": "cuSPARSELt", "cutlass": "CUTLASS"}
# Outputs and inputs in multiples of this satisfy both libraries, forward and backward; tokens are
# padded to multiples of the other.
MULTIPLE, TOKENS = 64, 16


def fits_semi(kept: Tensor, turned: bool = False) -> bool:
    """Whether every aligned four of a row (of a column) has at most two kept ones.

    kept: bool [rows, cols], in multiples of four along what is grouped.
    """
    length = kept.shape[0 if turned else 1]
    if length % 4:
        return False
    groups = (kept.t() if turned else kept).reshape(-1, length // 4, 4)
    return bool((groups.sum(2) <= 2).all())


def _pairs(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Which two of each four [..., 4] are stored, int64: fewer than two kept ones are filled up as
    torch's conversion does it."""
    a, b, d = kept[..., 0], kept[..., 1], kept[..., 3]
    first = torch.where(a, 0, torch.where(b, 1, 2))
    second = ((a == b) | d).long() + 2 * (~(a & b)).long()
    return first, second


def _order(rows: int, columns: int, device: torch.device) -> Tensor:
    """Where CUTLASS keeps word (row, column): eight rows of each of four groups of eight take
    turns, 2 x 2 words are transposed, and two columns are interleaved. int64 [rows, columns]."""
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(columns, device=device)
    to = row // 32 * 32 + row % 8 * 4 + row % 32 // 8
    shift = column % 2 - to % 2
    to, across = to + shift, column - shift
    return across // 2 * rows * 2 + to * 2 + across % 2


def semi_meta_reference(kept: Tensor, turned: bool = False) -> Tensor:
    """``semi_meta`` in plain PyTorch."""
    mask = kept.t() if turned else kept
    rows, length = mask.shape
    first, second = _pairs(mask.reshape(rows, -1, 4))
    shifts = torch.tensor([0, 4, 8, 12], device=kept.device)
    words = ((first | second << 2).view(rows, length // 16, 4) << shifts).sum(-1)
    meta = torch.empty(words.numel(), dtype=torch.int16, device=kept.device)
    # int16 has no room for the highest bit but as a sign.
    signed = torch.where(words >= 1 << 15, words - (1 << 16), words).short()
    meta[_order(rows, length // 16, kept.device).flatten()] = signed.flatten()
    return meta.view(rows, length // 16)


def semi_meta(kept: Tensor, turned: bool = False) -> Tensor:
    """The metadata of a mask: int16 [rows, length / 16] of the sparse matrix.

    kept: bool [rows, cols] with ``fits_semi``; rows of the sparse matrix in multiples of 32, their
    length in multiples of 16.
    """
    if kept.is_cuda and ready():
        meta: Tensor = cuda_kernels().semi_meta(kept.contiguous(), turned)
        return meta
    return semi_meta_reference(kept, turned)


def semi_repack_reference_(
    values: Tensor, weight: Tensor, kept: Tensor, turned: bool = False
) -> Tensor:
    """``semi_repack_`` in plain PyTorch."""
    masked = torch.where(kept, weight.float(), 0.0) + 0.0
    mask, masked = (kept.t(), masked.t()) if turned else (kept, masked)
    pairs = torch.stack(_pairs(mask.reshape(mask.shape[0], -1, 4)), -1)
    groups = masked.reshape(mask.shape[0], -1, 4)
    return values.copy_(groups.gather(-1, pairs).flatten(1))


def semi_repack_(values: Tensor, weight: Tensor, kept: Tensor, turned: bool = False) -> Tensor:
    """The kept numbers of ``weight`` [rows, cols], float32 or bfloat16, into ``values``.

    values: bfloat16 [rows, length / 2] of the sparse matrix; returned. +0.0 stands where fewer than
    two of four are kept, and for any zero.
    """
    if not cuda_usable(weight) or not weight.is_contiguous():
        return semi_repack_reference_(values, weight, kept, turned)
    cuda_kernels().semi_repack_(values, weight, kept.contiguous(), turned)
    return values


def filled_up(kept: Tensor, turned: bool = False) -> Tensor:
    """The mask of what is stored: exactly two of every four, see ``semi_meta``. bool like kept."""
    mask = kept.t() if turned else kept
    groups = mask.reshape(mask.shape[0], -1, 4)
    whole = torch.zeros_like(groups)
    for index in _pairs(groups):
        whole.scatter_(-1, index.unsqueeze(-1), True)
    whole = whole.view(mask.shape)
    return whole.t().contiguous() if turned else whole


def compress_once(kept: Tensor, turned: bool = False) -> tuple[Tensor, Tensor] | None:
    """What cuSPARSELt packs of a mask, and the part of it that ``semi_repack_`` may fill again.

    None where its values do not lie as CUTLASS's do, row after row in front of the metadata: torch
    says they do (``SparseSemiStructuredTensorCUSPARSELT``), and here it is looked up. kept: as for
    ``semi_meta``, on a GPU.
    """
    stored = filled_up(kept, turned)
    # No zero among them, neighbours differ, and all are exact in bfloat16.
    down, across = (torch.arange(n, device=kept.device) for n in kept.shape)
    sums = (down * 31 % 251).short()[:, None] + (across * 7 % 251).short()
    numbers = (sums % 251 + 1).to(torch.bfloat16)
    dense = torch.where(stored, numbers, 0)
    packed = torch._cslt_compress(dense.t().contiguous() if turned else dense)
    rows = kept.shape[1 if turned else 0]
    values = packed.view(-1)[: kept.numel() // 2].view(rows, -1)
    expected = semi_repack_(torch.empty_like(values), numbers, stored, turned)
    return (packed, values) if torch.equal(values, expected) else None


def semi_product(x: Tensor, packed: Tensor, meta: Tensor | None) -> Tensor:
    """x S^T [n, rows] for x [n, length] in bfloat16 on a GPU and the sparse matrix S.

    packed, meta: of CUTLASS; without meta what ``torch._cslt_compress`` made of S.
    """
    n = x.shape[0]
    x = F.pad(x, (0, 0, 0, -n % TOKENS)).contiguous()
    if not x.numel():
        rows = packed.shape[0] if meta is not None else packed.numel() * 16 // 9 // x.shape[1]
        return x.new_zeros(n, rows)
    y: Tensor
    if meta is None:
        y = torch._cslt_sparse_mm(packed, x.t(), transpose_result=True)
    else:
        y = torch._sparse_semi_structured_mm(packed, meta, x.t()).t().contiguous()
    return y[:n]


def first_sentence(error: RuntimeError) -> str:
    """Of what torch says, which goes on for pages."""
    return str(error).splitlines()[0].split(". ")[0]


@cache
def library_fault(library: str, device: torch.device) -> str | None:
    """Why torch's product of a library does not run on a GPU; None where it does.

    It is tried, on a small matrix, against the dense product: builds of torch and GPUs differ in
    what they take, and there have been wrong results.
    """
    name = NAMES[library]
    if library == "cusparselt" and not torch.backends.cusparselt.is_available():
        return f"torch has no {name}"
    gen = torch.Generator().manual_seed(0)
    kept = torch.rand(128, 64, 4, generator=gen).argsort(-1).argsort(-1).lt(2).view(128, 256)
    weight, x = torch.randn(128, 256, generator=gen), torch.randn(48, 256, generator=gen)
    kept, weight, x = kept.to(device), weight.to(device), x.to(device, torch.bfloat16)
    dense = torch.where(kept, weight, 0.0).bfloat16()
    try:
        if library == "cusparselt":
            packed, meta = torch._cslt_compress(dense), None
        else:
            meta = semi_meta(kept)
            packed = semi_repack_(dense.new_empty(128, 128), weight, kept)
        y = semi_product(x, packed, meta).float()
    except RuntimeError as error:
        return f"{name} refuses: {first_sentence(error)}"
    gap = (y - x.float() @ dense.float().t()).norm() / y.norm()
    return None if gap < 0.01 else f"{name} gives wrong results"
