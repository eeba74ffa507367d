"""The compiled CUDA library: found, loaded once where there is CUDA, and asked what it holds.

A library of its own, apart from the CPU's: it does not load where torch has no CUDA. Its
operators have fake kernels, so torch.compile traces through them without a break.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.errors import EnvironmentFault
from llmtrain.ops.fakes import CUDA_FAKES, register_fakes
from llmtrain.ops.native import check_whole, sources_stamp

LIBRARY = Path(__file__).with_name("_cuda.so")
SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
HELP = "run: python -m llmtrain.ops.build_cuda"
_FOREIGN = "not llmtrain's library of CUDA kernels"
NO_HEADERS = (
    "built without cuBLASLt's headers; pip install nvidia-cublas (for CUDA 12: "
    "nvidia-cublas-cu12) or set CUBLAS_INCLUDE, then build again"
)


@cache
def load_fault() -> str | None:
    """Load the library. Returns None, or one clause that says why it is not in use."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if not LIBRARY.exists():
        return f"not built; {HELP}"
    try:
        check_whole(LIBRARY)
        torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"damaged or of another machine ({error}); {HELP}"
    if not hasattr(torch.ops.llmtrain_cuda, "sources"):
        return f"{_FOREIGN}; {HELP}"
    wanted = sources_stamp(SOURCES)
    if wanted is not None and torch.ops.llmtrain_cuda.sources() != wanted:
        return f"out of date, built from other sources than csrc/cuda has now; {HELP}"
    said = torch.ops.llmtrain_cuda.device_fault()
    if said:
        return f"not for this GPU or its driver ({said}); {HELP}"
    register_fakes("llmtrain_cuda", CUDA_FAKES)
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
    Raises EnvironmentFault where it is no library of this machine.

    Works without CUDA: undefined symbols stay so until they are called.
    """
    if not LIBRARY.exists():
        return None
    try:
        check_whole(LIBRARY)
        library = ctypes.CDLL(str(LIBRARY), mode=os.RTLD_LAZY)
    except OSError as error:
        raise EnvironmentFault(f"damaged or of another machine ({error}); {HELP}") from None
    ask = getattr(library, question, None)
    if ask is None:
        return None
    ask.restype = ctypes.c_char_p
    answer: bytes = ask()
    return answer.decode()


def built_for() -> str | None:
    """Architectures in the library, such as "sm_89 sm_90a"; None where it is not built.
    Raises EnvironmentFault where what is there is not ours, or is damaged."""
    told = _told("llmtrain_cuda_architectures")
    if told is None and LIBRARY.exists():
        raise EnvironmentFault(f"{LIBRARY} is {_FOREIGN}; {HELP}")
    return told


def built_with_cublaslt() -> str | None:
    """The version of cuBLAS whose headers the library was built with; None: built without."""
    return _told("llmtrain_cuda_cublaslt") or None
