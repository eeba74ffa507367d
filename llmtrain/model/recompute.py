"""Activation recomputation: keep less of the forward pass, compute it again in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

aten = torch.ops.aten

# Operators that exist only on some builds.
KEPT_BY_NAME = frozenset({"llmtrain.attention.default", "mkldnn._linear_pointwise.default"})

# Results worth keeping: matrix products and attention. Norms, rotations and activations are
# bandwidth only and are computed again.
KEPT = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten._scaled_mm.default,
        aten.linear.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.higher_order.flex_attention,
    }
)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op in KEPT or str(op) in KEPT_BY_NAME
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_products() -> Any:
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]


def full_recompute(function: Any, *args: Any) -> Any:
    """``function(*args)``, keeping only the arguments."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def compiled_selective_recompute(function: Any, *args: Any) -> Any:
    """``function(*args)``, keeping the arguments and the results of ``KEPT``; under torch.compile,
    where ``forgotten`` does not work."""
    return checkpoint(
        function,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=_keep_products,
    )


@dataclass(frozen=True)
class _Again:
    """What stands for a saved tensor: how to compute it, and its shape."""

    function: Callable[[], Tensor]
    shape: torch.Size


@contextmanager
def forgotten(value: Tensor, again: Callable[[], Tensor]) -> Iterator[None]:
    """Within, a consumer that saves ``value`` for backward saves ``again`` instead.

    again: computes ``value`` from what is kept anyway (a norm's input is kept by the norm); it
    runs in backward, without gradient. Unlike a checkpoint around the whole block, nothing else
    runs twice: no product, and no collective of tensor-parallel ranks.
    """
    place, size, dtype = value.data_ptr(), value.numel(), value.dtype

    def pack(saved: Tensor) -> Tensor | _Again:
        same = (saved.data_ptr(), saved.numel(), saved.dtype) == (place, size, dtype)
        return _Again(again, saved.shape) if same else saved

    def unpack(kept: Tensor | _Again) -> Tensor:
        if not isinstance(kept, _Again):
            return kept
        with torch.no_grad():
            return kept.function().view(kept.shape)

    with saved_tensors_hooks(pack, unpack):
        yield
