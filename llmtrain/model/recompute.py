"""Activation recomputation: keep less of the forward pass, compute it again in backward."""

from __future__ import annotations

from typing import Any

import torch
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


def selective_recompute(function: Any, *args: Any) -> Any:
    """``function(*args)``, keeping the arguments and the results of ``KEPT``."""
    return checkpoint(
        function,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=_keep_products,
    )
