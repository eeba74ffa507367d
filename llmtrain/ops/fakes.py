"""Shapes and dtypes of the compiled operators' results, by which torch.compile traces through them
without a break."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The number of SwiGLU in csrc (fused.h).
SWIGLU = 4


def _format(e5m2: bool) -> torch.dtype:
    return torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn


def _cast(x: Tensor, e5m2: bool, factor: float) -> Tensor:
    return torch.empty(x.shape, dtype=_format(e5m2), device=x.device)


def _cast_transpose(x: Tensor, e5m2: bool, factor: float) -> tuple[Tensor, Tensor]:
    return _cast(x, e5m2, factor), _cast(x.t(), e5m2, factor)


def _transpose(x: Tensor) -> Tensor:
    return torch.empty((x.shape[1], x.shape[0]), dtype=x.dtype, device=x.device)


def _weight(x: Tensor) -> tuple[Tensor, Tensor]:
    return _cast_transpose(x, False, 1.0)


def _copies(x: Tensor, width: int, e5m2: bool, turned: bool) -> tuple[Tensor, Tensor]:
    """FP8 copies of a result like ``x`` of another width."""
    plain = x.new_empty((*x.shape[:-1], width), dtype=_format(e5m2))
    across = (width, x.shape[:-1].numel()) if turned else (0,)
    return plain, x.new_empty(across, dtype=_format(e5m2))


def _statistics(x: Tensor, layer: bool) -> tuple[Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    mean = x.new_empty(rows if layer else 0, dtype=torch.float32)
    return mean, x.new_empty(rows, dtype=torch.float32)


def _add_norm_cast(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, *how: Any
) -> tuple[Tensor, ...]:
    _, layer, turned, keep = how
    total = x.new_empty(0) if branch is None else torch.empty_like(x)
    y = torch.empty_like(x) if keep else x.new_empty(0)
    return total, y, *_statistics(x, layer), *_copies(x, x.shape[-1], False, turned)


def _norm_join_cast(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, *how: Any
) -> tuple[Tensor, ...]:
    _, layer, _, turned = how
    return torch.empty_like(x), *_statistics(x, layer), *_copies(x, x.shape[-1], False, turned)


def _activation_cast(
    x: Tensor, activation: int, turned: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    width = x.shape[-1] // 2 if activation == SWIGLU else x.shape[-1]
    y = x.new_empty((*x.shape[:-1], width) if keep else 0)
    return y, *_copies(x, width, False, turned)


def _activation_backward_cast(
    dy: Tensor, x: Tensor, activation: int, factor: float, turned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_copies(x, x.shape[-1], True, turned)


def _transposable(scores: Tensor, patterns: Tensor) -> Tensor:
    return torch.empty(scores.shape, dtype=torch.bool, device=scores.device)


def _semi_meta(kept: Tensor, turned: bool) -> Tensor:
    rows, length = (kept.shape[1], kept.shape[0]) if turned else kept.shape
    return kept.new_empty((rows, length // 16), dtype=torch.int16)


def _block_product(x: Tensor, values: Tensor, bias: Tensor | None, *tiles_and_how: Any) -> Tensor:
    return x.new_empty((x.shape[0], tiles_and_how[3]))


def _in_place(*args: object) -> None:
    return None


CUDA_FAKES: dict[str, Callable[..., object]] = {
    "fp8_cast": _cast,
    "fp8_cast_transpose": _cast_transpose,
    "fp8_transpose": _transpose,
    "fp8_weight": _weight,
    "add_norm_cast": _add_norm_cast,
    "norm_join_cast": _norm_join_cast,
    "activation_cast": _activation_cast,
    "activation_backward_cast": _activation_backward_cast,
    "transposable_mask": _transposable,
    "mask_apply_": _in_place,
    "masked_adamw_": _in_place,
    "semi_meta": _semi_meta,
    "semi_repack_": _in_place,
    "block_pack_": _in_place,
    "block_product": _block_product,
    "block_gradient_": _in_place,
}


def _uncast(x: Tensor, bfloat16: bool) -> Tensor:
    return torch.empty(
        x.shape, dtype=torch.bfloat16 if bfloat16 else torch.float32, device=x.device
    )


def _rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(weight.shape, dtype=torch.float32)


def _layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dx, d_weight = _rms_norm_backward(dy, x, weight, rstd, residual)
    return dx, d_weight, torch.empty_like(d_weight)


# The CPU's operators always write their results; casts have no factor.
CPU_FAKES: dict[str, Callable[..., object]] = {
    "fp8_cast": lambda x, e5m2: _cast(x, e5m2, 1.0),
    "fp8_cast_transpose": lambda x, e5m2: _cast_transpose(x, e5m2, 1.0),
    "fp8_transpose": _transpose,
    "fp8_uncast": _uncast,
    "add_norm_cast": lambda *args: _add_norm_cast(*args, True),
    "norm_join_cast": _norm_join_cast,
    "activation_cast": lambda x, number, turned: _activation_cast(x, number, turned, True),
    "activation_backward_cast": _activation_backward_cast,
    "rms_norm_backward": _rms_norm_backward,
    "layer_norm_backward": _layer_norm_backward,
}


def register_fakes(library: str, fakes: dict[str, Callable[..., object]]) -> None:
    """Tell torch.compile of the operators of a loaded library."""
    for name, fake in fakes.items():
        torch.library.register_fake(f"{library}::{name}", fake)
