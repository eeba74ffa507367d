"""Numbers that differ by roundings alone."""

from __future__ import annotations

from torch import Tensor


def near(value: Tensor, reference: Tensor, tolerance: float) -> None:
    """Each element within ``tolerance`` of the largest of ``reference``, which is in float64 on
    the host."""
    gap = (value.double().cpu() - reference).abs().max()
    assert gap <= tolerance * reference.abs().max().clamp(min=1e-9), gap
