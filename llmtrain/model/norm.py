"""RMSNorm and LayerNorm with statistics in float32, alone or after a residual addition."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement as TensorPlacement

from llmtrain.model.pair import HiddenLayer
from llmtrain.ops import (
    Casts,
    NormTerms,
    add_norm_cast,
    add_rms_norm,
    fuses_norm,
    norm_join_cast,
    rms_norm,
)
from llmtrain.parallel.collectives import gather_rows, sum_both_ways
from llmtrain.parallel.tensor import TensorParallel, local


class Norm(nn.Module):
    """Normalisation over the last dimension, [..., width] -> the same shape and dtype.

    RMSNorm (Zhang & Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight. LayerNorm (Ba et al.
    2016): (x - mean) / sqrt(var + eps) * weight + bias. weight [width] (and bias) are float32
    parameters, used in the dtype of x; the statistics are float32.

    partial: among tensor-parallel ranks, each sees other tokens or other heads, so that the
    parameters' gradients are summed over them.
    """

    def __init__(
        self, width: int, kind: str, eps: float, bias: bool, *, partial: bool = False
    ) -> None:
        super().__init__()
        self.width, self.kind, self.eps, self.partial = width, kind, eps, partial
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(width, dtype=torch.float32)) if bias else None

    def tensor_placement(self, name: str) -> TensorPlacement:
        """Placement of a parameter on the tensor dimension of the mesh."""
        return Replicate()

    def tensor_partial(self, name: str) -> bool:
        """Whether this rank's gradient of a replicated parameter is one summand of it."""
        return self.partial

    def part(self, param: Tensor) -> Tensor:
        """A parameter as this rank computes with it."""
        return local(param, partial=self.partial)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """gain: a constant that multiplies the result, folded into the parameters."""
        weight, bias = self.part(self.weight), None if self.bias is None else self.part(self.bias)
        if gain != 1.0:
            weight, bias = weight * gain, None if bias is None else bias * gain
        if self.kind == "rmsnorm":
            normed = rms_norm(x, weight, self.eps)
            return normed if bias is None else normed + bias.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        return F.layer_norm(x, (self.width,), weight.to(x.dtype), bias, self.eps)

    def after(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual stream x + branch (x where branch is None) and its normalisation."""
        if self.kind == "rmsnorm":
            total, out = add_rms_norm(x, branch, self.part(self.weight), self.eps)
            return total, self._biased(out)
        total = x if branch is None else x + branch
        return total, self(total)

    def casts(self, x: Tensor) -> bool:
        """Whether a cast of the result to FP8 is fused with this norm of ``x``."""
        return fuses_norm(x, self.kind == "layernorm", self.bias is not None)

    def _terms(self, gain: float = 1.0) -> NormTerms:
        weight, bias = self.part(self.weight), None if self.bias is None else self.part(self.bias)
        if gain != 1.0:
            weight, bias = weight * gain, None if bias is None else bias * gain
        return NormTerms(weight, bias, self.eps, self.kind == "layernorm")

    def after_with_casts(
        self, x: Tensor, branch: Tensor | None, layer: HiddenLayer
    ) -> tuple[Tensor, Tensor, Casts]:
        """``after``, and the normalised stream as ``layer`` reads it (``casts``)."""
        turned, reads = layer.wants(x)
        return add_norm_cast(x, branch, self._terms(), turned, reads)

    def joined_with_casts(
        self, x: Tensor, branch: Tensor, stay: float, gain: float, layer: HiddenLayer
    ) -> tuple[Tensor, Casts]:
        """stay x + gain norm(branch), and that as ``layer`` reads it."""
        return norm_join_cast(x, branch, self._terms(gain), stay, layer.wants(x)[0])

    def _biased(self, x: Tensor) -> Tensor:
        return x if self.bias is None else x + self.part(self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.width}, {self.kind}, eps={self.eps:g}, bias={self.bias is not None}"


class SplitRMSNorm(Norm):
    """RMSNorm over a width that tensor-parallel ranks share: x holds this rank's part of it.

    sharing: the ranks that hold the same part (a key head with fewer heads than ranks), or
    None. Their copies count once in the mean of squares, and they share the part's parameters.
    """

    def __init__(
        self,
        width: int,
        eps: float,
        bias: bool,
        tensor: TensorParallel,
        sharing: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(width, "rmsnorm", eps, bias)
        self.tensor, self.sharing = tensor, sharing

    def tensor_placement(self, name: str) -> TensorPlacement:
        return Shard(0)

    def part(self, param: Tensor) -> Tensor:
        own = local(param)
        return own if self.sharing is None else gather_rows(own, self.sharing)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        assert gain == 1.0  # of queries and keys, not of branches
        copies = 1 if self.sharing is None else self.sharing.size()
        wide = x.float()
        squares = wide.square().sum(-1, keepdim=True) / copies
        mean = sum_both_ways(squares, self.tensor.group) / self.width
        scale = torch.rsqrt(mean + self.eps)
        return self._biased((wide * scale * self.part(self.weight).float()).to(x.dtype))
