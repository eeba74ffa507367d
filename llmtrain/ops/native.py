"""The compiled library: found, loaded once, and asked what it can do here."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.ops.fakes import CPU_FAKES, register_fakes

LIBRARY = Path(__file__).with_name("_cpu.so")
SOURCES = Path(__file__).parents[2] / "csrc" / "cpu"
# Bytes of an ELF header that hold where its table of sections is, an entry's size and their number.
_SECTIONS = ((40, 48), (58, 60), (60, 62))


def sources_stamp(folder: Path | None = None) -> str | None:
    """A hash of the sources in ``folder`` (csrc/cpu) as they are now; None in an installation
    without them."""
    kinds = (".cpp", ".h", ".cu")
    files = [path for path in sorted((folder or SOURCES).glob("*")) if path.suffix in kinds]
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\n{path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def check_whole(library: Path) -> None:
    """Raise OSError for a shared library that is cut short: the loader would map what is not there,
    and the first touch of it ends the process (SIGBUS).

    A 64-bit ELF file ends with its table of sections. What is no such file the loader refuses.
    """
    with open(library, "rb") as file:
        head, size = file.read(64), os.fstat(file.fileno()).st_size
    if len(head) == 64 and head[:6] == b"\x7fELF\x02\x01":
        table, each, count = (int.from_bytes(head[a:b], "little") for a, b in _SECTIONS)
        if size < table + each * count:
            raise OSError(f"{library}: cut short, {size} bytes of {table + each * count}")


@cache
def _load() -> str | None:
    """Load the library. Returns None, or one clause that says why it is not in use.

    One that was built before the sources changed may have other signatures and is not used.
    """
    if not LIBRARY.exists():
        return "not built; run: make build"
    try:
        check_whole(LIBRARY)
        torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"damaged or of another machine ({error}); run: make build"
    wanted = sources_stamp()
    # Libraries from before there were stamps have none.
    stamp = torch.ops.llmtrain.sources() if hasattr(torch.ops.llmtrain, "sources") else "none"
    if wanted is not None and stamp != wanted:
        return "out of date, built from other sources than csrc/cpu has now; run: make build"
    register_fakes("llmtrain", CPU_FAKES)
    return None


def native_loaded() -> bool:
    """Whether the compiled kernels are in use."""
    return _load() is None


def kernels_line() -> str:
    """One line for the log: which kernels run on the CPU, or why they do not."""
    missing = _load()
    if missing is not None:
        return f"CPU kernels: plain PyTorch, slower (the compiled library is {missing})"
    return f"CPU kernels: compiled, {torch.ops.llmtrain.kernel_set()}"


def kernels_warning() -> str | None:
    """A sentence for the user when a compiled library is there but not in use; else None."""
    missing = _load()
    if missing is None or not LIBRARY.exists():
        return None
    return f"{LIBRARY} is {missing}. Plain PyTorch takes its place, slower"


def kernels() -> Any:
    """The loaded operators, ``torch.ops.llmtrain``."""
    return torch.ops.llmtrain


def usable(x: Tensor) -> bool:
    """Whether the compiled kernels take ``x``: on the CPU, float32 or bfloat16, and not under
    torch.compile, which fuses the references itself."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.compiler.is_compiling()
        and _load() is None
    )


# torch.compile takes the answer instead of looking into it.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _ready() -> bool:
    return _load() is None


def traceable(x: Tensor) -> bool:
    """``usable`` of operators that torch.compile is told of (``CPU_FAKES``): under it, too. Those
    that cast to FP8 are, as references would be compiled to code of other bits."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and _ready()


@cache
def _attention_ready() -> bool:
    return _load() is None and bool(torch.ops.llmtrain.has_attention())


def attention_usable(q: Tensor) -> bool:
    """Whether compiled attention takes queries ``q`` [..., d]: float32 as ``gemm_usable`` says, and
    bfloat16 on a processor with bfloat16 products, d a multiple of 32."""
    if q.dtype == torch.float32:
        return gemm_usable(q)
    return q.dtype == torch.bfloat16 and q.shape[-1] % 32 == 0 and usable(q) and _attention_ready()


@cache
def _products_ready() -> bool:
    return _load() is None and bool(torch.ops.llmtrain.has_products())


def products_usable(x: Tensor) -> bool:
    """Whether the compiled matrix products take ``x``: bfloat16 on a processor with AMX."""
    return x.dtype == torch.bfloat16 and usable(x) and _products_ready()


@cache
def _gemm_ready() -> bool:
    return _load() is None and bool(torch.ops.llmtrain.has_gemm())


def gemm_usable(x: Tensor) -> bool:
    """Whether the compiled float32 products take ``x``: on a processor with AVX2 at most."""
    return x.dtype == torch.float32 and usable(x) and _gemm_ready()
