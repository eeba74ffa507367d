"""Compile the CUDA kernels: ``python -m llmtrain.ops.build_cuda``.

Needs nvcc ($NVCC, $CUDA_HOME/bin or the path) and a C++ compiler, but neither a GPU nor a CUDA
build of torch: torch is used through its stable C++ interface (from 2.11 on).
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llmtrain.errors import EnvironmentFault, LlmtrainError
from llmtrain.ops.build import run_command
from llmtrain.ops.cuda import LIBRARY, SOURCES
from llmtrain.ops.native import sources_stamp

# Ampere casts in software and has no FP8 products; Ada, Hopper and Blackwell have both.
ARCHITECTURES = ("80", "89", "90a", "100")


def find_nvcc() -> Path:
    """The CUDA compiler. Raises EnvironmentFault saying where it was looked for."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    named = [os.environ.get("NVCC"), f"{home}/bin/nvcc" if home else None, "nvcc"]
    for name in (*named, "/usr/local/cuda/bin/nvcc"):
        found = shutil.which(name) if name else None
        if found:
            return Path(found).resolve()
    raise EnvironmentFault(
        "no nvcc found; install the CUDA toolkit, or name it: NVCC=/path/to/nvcc"
    )


def build(target: Path = LIBRARY) -> Path:
    """Compile and link the library, published by one rename. Raises EnvironmentFault."""
    import torch
    from torch.utils.cpp_extension import include_paths

    stamp = sources_stamp(SOURCES)
    if stamp is None:
        raise EnvironmentFault(f"{SOURCES} is missing: kernels are built in a source checkout")
    nvcc = find_nvcc()
    host = shlex.split(os.environ.get("CXX", "g++"))
    headers = [f"-I{path}" for path in include_paths()]
    names = " ".join(f"sm_{name}" for name in ARCHITECTURES)
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in ARCHITECTURES]
    shared = ["-std=c++20", "-O3", "-ccbin", host[0]]
    defines = [
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020B000000000000",
        f'-DLLMTRAIN_SOURCES="{stamp}"',
        f'-DLLMTRAIN_ARCHITECTURES="{names}"',
    ]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        library = f"{folder}/{target.name}"
        hidden = ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
        # C++ by nvcc too, which knows where its headers are.
        flags = {".cu": [*shared, *hidden, *codes], ".cpp": [*shared, *hidden, *defines, *headers]}
        units = sorted(path for path in SOURCES.iterdir() if path.suffix in flags)
        parts = [f"{folder}/{unit.name}.o" for unit in units]
        commands = [
            [str(nvcc), *flags[unit.suffix], "-c", str(unit), "-o", part]
            for unit, part in zip(units, parts, strict=True)
        ]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(run_command, commands))
        torch_libraries = f"-L{Path(torch.__file__).parent / 'lib'}"
        links = [
            "-shared",
            "-ccbin",
            host[0],
            "-cudart",
            "static",
            torch_libraries,
            "-ltorch_cpu",
            "-lc10",
        ]
        run_command([str(nvcc), *links, *parts, "-o", library])
        os.replace(library, target)
    return target


def main() -> int:
    """Build; without a compiler say so in one line. Returns the exit code."""
    try:
        print(f"built {build()} for {' '.join('sm_' + name for name in ARCHITECTURES)}")
    except LlmtrainError as error:
        print(f"llmtrain: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
