"""The compiled CUDA library: found, loaded once where there is CUDA, and asked what it holds.

A library of its own, apart from the CPU's: it does not load where torch has no CUDA. Its
operators have fake kernels, so torch.compile traces through them without a break.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.ops.native import sources_stamp

LIBRARY = Path(__file__).with_name("_cuda.so")
SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
# The number of SwiGLU in csrc/cuda/fused.h.
SWIGLU = 4
HELP = "run: python -m llmtrain.ops.build_cuda"
NO_HEADERS = (
    "built without cuBLASLt's headers; pip install nvidia-cublas (for CUDA 12: "
    "nvidia-cublas-cu12) or set CUBLAS_INCLUDE, then build again"
)


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


def _in_place(*args: object) -> None:
    return None


# Shapes and dtypes of the operators' results, for torch.compile.
FAKES: dict[str, Callable[..., object]] = {
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
}


@cache
def load_fault() -> str | None:
    """Load the library. Returns None, or one clause that says why it is not in use."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if not LIBRARY.exists():
        return f"not built; {HELP}"
    try:
        torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"damaged or of another machine ({error}); {HELP}"
    wanted = sources_stamp(SOURCES)
    if wanted is not None and torch.ops.llmtrain_cuda.sources() != wanted:
        return f"out of date, built from other sources than csrc/cuda has now; {HELP}"
    for name, fake in FAKES.items():
        torch.library.register_fake(f"llmtrain_cuda::{name}", fake)
    return None


# torch.compile takes the answer instead of looking into it.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def ready() -> bool:
    """Whether the kernels can be called."""
    return load_fault() is None


def cuda_usable(x: Tensor) -> bool:
    """Whether the CUDA kernels take ``x``: float32 or bfloat16 on a GPU."""
    return x.is_cuda and x.dtype in (torch.float32, torch.bfloat16) and ready()


def cuda_kernels() -> Any:
    """The loaded operators, ``torch.ops.llmtrain_cuda``."""
    return torch.ops.llmtrain_cuda


@cache
def cublaslt_fault() -> str | None:
    """Why cuBLASLt does not sum FP8 weight gradients within the product; None where it does."""
    fault = load_fault()
    if fault is not None:
        return fault
    if not hasattr(torch.ops.llmtrain_cuda, "fp8_wgrad_"):
        return NO_HEADERS
    said: str = torch.ops.llmtrain_cuda.cublaslt_fault()
    return said or None


def _told(question: str) -> str | None:
    """What the library says of itself; None where it is not built or does not know the question.

    Works without CUDA: undefined symbols stay so until they are called.
    """
    if not LIBRARY.exists():
        return None
    ask = getattr(ctypes.CDLL(str(LIBRARY), mode=os.RTLD_LAZY), question, None)
    if ask is None:
        return None
    ask.restype = ctypes.c_char_p
    answer: bytes = ask()
    return answer.decode()


def built_for() -> str | None:
    """Architectures in the library, such as "sm_89 sm_90a"; None where it is not built."""
    return _told("llmtrain_cuda_architectures")


def built_with_cublaslt() -> str | None:
    """The version of cuBLAS whose headers the library was built with; None: built without."""
    return _told("llmtrain_cuda_cublaslt") or None
