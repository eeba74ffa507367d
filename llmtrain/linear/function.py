"""The autograd function that runs every ``Matmul``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmtrain.linear.matmul import Matmul


class _LinearFunction(torch.autograd.Function):
    """y = x weight^T + bias. Saves x only when the weight is trained."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, operand: Tensor, matmul: Matmul
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(matmul.dtype)
        ctx.matmul = matmul
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.weight_dtype = weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(flat if needs_weight else None, operand if needs_x else None)
        return matmul.fprop(flat, operand, bias).view(*x.shape[:-1], operand.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, operand = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        flat = grad.reshape(-1, grad.shape[-1]).to(ctx.matmul.dtype)
        dx = dw = db = None
        if needs_x:
            dx = ctx.matmul.dgrad(flat, operand).to(ctx.x_dtype).view(ctx.x_shape)
        if needs_weight:
            dw = ctx.matmul.wgrad(flat, x).to(ctx.weight_dtype)
        if needs_bias:
            db = flat.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dw, db, None, None


def apply_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, operand: Tensor, matmul: Matmul
) -> Tensor:
    """``x`` [..., in] times ``weight`` [out, in] transposed plus ``bias`` [out].

    operand: what ``matmul.operand`` made of the weight, possibly cached. Returns [..., out] in
    ``matmul.dtype``. Gradients flow to x, weight and bias, each in its own dtype. A weight that
    needs no gradient costs no saved input.
    """
    out: Tensor = _LinearFunction.apply(x, weight, bias, operand, matmul)  # type: ignore[no-untyped-call]
    return out
