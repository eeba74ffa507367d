"""RMSNorm and LayerNorm with statistics in float32, alone or after a residual addition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.ops import add_rms_norm, rms_norm


class Norm(nn.Module):
    """Normalisation over the last dimension, [..., width] -> the same shape and dtype.

    RMSNorm (Zhang & Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight. LayerNorm (Ba et al.
    2016): (x - mean) / sqrt(var + eps) * weight + bias. weight [width] (and bias) are float32
    parameters, used in the dtype of x; the statistics are float32.
    """

    def __init__(self, width: int, kind: str, eps: float, bias: bool) -> None:
        super().__init__()
        self.width, self.kind, self.eps = width, kind, eps
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(width, dtype=torch.float32)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rmsnorm":
            return self._biased(rms_norm(x, self.weight, self.eps))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, (self.width,), self.weight.to(x.dtype), bias, self.eps)

    def after(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual stream x + branch (x where branch is None) and its normalisation."""
        if self.kind == "rmsnorm":
            total, out = add_rms_norm(x, branch, self.weight, self.eps)
            return total, self._biased(out)
        total = x if branch is None else x + branch
        return total, self(total)

    def _biased(self, x: Tensor) -> Tensor:
        return x if self.bias is None else x + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.width}, {self.kind}, eps={self.eps:g}, bias={self.bias is not None}"
