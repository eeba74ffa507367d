"""RMSNorm and LayerNorm with statistics in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        weight = self.weight.to(x.dtype)
        if self.kind == "rmsnorm":
            out = F.rms_norm(x, (self.width,), weight, self.eps)
            return out if self.bias is None else out + self.bias.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, (self.width,), weight, bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.width}, {self.kind}, eps={self.eps:g}, bias={self.bias is not None}"
