"""Compile the CUDA kernels: ``python -m llmtrain.ops.build_cuda``.

Needs nvcc ($NVCC, $CUDA_HOME/bin or the path) and a C++ compiler, but neither a GPU nor a CUDA
build of torch: torch is used through its stable C++ interface (from 2.11 on). Where cuBLASLt's
headers are found ($CUBLAS_INCLUDE, the package nvidia-cublas that CUDA builds of torch bring, or
the toolkit), FP8 weight gradients are summed within the product. $LLMTRAIN_CUDA_ARCHITECTURES, such
as "90a", builds for fewer architectures, sooner.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llmtrain.errors import EnvironmentFault, LlmtrainError
from llmtrain.ops.build import run_command, workplace
from llmtrain.ops.cuda import LIBRARY, NO_HEADERS, SOURCES
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


def architectures() -> tuple[str, ...]:
    """What to build for: $LLMTRAIN_CUDA_ARCHITECTURES or all. Raises EnvironmentFault."""
    asked = os.environ.get("LLMTRAIN_CUDA_ARCHITECTURES", "").replace(",", " ").split()
    unknown = [name for name in asked if name not in ARCHITECTURES]
    if unknown:
        raise EnvironmentFault(
            f"LLMTRAIN_CUDA_ARCHITECTURES: {unknown[0]} is none of {', '.join(ARCHITECTURES)}"
        )
    return tuple(asked) or ARCHITECTURES


def find_cublaslt() -> Path | None:
    """The folder of cuBLASLt's headers; None where there is none. Those of the Python environment
    come first: they are of the library that torch loads."""
    import torch

    packages = Path(torch.__file__).parents[1] / "nvidia"
    named = os.environ.get("CUBLAS_INCLUDE")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    folders = [Path(named)] if named else []
    folders += [packages / "cu13/include", packages / "cublas/include", Path(home) / "include"]
    return next((folder for folder in folders if (folder / "cublasLt.h").exists()), None)


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
    names = " ".join(f"sm_{name}" for name in architectures())
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures()]
    cores = len(os.sched_getaffinity(0))
    shared = ["-std=c++20", "-O3", "-ccbin", host[0]]
    defines = [
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020B000000000000",
        f'-DLLMTRAIN_SOURCES="{stamp}"',
        f'-DLLMTRAIN_ARCHITECTURES="{names}"',
    ]
    cublaslt = find_cublaslt()
    if cublaslt is not None:
        # After the toolkit's own headers, of which that folder may hold another version.
        defines += ["-DLLMTRAIN_CUBLASLT", "-Xcompiler", "-idirafter", "-Xcompiler", str(cublaslt)]
    with workplace(target.parent) as folder:
        library = f"{folder}/{target.name}"
        hidden = ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
        # C++ by nvcc too, which knows where its headers are.
        flags = {
            ".cu": [*shared, *hidden, *codes, f"--threads={cores}"],
            ".cpp": [*shared, *hidden, *defines, *headers],
        }
        units = sorted(path for path in SOURCES.iterdir() if path.suffix in flags)
        parts = [f"{folder}/{unit.name}.o" for unit in units]
        commands = [
            [str(nvcc), *flags[unit.suffix], "-c", str(unit), "-o", part]
            for unit, part in zip(units, parts, strict=True)
        ]
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(run_command, commands))
        torch_libraries = f"-L{Path(torch.__file__).parent / 'lib'}"
        links = [
            "-shared",
            "-ccbin",
            host[0],
            "-cudart",
            "static",
            torch_libraries,
            # Nothing of it is called, but with a CUDA build of torch it brings libtorch_cuda into
            # the library's scope, where the current stream is asked for.
            "-Xlinker=--push-state,--no-as-needed,-ltorch,--pop-state",
            "-ltorch_cpu",
            "-lc10",
            "-ldl",
        ]
        run_command([str(nvcc), *links, *parts, "-o", library])
        os.replace(library, target)
    return target


def main() -> int:
    """Build; without a compiler say so in one line. Returns the exit code."""
    try:
        print(f"built {build()} for {' '.join('sm_' + name for name in architectures())}")
        if find_cublaslt() is None:
            print(f"FP8 weight gradients are summed by torch: {NO_HEADERS}")
    except LlmtrainError as error:
        print(f"llmtrain: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
