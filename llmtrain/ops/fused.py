"""Norms and activations whose results are cast to FP8 in the same pass.

For products with static scales: the input of the next layer in e4m3, and in backward the gradient
of the layer before in e5m2. What is cast is the result as it is stored, so that the bytes are those
of the separate passes. On the CPU results are always written too. On CUDA they can be left out
(``keep``): what stands in their place has the shape and no memory, and must not be read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from llmtrain.ops.cuda import cuda_kernels, cuda_usable
from llmtrain.ops.fp8 import E4M3, E5M2, fp8_cast, fp8_transpose_reference
from llmtrain.ops.glu import swiglu_reference
from llmtrain.ops.native import kernels, traceable
from llmtrain.ops.norm import rms_norm_reference

# In the order of their numbers in csrc (fused.h).
MULTIPLE = 16
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "swiglu")


class Casts(NamedTuple):
    """FP8 copies of a matrix: as it lies [..., k], and transposed [k, n], None where not asked."""

    plain: Tensor
    turned: Tensor | None


class NormTerms(NamedTuple):
    """A norm over the last dimension: weight [d], bias [d] or None (LayerNorm only), of any float
    dtype and used in that of its input; layer: LayerNorm, else RMSNorm."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    layer: bool


class _How(NamedTuple):
    eps: float
    layer: bool
    turned: bool
    keep: bool = True
    stay: float = 1.0


def _cast_reference(x: Tensor, dtype: torch.dtype, turned: bool) -> Casts:
    plain = fp8_cast(x.detach(), dtype)
    across = fp8_transpose_reference(plain.flatten(0, -2)) if turned else None
    return Casts(plain, across)


def _norm_reference(x: Tensor, norm: NormTerms) -> Tensor:
    if not norm.layer:
        return rms_norm_reference(x, norm.weight, norm.eps)
    bias = None if norm.bias is None else norm.bias.to(x.dtype)
    return F.layer_norm(x, (x.shape[-1],), norm.weight.to(x.dtype), bias, norm.eps)


def _cuda_takes(x: Tensor, width: int) -> bool:
    """Whether CUDA's kernels take a result of ``width`` like ``x``: its rows and columns are
    multiples of 16, as FP8 products want them too."""
    return not (x.shape[:-1].numel() % MULTIPLE or width % MULTIPLE) and cuda_usable(x)


def _runs(x: Tensor, width: int | None = None) -> bool:
    return traceable(x) or _cuda_takes(x, x.shape[-1] if width is None else width)


def _width(x: Tensor, name: str) -> int:
    """Of the activation's result."""
    return x.shape[-1] // 2 if name == "swiglu" else x.shape[-1]


def fuses_norm(x: Tensor, layer: bool, bias: bool) -> bool:
    """Whether a norm with its cast gives the bits of the separate passes and is quicker.

    On the CPU that is RMSNorm alone: LayerNorm is torch's there, which rounds elsewhere. On CUDA
    results differ in their last digits.
    """
    return _cuda_takes(x, x.shape[-1]) or (traceable(x) and not layer and not bias)


def fuses_activation(x: Tensor, name: str) -> bool:
    """The same for an activation; never for one that is not in ``ACTIVATIONS``."""
    if x.is_cuda:
        return name in ACTIVATIONS and _cuda_takes(x, _width(x, name))
    return traceable(x) and name in ("swiglu", "relu")


def _library(x: Tensor) -> Any:
    return cuda_kernels() if x.is_cuda else kernels()


def _extra(x: Tensor, keep: bool) -> tuple[bool, ...]:
    """The argument that only CUDA's operators have."""
    return (keep,) if x.is_cuda else ()


def _shown(y: Tensor, like: Tensor, width: int) -> Tensor:
    """``y``, or where it was left out a tensor of its shape without memory."""
    if y.numel() or not like.numel():
        return y
    return y.new_empty(1).expand(*like.shape[:-1], width)


def _norm_gradients(
    grad: Tensor, x: Tensor, saved: tuple[Tensor, Tensor, Tensor], residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of a norm's input (plus ``residual``), weight and bias; saved: weight in the dtype
    of x, mean (empty: RMSNorm), rstd."""
    weight, mean, rstd = saved
    grad = grad.contiguous()
    residual = None if residual is None else residual.contiguous()
    if x.is_cuda:
        return _norm_gradients_cuda(grad, x, saved, residual)
    if mean.numel() == 0 and rstd.numel():
        dx, d_weight = _library(x).rms_norm_backward(grad, x, weight, rstd, residual)
        return dx, d_weight, None
    out: tuple[Tensor, Tensor, Tensor] = _library(x).layer_norm_backward(
        grad, x, weight, mean, rstd, residual
    )
    return out


def _norm_gradients_cuda(
    grad: Tensor, x: Tensor, saved: tuple[Tensor, Tensor, Tensor], residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """By torch's own kernels, which take the statistics as [..., 1]."""
    weight, mean, rstd = saved
    shape, rstd = [x.shape[-1]], rstd.view(*x.shape[:-1], 1)
    if mean.numel():
        mean, needed = mean.view(*x.shape[:-1], 1), [True, True, True]
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(
            grad, x, shape, mean, rstd, weight, torch.zeros_like(weight), needed
        )
    else:
        dx, dw = torch.ops.aten._fused_rms_norm_backward(grad, x, shape, rstd, weight, [True, True])
        db = None
    return dx if residual is None else dx + residual, dw, db


class _AddNormCast(Function):
    """(x + branch, norm of it, e4m3 of the norm, that transposed)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        how: _How,
    ) -> tuple[Tensor, ...]:
        x = x.contiguous()
        scale = weight.to(x.dtype)
        shift = None if bias is None else bias.to(x.dtype)
        branch = None if branch is None else branch.contiguous()
        total, y, mean, rstd, plain, across = _library(x).add_norm_cast(
            x, branch, scale, shift, how.eps, how.layer, how.turned, *_extra(x, how.keep)
        )
        total = x if branch is None else total
        ctx.save_for_backward(total, scale, mean, rstd)
        ctx.two, ctx.weight_dtype = branch is not None, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(plain, across)
        ctx.set_materialize_grads(False)
        return total, _shown(y, x, x.shape[-1]), plain, across

    @staticmethod
    def backward(ctx: Any, d_total: Tensor | None, dy: Tensor, *rest: Any) -> tuple[Any, ...]:
        total, *saved = ctx.saved_tensors
        dx, dw, db = _norm_gradients(dy, total, tuple(saved), d_total)
        db = None if ctx.bias_dtype is None or db is None else db.to(ctx.bias_dtype)
        return dx, dx if ctx.two else None, dw.to(ctx.weight_dtype), db, None


class _NormJoinCast(Function):
    """(stay x + norm(branch), e4m3 of it, that transposed)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        how: _How,
    ) -> tuple[Tensor, ...]:
        branch = branch.contiguous()
        scale = weight.to(x.dtype)
        shift = None if bias is None else bias.to(x.dtype)
        total, mean, rstd, plain, across = _library(x).norm_join_cast(
            x.contiguous(), branch, scale, shift, how.eps, how.layer, how.stay, how.turned
        )
        ctx.save_for_backward(branch, scale, mean, rstd)
        ctx.stay, ctx.weight_dtype = how.stay, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(plain, across)
        return total, plain, across

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *rest: Any) -> tuple[Any, ...]:
        branch, *saved = ctx.saved_tensors
        dx, dw, db = _norm_gradients(grad, branch, tuple(saved), None)
        db = None if ctx.bias_dtype is None or db is None else db.to(ctx.bias_dtype)
        d_stream = grad if ctx.stay == 1.0 else grad * ctx.stay
        return d_stream, dx, dw.to(ctx.weight_dtype), db, None


def add_norm_cast(
    x: Tensor, branch: Tensor | None, norm: NormTerms, turned: bool = False, keep: bool = True
) -> tuple[Tensor, Tensor, Casts]:
    """(x + branch, its norm, e4m3 of the norm); x, branch: [..., d] of one dtype, float32 or
    bfloat16; branch None: nothing is added. turned: the transposed copy too. keep: see above."""
    if not _runs(x):
        total = x if branch is None else x + branch
        y = _norm_reference(total, norm)
        return total, y, _cast_reference(y, E4M3, turned)
    how = _How(norm.eps, norm.layer, turned, keep)
    total, y, plain, across = _AddNormCast.apply(x, branch, norm.weight, norm.bias, how)  # type: ignore[no-untyped-call]
    return total, y, Casts(plain, across if turned else None)


def norm_join_cast(
    x: Tensor, branch: Tensor, norm: NormTerms, stay: float, turned: bool = False
) -> tuple[Tensor, Casts]:
    """(stay x + norm(branch), e4m3 of it): the end of a branch with its norm at the end."""
    if not _runs(x):
        normed = _norm_reference(branch, norm)
        total = x + normed if stay == 1.0 else torch.add(normed, x, alpha=stay)
        return total, _cast_reference(total, E4M3, turned)
    how = _How(norm.eps, norm.layer, turned, stay=stay)
    total, plain, across = _NormJoinCast.apply(x, branch, norm.weight, norm.bias, how)  # type: ignore[no-untyped-call]
    return total, Casts(plain, across if turned else None)


def activation_reference(x: Tensor, name: str) -> Tensor:
    """The activation ``name`` of ``ACTIVATIONS`` in plain PyTorch; swiglu halves the width."""
    if name == "swiglu":
        return swiglu_reference(x)
    if name in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
    return F.silu(x) if name == "silu" else F.relu(x)


def activation_backward_reference(dy: Tensor, x: Tensor, name: str) -> Tensor:
    """The gradient of its input, in plain PyTorch."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(activation_reference(leaf, name), leaf, dy)
    return grad


class Handoff:
    """A gradient that the activation's backward has cast for the layer below it.

    The activation puts it there right before that layer's backward runs, which takes it only
    for the tensor it was made of.
    """

    def __init__(self, factor: float, turned: bool) -> None:
        self.factor, self.turned = factor, turned
        self._of: int | None = None
        self._casts: Casts | None = None

    def put(self, grad: Tensor, casts: Casts) -> None:
        """Leave what ``grad`` was cast to."""
        self._of, self._casts = grad.data_ptr(), casts

    def take(self, grad: Tensor) -> Casts | None:
        """The cast of ``grad``, once; None where it is another tensor."""
        found = self._casts if grad.data_ptr() == self._of else None
        self._of = self._casts = None
        return found


class _ActivationCast(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, name: str, turned: bool, keep: bool, handoff: Handoff | None
    ) -> tuple[Tensor, ...]:
        x = x.contiguous()
        number = ACTIVATIONS.index(name)
        y, plain, across = _library(x).activation_cast(x, number, turned, *_extra(x, keep))
        ctx.save_for_backward(x)
        ctx.name, ctx.handoff = name, handoff
        ctx.mark_non_differentiable(plain, across)
        return _shown(y, x, plain.shape[-1]), plain, across

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *rest: Any) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        handoff: Handoff | None = ctx.handoff
        if handoff is None:
            return activation_backward_cast(dy, x, ctx.name)[0], *(None,) * 4
        dx, casts = activation_backward_cast(dy, x, ctx.name, handoff.factor, handoff.turned)
        handoff.put(dx, casts)
        return dx, *(None,) * 4


def activation_cast(
    x: Tensor,
    name: str,
    turned: bool = False,
    keep: bool = True,
    handoff: Handoff | None = None,
) -> tuple[Tensor, Casts]:
    """(activation of x [..., f], e4m3 of it); swiglu: of [..., 2 f], see ``ops.swiglu``.

    handoff: where backward leaves the cast gradient of x for the layer that made x.
    """
    if not _runs(x, _width(x, name)):
        y = activation_reference(x, name)
        return y, _cast_reference(y, E4M3, turned)
    y, plain, across = _ActivationCast.apply(x, name, turned, keep, handoff)  # type: ignore[no-untyped-call]
    return y, Casts(plain, across if turned else None)


def activation_backward_cast(
    dy: Tensor,
    x: Tensor,
    name: str,
    factor: float = 1.0,
    turned: bool = False,
) -> tuple[Tensor, Casts]:
    """(gradient of x, e5m2 of ``factor`` times it); dy: of the activation's result. factor: a power
    of two. The gradient is always written: a zero-bubble pipeline keeps it for later."""
    if not _runs(x):
        dx = activation_backward_reference(dy, x, name)
        return dx, _cast_reference(dx if factor == 1.0 else dx * factor, E5M2, turned)
    x = x.contiguous()
    dx, plain, across = _library(x).activation_backward_cast(
        dy.contiguous(), x, ACTIVATIONS.index(name), factor, turned
    )
    return dx, Casts(plain, across if turned else None)
