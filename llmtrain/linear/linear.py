"""The linear module and the cache of its cast weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement as TensorPlacement
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from llmtrain.linear.function import Plan, apply_linear
from llmtrain.linear.matmul import FP32, Matmul
from llmtrain.linear.placement import Placement
from llmtrain.parallel.tensor import TensorParallel, local


def _advance_versions(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        params = group["params"]
        increment_version([p._local_tensor if isinstance(p, DTensor) else p for p in params])


# Fused optimizers (torch 2.13) write parameters without advancing their version counters, which
# autograd's own check for changed weights relies on as much as OperandCache does.
register_optimizer_step_post_hook(_advance_versions)


class OperandCache:
    """A parameter in the number format of the products, cast once per version.

    Micro-batches, recomputed forwards and backward share the copy, and its memory is reused when
    the parameter changes. Changes are seen through the parameter's version counter, which every
    in-place operation on the parameter and every optimizer step advances; writing through
    ``.data`` does not.
    """

    def __init__(self) -> None:
        self._key: tuple[int, int] | None = None
        self._copy: Tensor | None = None

    def get(self, weight: Tensor, matmul: Matmul) -> Tensor:
        """The operand of ``matmul``. A weight already in its dtype (as FSDP2 gathers it) or
        under torch.compile is not cached."""
        if weight.dtype == matmul.dtype or torch.compiler.is_compiling():
            return matmul.operand(weight)
        key = (weight._version, weight.data_ptr())
        if self._copy is None or self._key != key:
            with torch.inference_mode(False), torch.no_grad():
                if self._copy is not None and self._copy.shape == weight.shape:
                    self._copy.copy_(weight)
                else:
                    self._copy = matmul.operand(weight)
            self._key = key
        return self._copy

    def __deepcopy__(self, memo: object) -> OperandCache:
        return OperandCache()


class Linear(nn.Module):
    """y = scale x weight^T + bias. weight: [out_features, in_features], bias: [out_features].

    role: the parameter group of the weight ("hidden", "head"). placement: see ``Placement``; it
    takes effect among the ranks of ``tensor``. matmul: number format of the products; y has its
    dtype. scale: a constant, the forward multiplier of a parametrisation. The float32 weights are
    uninitialised until ``llmtrain.model.init_weights``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        role: str = "hidden",
        placement: Placement = Placement.REPLICATED,
        matmul: Matmul = FP32,
        tensor: TensorParallel | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.role, self.placement, self.matmul = role, placement, matmul
        self.plan = Plan(matmul, placement, tensor, scale)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=torch.float32)) if bias else None
        self._cache = OperandCache()

    def tensor_placement(self, name: str) -> TensorPlacement:
        """Placement of the parameter ``name`` on the tensor dimension of the mesh."""
        return self.placement.weight if name == "weight" else self.placement.bias

    def tensor_partial(self, name: str) -> bool:
        """Whether this rank's gradient of a replicated parameter is one summand of it."""
        # A row-parallel bias is added to this rank's tokens only.
        return name == "bias" and self.plan.by_tokens and self.placement is Placement.ROW

    def parts(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as this rank computes with them."""
        if self.bias is None:
            return local(self.weight), None
        return local(self.weight), local(self.bias, partial=self.tensor_partial("bias"))

    def operand(self) -> Tensor:
        """The weight as the products read it; the parameter itself where its dtype fits."""
        return self._cache.get(self.parts()[0], self.matmul)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] of any float dtype -> [..., out_features] of matmul.dtype; the
        parts of both under ``placement`` are those of ``apply_linear``."""
        weight, bias = self.parts()
        return apply_linear(x, weight, bias, self._cache.get(weight, self.matmul), self.plan)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features} -> {self.out_features}, bias={self.bias is not None}, "
            f"{self.matmul.name}, {self.placement.value}"
        )
