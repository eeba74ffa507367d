"""The linear module and the cache of its cast weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement as TensorPlacement
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from llmtrain.linear.compact import Compact, SpreadMatmul, compact_weight
from llmtrain.linear.fp8 import Fp8Matmul
from llmtrain.linear.frozen import FrozenMatmul, Parts, frozen_matmul
from llmtrain.linear.function import Given, Plan, apply_linear
from llmtrain.linear.masked import Mask, MaskedMatmul
from llmtrain.linear.matmul import ALONE, FP32, Matmul
from llmtrain.linear.operand import Operand, Packed, Reach, plain
from llmtrain.linear.placement import Placement
from llmtrain.linear.sparse import SparseMatmul
from llmtrain.linear.sparse_gpu import BlockMatmul, SemiMatmul, sparse_matmul
from llmtrain.linear.te import TeMatmul
from llmtrain.ops import Casts, Handoff, unpack
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
        self._copy: Operand | None = None
        self._prepared = False

    def prepare(self, weight: Tensor, matmul: Matmul, reach: Reach = ALONE) -> None:
        """Bring the copy up to date, for compiled code that takes it unseen: a graph neither knows
        versions of parameters nor should it cast them again for each micro-batch."""
        self.get(weight, matmul, reach)
        self._prepared = True

    def get(self, weight: Tensor, matmul: Matmul, reach: Reach = ALONE) -> Operand:
        """The operand of ``matmul``. A weight already in its dtype (as FSDP2 gathers it) is not
        cached, nor one under torch.compile that was not prepared."""
        fits = weight.dtype == matmul.dtype and not matmul.packs
        if torch.compiler.is_compiling() and self._prepared and self._copy is not None:
            return self._copy
        if fits or torch.compiler.is_compiling():
            return matmul.operand(weight, reach)
        key = (weight._version, weight.data_ptr())
        if self._copy is None or self._key != key:
            with torch.inference_mode(False), torch.no_grad():
                copy = self._copy
                if isinstance(copy, Tensor) and copy.shape == weight.shape:
                    copy.copy_(weight)
                else:
                    self._copy = matmul.operand(weight, reach)
            self._key = key
        assert self._copy is not None
        return self._copy

    def clear(self) -> None:
        """Forget the copy: another number format is to follow."""
        self._key = self._copy = None
        self._prepared = False

    def __deepcopy__(self, memo: object) -> OperandCache:
        return OperandCache()


PACKED = ("codes", "scales", "row_scales")


class Adapter(Protocol):
    """What stands beside a layer; ``linear.adapter.LowRank`` is one. directed: whether it scales
    the rows of the result (``direct``)."""

    directed: bool
    sharded: bool

    def __call__(self, x: Tensor, y: Tensor) -> Tensor: ...

    def direct(
        self, z: Tensor, stored: Tensor, read: Callable[[], Tensor], plan: Plan
    ) -> Tensor: ...


class Linear(nn.Module):
    """y = scale x weight^T + bias. weight: [out_features, in_features], bias: [out_features].

    role: the parameter group of the weight ("hidden", "head"). placement: see ``Placement``; it
    takes effect among the ranks of ``tensor``. matmul: number format of the products; y has its
    dtype. scale: a constant, the forward multiplier of a parametrisation. adapter: see
    ``linear.adapter``. The float32 weights are
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
        self._format = matmul
        self.mask: Mask | None = None
        self._back: Mask | None = None
        self._sparse, self._kind, self._dense_gradients = False, "", False
        self.packed: tuple[str, ...] = ()
        self.compact: Compact | None = None
        self._gathered = False
        self.adapter: Adapter | None = None
        self._thawed: tuple[FrozenMatmul, dict[str, nn.Parameter]] | None = None

    def freeze(self, name: str) -> None:
        """Keep the weight packed in a format of ``linear.frozen`` from now on, as ``codes``,
        ``scales`` and ``row_scales``; they hold nothing until ``fill_frozen``."""
        matmul = frozen_matmul(name, self.matmul.dtype)
        with self.weight.device:
            parts = matmul.form.empty(self.out_features, self.in_features)
        del self.weight
        for leaf, part in zip(PACKED, parts, strict=True):
            if part is not None:
                self.register_parameter(leaf, nn.Parameter(part, requires_grad=False))
        self.packed = PACKED[: sum(part is not None for part in parts)]
        self.set_matmul(matmul)

    def thaw(self, keep: bool) -> None:
        """Have a float32 ``weight`` of the packed numbers from now on. keep: for ``refreeze``."""
        assert isinstance(self.matmul, FrozenMatmul)
        codes, values = getattr(self, self.packed[0]), self.rows()
        if isinstance(codes, DTensor):
            mesh, placements = codes.device_mesh, codes.placements
            values = DTensor.from_local(values, mesh, placements, run_check=False)
        stored = {leaf: getattr(self, leaf) for leaf in self.packed}
        for leaf in stored:
            delattr(self, leaf)
        self._thawed = (self.matmul, stored) if keep else None
        self.packed = ()
        self.weight = nn.Parameter(values, requires_grad=False)
        self.set_matmul(self.matmul.plain)

    @property
    def thawed(self) -> bool:
        """Whether ``refreeze`` can undo ``thaw``."""
        return self._thawed is not None

    def refreeze(self) -> None:
        """Back to the packed weight before ``thaw``."""
        assert self._thawed is not None
        matmul, stored = self._thawed
        del self.weight
        for leaf, param in stored.items():
            self.register_parameter(leaf, param)
        self.packed, self._thawed = tuple(stored), None
        self.set_matmul(matmul)

    def packed_parts(self) -> Parts:
        """The packed weight as this rank's memory holds it: under FSDP2 its own rows."""
        found = [getattr(self, leaf) for leaf in self.packed]
        return Parts(*(p.to_local() if isinstance(p, DTensor) else p for p in found))

    def rows(self) -> Tensor:
        """The rows of the weight in this rank's memory, as the products read them, float32."""
        if isinstance(self.matmul, FrozenMatmul):
            return self.matmul.form.unpack(self.packed_parts(), self.matmul.dtype).float()
        weight = self.dense_weight()
        stored = weight.to_local() if isinstance(weight, DTensor) else weight
        return stored.to(self.matmul.dtype).float()

    def dense_weight(self) -> Tensor:
        """The weight [out, in]; a copy with zeros where the kept values alone are held."""
        return self.weight if self.compact is None else self.compact.spread(self.weight.detach())

    @property
    def adaptable(self) -> bool:
        """Whether an adapter can stand beside the layer."""
        return True

    def tensor_placement(self, name: str) -> TensorPlacement:
        """Placement of the parameter ``name`` on the tensor dimension of the mesh."""
        if name == "bias":
            return self.placement.bias
        whole = name != "weight" and getattr(self, name).shape[1] == 1
        # The scales of whole rows are the same on all ranks that share the rows.
        shares = whole and self.placement is Placement.ROW
        return Replicate() if shares else self.placement.weight

    def tensor_partial(self, name: str) -> bool:
        """Whether this rank's gradient of a replicated parameter is one summand of it."""
        if self.placement is Placement.REPLICATED:
            return self.plan.token_shard is not None
        # A row-parallel bias is added to this rank's tokens only.
        return name == "bias" and self.plan.by_tokens and self.placement is Placement.ROW

    def parts(self) -> tuple[Tensor, Tensor | None]:
        """Weight (its codes where it is packed) and bias as this rank computes with them."""
        stored = getattr(self, self.packed[0]) if self.packed else self.weight
        weight = local(stored, partial=self.tensor_partial("weight"))
        if self.bias is None:
            return weight, None
        return weight, local(self.bias, partial=self.tensor_partial("bias"))

    def set_matmul(self, matmul: Matmul) -> None:
        """Compute in another number format from now on; a mask stays."""
        self._format = matmul
        if self.compact is not None:
            assert self.mask is not None
            matmul = self.compact.matmul(matmul, self.mask, self._back)
        elif self.mask is not None and self._sparse:
            matmul = sparse_matmul(matmul, self.mask, self._back, self._kind)
        elif self.mask is not None:
            matmul = MaskedMatmul(matmul, self.mask, self._back)
        if isinstance(matmul, MaskedMatmul):
            matmul.dense_gradients = self._dense_gradients
        # What is spread out for a product is not kept for the next.
        freed = self._gathered or isinstance(matmul, SpreadMatmul)
        self.matmul, self.plan = matmul, replace(self.plan, matmul=matmul, freed=freed)
        self._cache.clear()

    def set_mask(
        self,
        mask: Mask | None,
        back: Mask | None = None,
        *,
        sparse: bool = False,
        kind: str = "",
    ) -> None:
        """Compute with the weight times ``mask`` from now on, see ``MaskedMatmul``; None: with all
        of it. The mask is that of this rank's tensor-parallel part, on its device. sparse: by
        ``sparse_matmul`` of a ``kind``, where number format and masks allow."""
        assert self.compact is None
        self.mask, self._back, self._sparse, self._kind = mask, back, sparse, kind
        self.set_matmul(self._format)

    def want_dense_gradients(self, wanted: bool) -> None:
        """Whether the weight's gradient is whole or zero outside the mask, from now on."""
        assert isinstance(self.matmul, MaskedMatmul)
        self._dense_gradients = self.matmul.dense_gradients = wanted

    @torch.no_grad()
    def pack_weight(self) -> Compact:
        """Hold the weights at the mask alone from now on: ``weight`` is a new parameter of their
        values, see ``linear.compact``. A plain weight, in this process' memory as a whole."""
        assert self.mask is not None and self.compact is None
        tiled = isinstance(self.matmul, SparseMatmul)
        self.compact, values = compact_weight(self.weight, self.mask, tiled)
        self.weight = nn.Parameter(values, requires_grad=self.weight.requires_grad)
        self.set_matmul(self._format)
        return self.compact

    @torch.no_grad()
    def unpack_weight(self) -> None:
        """Undo ``pack_weight``: ``weight`` is a new parameter [out, in] with zeros."""
        trains = self.weight.requires_grad
        self.weight = nn.Parameter(self.dense_weight(), requires_grad=trains)
        self.compact = None
        self.set_matmul(self._format)

    def set_freed(self) -> None:
        """FSDP2 owns the weight from now on: see ``Plan.freed``."""
        # Packed codes are what it gathers and frees.
        self._gathered = not self.packed
        self.plan = replace(self.plan, freed=self._gathered)
        if self.adapter is not None:
            self.adapter.sharded = True

    def operand(self) -> Operand:
        """The weight as the products read it; the parameter itself where its dtype fits."""
        return self._operand(self.parts()[0])

    def _operand(self, weight: Tensor) -> Operand:
        if self.packed:
            return Packed(weight, *(local(getattr(self, leaf)) for leaf in self.packed[1:]))
        reach = self.plan.weight_reach
        if self.plan.freed:
            return self.matmul.operand(weight, reach)
        return self._cache.get(weight, self.matmul, reach)

    def prepare(self) -> None:
        """Before compiled code runs the layer: cast an FP8 weight that has changed, once a step."""
        if isinstance(self.matmul, Fp8Matmul) and not self.plan.freed:
            self._cache.prepare(self.parts()[0], self.matmul, self.plan.weight_reach)

    def takes_casts(self, x: Tensor) -> bool:
        """Whether what makes this layer's input ``x`` may cast it to e4m3 for it."""
        static = isinstance(self.matmul, Fp8Matmul) and self.matmul.static
        return static and x.dtype == self.matmul.dtype

    def wants(self, x: Tensor) -> tuple[bool, bool]:
        """Of a cast input like ``x``: whether its transposed copy is used, and whether anything
        reads the values themselves."""
        column = self.plan.column
        gathers = column is not None and column.sequence
        turned = x.is_cuda and torch.is_grad_enabled() and self.weight.requires_grad
        reads = self.adapter is not None or bool(self._forward_pre_hooks or self._forward_hooks)
        return turned and not gathers, reads

    def handoff(self, y: Tensor) -> Handoff | None:
        """Where the gradient of the output may be left in e5m2; ``y``: like the output."""
        row = self.plan.row
        if torch.compiler.is_compiling():
            return None  # It would be left at one place of a graph and taken at another.
        if not self.takes_casts(y) or (row is not None and row.sequence):
            return None
        if self.adapter is not None and self.adapter.directed:
            return None  # The product's own gradient is another one.
        assert isinstance(self.matmul, Fp8Matmul)
        return Handoff(self.matmul.gradient_scale, y.is_cuda and self.weight.requires_grad)

    def forward(
        self, x: Tensor, casts: Casts | None = None, handoff: Handoff | None = None
    ) -> Tensor:
        """x: [..., in_features] of any float dtype -> [..., out_features] of matmul.dtype; the
        parts of both under ``placement`` are those of ``apply_linear``.

        casts: x in e4m3, where its producer has cast it (``takes_casts``). handoff: see there.
        """
        weight, bias = self.parts()
        if isinstance(self.matmul, TeMatmul):
            return self.matmul.run(x, weight, bias, self.plan.scale)
        operand, given = self._operand(weight), Given(casts, handoff, self._summed())
        adapter = self.adapter
        if adapter is None:
            return apply_linear(x, weight, bias, operand, self.plan, given)
        if not adapter.directed:
            adapted: Tensor = adapter(x, apply_linear(x, weight, bias, operand, self.plan, given))
            return adapted
        y = adapter(x, apply_linear(x, weight, None, operand, self.plan, given))
        adapted = adapter.direct(y, weight, lambda: self._numbers(operand), self.plan)
        return adapted if bias is None else adapted + bias.to(adapted.dtype)

    def _summed(self) -> Tensor | None:
        """The parameter to whose gradient products may add theirs (``summing_gradients``). Not that
        of FSDP2, which sums what it has gathered itself."""
        if self.plan.freed or torch.compiler.is_compiling():
            return None
        sums = isinstance(self.matmul, Fp8Matmul) and self.weight.requires_grad
        return self.weight if sums else None

    def _numbers(self, operand: Operand) -> Tensor:
        """The weight as the products read it."""
        if isinstance(self.matmul, FrozenMatmul):
            return self.matmul.weight(operand)
        if isinstance(self.matmul, SemiMatmul | BlockMatmul):
            return self.matmul.mask.zero_(self.parts()[0].detach().to(self.matmul.dtype, copy=True))
        if isinstance(self.matmul, SparseMatmul):
            return unpack(self.matmul.index.values, self.matmul.index)
        return plain(operand, self.matmul.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features} -> {self.out_features}, bias={self.bias is not None}, "
            f"{self.matmul.name}, {self.placement.value}"
        )
