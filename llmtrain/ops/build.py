"""Compile the CPU kernels: ``python -m llmtrain.ops.build``.

Needs g++ (or $CXX) and takes seconds: torch is used through its stable C++ interface, so the
library also serves other torch versions from 2.11 on. It carries a stamp of its sources, by which
one that was built before they changed is told apart. Row kernels are compiled for several
instruction sets and chosen on the machine they run on.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from llmtrain.errors import EnvironmentFault, LlmtrainError
from llmtrain.ops.native import LIBRARY, SOURCES, sources_stamp

COMMON = (
    "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unused-parameter "
    # g++ 12 takes the don't-care operands of its own vector intrinsics for uninitialised.
    "-Wno-unknown-pragmas -Wno-maybe-uninitialized -Wno-uninitialized"
)
# Vectorise the loops marked `omp simd` without OpenMP's threads; errno and traps of the
# mathematical functions are not looked at.
KERNEL = "-fopenmp-simd -fno-math-errno -fno-trapping-math"
AVX512 = "-march=x86-64-v4 -mprefer-vector-width=512"
AVX512_BF16 = f"{KERNEL} -DKERNEL_SET=avx512bf16 {AVX512} -mavx512bf16"
AMX = f"{KERNEL} -DKERNEL_SET=amx {AVX512} -mavx512bf16 -mamx-tile -mamx-bf16"

_PREFIX = ".build-"

# Object: (source, flags). KERNEL_SET names the namespace.
X86_OBJECTS = {
    "rows_avx512": ("rows.cpp", f"{KERNEL} -DKERNEL_SET=avx512 {AVX512}"),
    "rows_avx2": ("rows.cpp", f"{KERNEL} -DKERNEL_SET=avx2 -march=x86-64-v3"),
    "fp8_avx512": ("fp8.cpp", f"{KERNEL} -DKERNEL_SET=avx512 {AVX512}"),
    "fp8_avx2": ("fp8.cpp", f"{KERNEL} -DKERNEL_SET=avx2 -march=x86-64-v3"),
    "fused_avx512": ("fused.cpp", f"{KERNEL} -DKERNEL_SET=avx512 {AVX512}"),
    "fused_avx2": ("fused.cpp", f"{KERNEL} -DKERNEL_SET=avx2 -march=x86-64-v3"),
    "sparse_avx512": ("sparse.cpp", f"{KERNEL} -DKERNEL_SET=avx512 {AVX512}"),
    "sparse_avx2": ("sparse.cpp", f"{KERNEL} -DKERNEL_SET=avx2 -march=x86-64-v3"),
    "gemm_avx2": ("gemm.cpp", f"{KERNEL} -DKERNEL_SET=avx2 -march=x86-64-v3"),
    "attention_f32_avx2": (
        "attention_f32.cpp",
        f"{KERNEL} -DKERNEL_SET=avx2 -march=x86-64-v3",
    ),
    "attention_amx": ("attention.cpp", AMX),
    "products_amx": ("products.cpp", AMX),
    "attention_avx512bf16": ("attention.cpp", AVX512_BF16),
    "sparse_avx512bf16": ("sparse_pairs.cpp", AVX512_BF16),
}
OBJECTS = {
    "rows_baseline": ("rows.cpp", f"{KERNEL} -DKERNEL_SET=baseline"),
    "fp8_baseline": ("fp8.cpp", f"{KERNEL} -DKERNEL_SET=baseline"),
    "fused_baseline": ("fused.cpp", f"{KERNEL} -DKERNEL_SET=baseline"),
    "sparse_baseline": ("sparse.cpp", f"{KERNEL} -DKERNEL_SET=baseline"),
}


def run_command(command: list[str]) -> None:
    """Run a compiler. Raises EnvironmentFault with what it said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise EnvironmentFault(
            f"the compiler {command[0]} does not start ({error.strerror}); install g++ or set CXX"
        ) from None
    if done.returncode:
        raise EnvironmentFault(f"{shlex.join(command)} failed:\n{done.stderr.strip()}")


@contextmanager
def workplace(beside: Path) -> Iterator[str]:
    """A folder in ``beside`` for one build, gone at its end; first those of dead builds go.

    A build holds a lock on its folder, which ends with its process, whatever ends that.
    """
    with ExitStack() as held:
        with _locked(beside):  # or a new folder, not yet locked, would be taken for a dead one
            for old in beside.glob(f"{_PREFIX}*"):
                with suppress(OSError), _locked(old, wait=False) as alone:
                    if alone:
                        shutil.rmtree(old, ignore_errors=True)
            folder = held.enter_context(tempfile.TemporaryDirectory(dir=beside, prefix=_PREFIX))
            held.enter_context(_locked(Path(folder)))
        yield folder


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a folder; False where another process does, or none can be had there."""
    opened = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(opened)


def units() -> dict[str, tuple[str, str]]:
    """What the library is made of: object, its source and its flags. Raises EnvironmentFault."""
    from torch.utils.cpp_extension import include_paths

    stamp = sources_stamp()
    if stamp is None:
        raise EnvironmentFault(f"{SOURCES} is missing: kernels are built in a source checkout")
    objects = {
        **OBJECTS,
        "dispatch": ("dispatch.cpp", f'-O2 -DLLMTRAIN_SOURCES="{stamp}"'),
    }
    if platform.machine() in ("x86_64", "AMD64"):
        objects.update(X86_OBJECTS)
    headers = " ".join(f"-I{path}" for path in include_paths())
    # Only what torch 2.11 has; the library runs with it and with every later one.
    for name in ("ops_rows", "ops_products", "ops_fp8", "ops_fused", "ops_sparse", "ops_gemm"):
        objects[name] = (f"{name}.cpp", f"-DTORCH_TARGET_VERSION=0x020B000000000000 {headers}")
    return objects


def build(target: Path = LIBRARY, objects: dict[str, tuple[str, str]] | None = None) -> Path:
    """Compile and link ``objects`` (``units``); published by one rename.

    Raises EnvironmentFault.
    """
    import torch

    compiler = shlex.split(os.environ.get("CXX", "g++"))
    objects = units() if objects is None else objects
    with workplace(target.parent) as folder:
        commands = [
            [
                *(*compiler, *f"{COMMON} {flags}".split()),
                *("-c", str(SOURCES / source), "-o", f"{folder}/{name}.o"),
            ]
            for name, (source, flags) in objects.items()
        ]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(run_command, commands))
        library = f"{folder}/{target.name}"
        torch_libraries = str(Path(torch.__file__).parent / "lib")
        parts = [f"{folder}/{name}.o" for name in objects]
        links = [f"-L{torch_libraries}", "-ltorch_cpu", "-lc10"]
        run_command([*compiler, "-shared", "-o", library, *parts, *links])
        os.replace(library, target)
    return target


def main() -> int:
    """Build; without a compiler say so in one line. Returns the exit code."""
    try:
        print(f"built {build()}")
    except LlmtrainError as error:
        print(f"llmtrain: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
