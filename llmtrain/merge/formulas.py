"""The numbers in merging rules, apart from where the tensors lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK = 1 << 20
_TINY = 1e-6


def gram(vectors: Sequence[Tensor], base: Tensor) -> Tensor:
    """Inner products of the offsets vector - base, all tensors of one shape: float64 [n, n].

    Summed block by block in float64, so that temporary memory is bounded.
    """
    flat = [v.reshape(-1) for v in vectors]
    zero = base.reshape(-1)
    out = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=base.device)
    for begin in range(0, len(zero), _BLOCK):
        part = slice(begin, begin + _BLOCK)
        origin = zero[part].double()
        offsets = torch.stack([v[part].to(origin.device).double() - origin for v in flat])
        out += offsets @ offsets.T
    return out


def stock_ratio(products: Tensor) -> Tensor:
    """Model Stock's interpolation ratio t (Jang et al. 2024, 2403.19522, eq. 7 and appendix).

    products: [..., n, n] inner products of the n offsets w_i - w_0 of a layer, n >= 2. With the
    mean cosine c of all pairs, t = n c / (1 + (n - 1) c), and the merged layer is
    t mean(w_i) + (1 - t) w_0. Offsets of length zero have cosine 0; where the denominator
    vanishes t is 0, so that the anchor stays (both as mergekit does). Returns float64 [...].
    """
    n = products.shape[-1]
    norms = products.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    scale = (norms.unsqueeze(-1) * norms.unsqueeze(-2)).clamp(min=_TINY)
    cosines = (products / scale).clamp(-1, 1)
    upper = torch.ones(n, n, dtype=torch.bool, device=products.device).triu(1)
    cosine = cosines[..., upper].mean(-1)
    denominator = 1 + (n - 1) * cosine
    singular = denominator.abs() < _TINY
    return torch.where(singular, 0.0, n * cosine / denominator.masked_fill(singular, 1.0))
