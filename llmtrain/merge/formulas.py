"""The numbers in merging rules, apart from where the tensors lie."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK = 1 << 20
_RUN = 1 << 12
_TINY = 1e-6
_PARALLEL = 0.9995


def gram(vectors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
    """Inner products of the offsets vector - base, all tensors of one shape: float64 [n, n].

    base: None for the vectors themselves. Runs of 4096 products are summed in the vectors' dtype
    and the runs in float64, block by block, so that temporary memory is bounded.
    """
    flat = [v.reshape(-1) for v in vectors]
    zero = None if base is None else base.reshape(-1)
    place = flat[0].device if zero is None else zero.device
    out = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=place)
    for begin in range(0, len(flat[0]), _BLOCK):
        part = slice(begin, begin + _BLOCK)
        offsets = torch.stack([v[part].to(place) for v in flat])
        if zero is not None:
            offsets -= zero[part]
        whole = offsets.shape[1] // _RUN * _RUN
        runs = offsets[:, :whole].reshape(len(flat), -1, _RUN).transpose(0, 1)
        out += (runs @ runs.mT).sum(0, dtype=torch.float64)
        rest = offsets[:, whole:].double()
        out += rest @ rest.T
    return out


def slerp_weights(products: Tensor, t: float) -> tuple[float, float]:
    """Weights of two vectors at place ``t`` on the great circle between them (Shoemake 1985).

    products: their float64 [2, 2] inner products. Nearly parallel vectors (cosine beyond 0.9995)
    are interpolated linearly, as mergekit does; a vector of length zero has cosine 0.
    """
    norms = [math.sqrt(max(float(products[i, i]), 0.0)) for i in (0, 1)]
    a, b = (n if n > 1e-8 else 1.0 for n in norms)
    cosine = min(max(float(products[0, 1]) / (a * b), -1.0), 1.0)
    if abs(cosine) > _PARALLEL:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


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
