"""AVX-512, AVX512-BF16 and AMX kernels on a processor without: part of ``make check-kernels``.

Their sources are compiled against SIMDe (Debian: libsimde-dev), whose intrinsics are plain C, and
csrc/check/avx512, which has what SIMDe lacks. The tests of the operators then run on that library,
once for each of the instruction sets, and the kernels alone run under sanitizers. What this leaves
untested is what the compiler makes of the real intrinsics, and the few inline assembly statements.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import torch

from llmtrain.ops import build

ROOT = Path(__file__).parents[2]
SIMDE = Path("/usr/include/simde/x86/avx512.h")
SHIM = ROOT / "csrc/check/avx512"
# In place of the instruction sets: intrinsics in C, for this processor.
FLAGS = f"-march=x86-64-v3 -O1 -Wno-psabi -DLLMTRAIN_EMULATED -I{SHIM} -include immintrin.h"
# Instruction set: tests that reach kernels of its own.
SETS = {
    "avx512": ("tests/ops/test_fp8.py", "tests/ops/test_sparse.py", "tests/ops/test_fused.py"),
    "avx512_bf16": ("tests/ops/test_sparse.py", "tests/ops/test_kernels.py"),
    "amx": ("tests/ops/test_kernels.py",),
}
SANITIZERS = ("address,undefined", "thread")
MATHS = "-fno-math-errno -fno-trapping-math"
TILES = "csrc/check/sanitize_tiles.cpp csrc/cpu/attention.cpp csrc/cpu/products.cpp"
# Program: flags and sources.
PROGRAMS = {
    "rows": (
        "-DKERNEL_SET=avx512",
        "csrc/check/sanitize.cpp csrc/cpu/rows.cpp csrc/cpu/fp8.cpp csrc/cpu/fused.cpp",
    ),
    "sparse": (
        "-DKERNEL_SET=avx512bf16",
        "tests/ops/sparse_sanitize.cpp csrc/cpu/sparse.cpp csrc/cpu/sparse_pairs.cpp",
    ),
    "tiles": ("-DKERNEL_SET=avx512bf16", TILES),
    "amx": ("-DKERNEL_SET=amx -DLLMTRAIN_EMULATED_AMX", TILES),
}
# Tests that ask for a library of the sources as they are, or start a process that loads it.
OTHERS = "not sanitizers and not instruction_sets and not older and not stamp"
RUN = """
import sys
from pathlib import Path
from llmtrain.ops import native
native.LIBRARY = Path(sys.argv[1])
import pytest
assert native.kernels_line().endswith(f", {sys.argv[2]}"), native.kernels_line()
sys.exit(pytest.main([*"-x -n 0 -p no:cacheprovider".split(), *sys.argv[3:]]))
"""


def has_avx2() -> bool:
    """Whether this processor has AVX2, for which the emulation is compiled."""
    return torch.backends.cpu.get_cpu_capability() != "DEFAULT"


def missing() -> str | None:
    """Why the emulation cannot be built here; None where it can."""
    if not has_avx2():
        return "this processor has no AVX2"
    if SIMDE.exists():
        return None
    return f"{SIMDE} is missing; on Debian and Ubuntu: apt install libsimde-dev"


def emulated(flags: str) -> str:
    """Flags of a unit for an instruction set as those of its emulation; others as they are."""
    if build.AVX512 not in flags:
        return flags
    kept = flags.replace(build.AVX512, FLAGS).replace("-mavx512bf16", "")
    return kept.replace("-mamx-tile -mamx-bf16", "-DLLMTRAIN_EMULATED_AMX")


def run(command: list[str], env: dict[str, str] | None = None) -> str:
    """Run a command from the root and return its output, which ends all when it fails."""
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def library(folder: Path) -> Path:
    """The library of operators with all instruction sets emulated."""
    objects = {name: (source, emulated(flags)) for name, (source, flags) in build.units().items()}
    source, flags = objects["dispatch"]
    objects["dispatch"] = (source, f"{flags} -DLLMTRAIN_EMULATED")
    return build.build(folder / "_cpu.so", objects)


def check(folder: Path) -> None:
    """Run the operators' tests on the emulation; the first failure ends it."""
    made = library(folder)
    for level, tests in SETS.items():
        command = [sys.executable, "-c", RUN, str(made), level, "-k", OTHERS, *tests]
        env = {**os.environ, "LLMTRAIN_CPU_KERNELS": level, "OMP_NUM_THREADS": "1"}
        said = run(command, env).strip().splitlines()[-1].strip("= ")
        print(f"{level}, emulated: {said}", flush=True)


def sanitize(folder: Path) -> None:
    """The kernels alone, on two threads, under the sanitizers of addresses, undefined behaviour
    and data races."""
    wide = f"{FLAGS} -w -Icsrc/cpu -fopenmp-simd {MATHS}"
    for checks, (name, (flags, sources)) in itertools.product(SANITIZERS, PROGRAMS.items()):
        program = folder / name
        command = f"g++ -std=c++20 -g -pthread -fsanitize={checks} -fno-sanitize-recover=all {wide}"
        run([*command.split(), *flags.split(), *sources.split(), "-o", str(program)])
        run([str(program)])
    print("AVX-512, AVX512-BF16 and AMX kernels, emulated: clean under the sanitizers", flush=True)
