"""``make check-kernels``: CPU kernels under sanitizers, and those that this processor cannot run
(AVX-512, CUDA) emulated.

Not part of the test suite (minutes, SIMDe's headers and CUDA's). The emulation of CUDA runs
csrc/cuda's own source, a thread for each CUDA thread, and compares bytes with the CPU's operators,
which have tests against float64. It is no substitute for `make test-gpu`.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import check_avx512
import torch
from check_sparse_kernels import check_sparse
from torch import Tensor

from llmtrain import ops
from llmtrain.ops.fused import ACTIVATIONS

ROOT = Path(__file__).parents[2] / "csrc"
E4M3, E5M2 = ops.E4M3, ops.E5M2
SHAPES = ((16, 16), (48, 272), (80, 1040), (32, 64))
KERNEL = re.compile(r"(\w+_kernel(?:<[^;]*?>)?)\s*<<<")


class NormData(ctypes.Structure):
    """As csrc/cuda/fused.h has it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "branch", "weight", "bias", "total", "y")),
        *((name, ctypes.c_void_p) for name in ("mean", "rstd")),
        *((name, ctypes.c_float) for name in ("eps", "stay")),
        *((name, ctypes.c_bool) for name in ("bfloat16", "layer")),
    ]


def run(*command: str) -> None:
    """Run a command; its output is shown when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def sanitize(folder: Path) -> None:
    """The kernels alone, on two threads, under the sanitizers of addresses, undefined behaviour
    and data races."""
    programs = {"sanitize": ("rows", "fp8", "fused")}
    if check_avx512.has_avx2():
        programs["sanitize_gemm"] = ("gemm", "attention_f32")
    flags = "-std=c++20 -O1 -g -w -pthread -fopenmp-simd -march=native -DKERNEL_SET=checked"
    for checks, (name, units) in itertools.product(check_avx512.SANITIZERS, programs.items()):
        program = folder / name
        sources = [str(ROOT / f"cpu/{unit}.cpp") for unit in units]
        found = f"-fsanitize={checks} -fno-sanitize-recover=all -I{ROOT / 'cpu'}"
        main_file = str(ROOT / f"check/{name}.cpp")
        run("g++", *flags.split(), *found.split(), *sources, main_file, "-o", str(program))
        run(str(program))
    print("CPU kernels: clean under the sanitizers", flush=True)


def avx512(folder: Path) -> None:
    """Kernels of processors with AVX-512, emulated; says so where that cannot be built."""
    missing = check_avx512.missing()
    if missing is not None:
        print(f"AVX-512, AVX512-BF16 and AMX kernels: NOT CHECKED ({missing})")
        return
    check_avx512.sanitize(folder)
    check_avx512.check(folder)


def rewritten(text: str) -> str:
    """CUDA source whose kernel launches are calls of ``on_cpu::launch``."""
    while match := KERNEL.search(text):
        start = text.index(">>>(", match.end())
        blocks, threads = re.split(r",(?![^<(]*[>)])", text[match.end() : start])[:2]
        end = text.index(");", start)
        call = f"{match[1]}({text[start + 4 : end]});"
        launch = f"on_cpu::launch({blocks}, {threads}, [&] {{ {call} }});"
        text = text[: match.start()] + launch + text[end + 2 :]
    return text


def emulated(folder: Path, name: str, *flags: str, source: str = "cuda_on_cpu.cpp") -> ctypes.CDLL:
    """csrc/cuda/NAME.cu as a library of the CPU; source: of csrc/check, what ctypes calls."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    if not (home / "include/cuda_fp8.h").exists():
        sys.exit(f"{home}/include has no cuda_fp8.h; set CUDA_HOME to check CUDA's kernels")
    unit, library = folder / f"{name}_on_cpu.h", folder / f"{name}.so"
    unit.write_text(rewritten((ROOT / f"cuda/{name}.cu").read_text()))
    includes = [f"-I{path}" for path in (ROOT / "cuda", ROOT / "check", home / "include")]
    shared = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-DLLMTRAIN_ON_CPU"]
    options = [*shared, f'-DUNIT="{unit}"', *flags]
    run("g++", *options, *includes, str(ROOT / "check" / source), "-o", str(library))
    return ctypes.CDLL(str(library))


def at(x: Tensor | None) -> ctypes.c_void_p:
    """The address of a tensor."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def sizes(rows: int, columns: int) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    """As the launchers take them."""
    return ctypes.c_int64(rows), ctypes.c_int64(columns)


def same(codes: Tensor, values: Tensor, turned: Tensor | None) -> None:
    """``codes`` are the cast of ``values``, and ``turned`` theirs transposed."""
    expected = ops.fp8_cast(values, codes.dtype).view(torch.uint8)
    assert torch.equal(codes.view(torch.uint8), expected)
    assert turned is None or torch.equal(turned.view(torch.uint8), expected.t())


def near_in_norm(value: Tensor, reference: Tensor) -> None:
    """Equal but for roundings."""
    tolerance = 1e-6 if value.dtype == torch.float32 else 6e-3
    gap = (value.double() - reference.double()).norm()
    assert gap <= tolerance * reference.double().norm(), gap


def check_casts(library: ctypes.CDLL) -> None:
    """Casts with transposed copies, aligned and odd; weights through bfloat16."""
    for rows, columns in (*SHAPES, (3, 130), (67, 61)):
        x = torch.randn(rows, columns) * 100
        for kind, fp8 in itertools.product(("bf16", "fp32", "master"), (E4M3, E5M2)):
            given = x.bfloat16() if kind == "bf16" else x
            out = torch.empty(rows, columns, dtype=fp8)
            turned = torch.empty(columns, rows, dtype=fp8)
            flags = ctypes.c_bool(kind == "bf16"), ctypes.c_bool(kind == "master")
            factor = ctypes.c_float(1.0 if kind == "master" else 2.0)
            library.run_cast_transpose(
                at(given), *flags, factor, at(out), at(turned), *sizes(rows, columns), fp8 == E5M2
            )
            same(out, x.bfloat16() if kind == "master" else given * 2, turned)


def check_norms(library: ctypes.CDLL, dtype: torch.dtype, rows: int, columns: int) -> None:
    """Both norms in both forms, with and without bias, branch, result and transposed copy."""
    x, branch = (torch.randn(2, rows, columns) * 3).to(dtype)
    weight, bias = torch.randn(2, columns).to(dtype)
    for layer, shifted, added, keep, across, join in itertools.product((True, False), repeat=6):
        if (shifted and not layer) or (join and not added):
            continue
        total, y = torch.empty_like(x), torch.empty_like(x)
        mean, rstd = torch.empty(2, rows)
        data = NormData(eps=1e-5, stay=0.7, bfloat16=dtype == torch.bfloat16, layer=layer)
        data.x, data.branch = at(x), at(branch if added else None)
        data.weight, data.bias = at(weight), at(bias if shifted else None)
        data.total, data.y = at(total), at(y if keep else None)
        data.mean, data.rstd = at(mean if layer else None), at(rstd)
        out = torch.empty(rows, columns, dtype=E4M3)
        turned = torch.empty(columns, rows, dtype=E4M3) if across else None
        library.run_norm(
            ctypes.byref(data), ctypes.c_bool(join), at(out), at(turned), *sizes(rows, columns)
        )
        terms = ops.NormTerms(weight, bias if shifted else None, 1e-5, layer)
        if join:
            near_in_norm(total, ops.norm_join_cast(x, branch, terms, 0.7)[0])
            same(out, total, turned)
            continue
        stream, normed, _ = ops.add_norm_cast(x, branch if added else None, terms)
        assert not added or torch.equal(total, stream)
        if keep:
            near_in_norm(y, normed)
            same(out, y, turned)


def check_activations(library: ctypes.CDLL, dtype: torch.dtype, rows: int, columns: int) -> None:
    """All activations, forward and backward."""
    bf16 = ctypes.c_bool(dtype == torch.bfloat16)
    for number, name in enumerate(ACTIVATIONS):
        width = columns * (2 if name == "swiglu" else 1)
        x, dy = (torch.randn(rows, width) * 3).to(dtype), torch.randn(rows, columns).to(dtype)
        y, out = torch.empty_like(dy), torch.empty(rows, columns, dtype=E4M3)
        turned = torch.empty(columns, rows, dtype=E4M3)
        which = ctypes.c_int64(number)
        library.run_activation(
            at(x), at(y), bf16, which, at(out), at(turned), *sizes(rows, columns)
        )
        near_in_norm(y, ops.activation_cast(x, name)[0])
        same(out, y, turned)
        alone = torch.empty_like(out)
        library.run_activation(
            at(x), at(None), bf16, which, at(alone), at(None), *sizes(rows, columns)
        )
        same(alone, y, None)
        dx, out = torch.empty_like(x), torch.empty(rows, width, dtype=E5M2)
        turned, factor = torch.empty(width, rows, dtype=E5M2), ctypes.c_float(512.0)
        where = at(dy), at(x), at(dx), bf16, which, factor, at(out), at(turned)
        library.run_activation_backward(*where, *sizes(rows, width))
        near_in_norm(dx, ops.activation_backward_cast(dy, x, name)[0])
        same(out, dx * 512, turned)


def main() -> None:
    """All checks."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sanitize(folder)
        avx512(folder)
        check_sparse(partial(emulated, folder))
        check_casts(emulated(folder, "fp8", "-DCASTS"))
        fused = emulated(folder, "fused")
        for dtype, shape in itertools.product((torch.float32, torch.bfloat16), SHAPES):
            check_norms(fused, dtype, *shape)
            check_activations(fused, dtype, *shape)
    print("CUDA kernels, emulated on the CPU: results and bytes are the CPU's")


if __name__ == "__main__":
    main()
