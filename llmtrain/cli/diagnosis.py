"""What works on this machine and why the rest does not: the checks of ``llmtrain doctor``.

It lives beside the command because it must run where torch itself does not import.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

from llmtrain.cli.process import OLDEST_TORCH
from llmtrain.machine import usable_cores

OLDEST_PYTHON = (3, 11)
NEEDED = (
    *("numpy", "omegaconf", "safetensors", "tokenizers", "xxhash", "zstandard", "pyarrow"),
    *("rich", "tensorboard"),
)
OPTIONAL = {
    "datasets": "Hugging Face datasets as sources: pip install 'llmtrain[hf]'",
    "transformers": "comparison with Hugging Face models: pip install 'llmtrain[hf]'",
    "deepspeed": "parallel.engine: deepspeed: DS_BUILD_OPS=0 pip install 'llmtrain[deepspeed]'",
    "wandb": "logging to Weights & Biases: pip install 'llmtrain[wandb]'",
    "mlflow": "logging to MLflow: pip install 'llmtrain[mlflow]'",
}
LOW_DISK = 5 * 2**30


class Broken(Exception):
    """A check's way to say that something does not work, why, and what helps."""


@dataclass(frozen=True)
class Check:
    """One line of the report. needed: training on this machine is impossible without it."""

    name: str
    works: bool
    detail: str
    needed: bool = False


def diagnose() -> Iterator[Check]:
    """Run the checks one by one; none of them raises."""
    checks: list[tuple[str, Callable[[], str], bool]] = [
        ("python", _python, True),
        ("packages", _packages, True),
        ("torch", _torch, True),
        ("cores", _cores, False),
        ("memory", _memory, False),
        ("bf16 on CPU", _cpu_bf16, False),
        ("CUDA", _cuda, False),
        ("gloo", _gloo, False),
        ("NCCL", _nccl, False),
        ("C++ compiler", _compiler, False),
        ("CPU kernels", _kernels, False),
        ("CUDA kernels", _cuda_kernels, False),
        ("2:4 products", _semi, False),
        ("streaming", _streaming, False),
        *((name, _optional(name, why), False) for name, why in OPTIONAL.items()),
        ("disk", _disk, False),
        ("temporary files", _temporary, True),
    ]
    for name, check, needed in checks:
        try:
            yield Check(name, True, check(), needed)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            yield Check(name, False, reason, needed)


def _python() -> str:
    if sys.version_info < OLDEST_PYTHON:
        raise Broken(f"{platform.python_version()}; llmtrain needs 3.11 or newer")
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}"


def _packages() -> str:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise Broken(f"missing: pip install {' '.join(missing)}")
    return ", ".join(f"{name} {metadata.version(name)}" for name in NEEDED)


def _torch() -> str:
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise Broken(f"{torch.__version__} is too old: pip install 'torch>={oldest}'")
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return f"{torch.__version__} ({built})"


def _cores() -> str:
    return f"{usable_cores()} usable of {os.cpu_count()} (affinity and control group)"


def _memory() -> str:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{total / 2**30:.1f} GiB"
    try:
        with open("/sys/fs/cgroup/memory.max") as limit:
            allowed = limit.read().strip()
    except OSError:
        return text
    if allowed.isdecimal() and int(allowed) < total:
        text = f"{int(allowed) / 2**30:.1f} GiB (control group) of {text}"
    return text


def _cpu_bf16() -> str:
    from llmtrain.parallel.hardware import cpu_flags

    flags = cpu_flags()
    have = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    if not have:
        raise Broken("the processor has neither AMX nor AVX512-BF16; training uses fp32")
    return f"{', '.join(have)}: about twice the speed of fp32"


def _cuda() -> str:
    import torch

    if torch.version.cuda is None:
        raise Broken("this build of torch has no CUDA; install a CUDA build to use GPUs")
    if not torch.cuda.is_available():
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            raise Broken("CUDA_VISIBLE_DEVICES is empty; unset it to use the GPUs")
        if not os.path.exists("/proc/driver/nvidia"):
            raise Broken("no NVIDIA driver is loaded on this machine")
        torch.zeros(1, device="cuda")  # raises with the driver's own reason
        raise Broken("torch sees no device; compare the driver with nvidia-smi")
    found = []
    for index in range(torch.cuda.device_count()):
        props = torch.cuda.get_device_properties(index)
        memory = props.total_memory / 2**30
        found.append(f"{props.name} ({memory:.0f} GiB, sm_{props.major}{props.minor})")
    return ", ".join(found)


def _gloo() -> str:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_gloo_available()):
        raise Broken("this build of torch has no gloo; runs on several CPU processes need it")
    # A group of one shows what breaks most often: a host name that does not resolve.
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/g", rank=0, world_size=1)
        dist.destroy_process_group()
    return "a process group forms; several processes on CPU work"


def _nccl() -> str:
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_nccl_available()):
        raise Broken("this build of torch has no NCCL; several GPUs need a CUDA build")
    if not torch.cuda.is_available():
        raise Broken("built in, but there is no GPU to use it with")
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, version))


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        path = shutil.which(name) if name else None
        if path:
            return f"{path}: train.compile works"
    raise Broken("none found; train.compile on CPU needs g++ or clang++")


def _kernels() -> str:
    from llmtrain.ops import kernels_line, native_loaded

    line = kernels_line().removeprefix("CPU kernels: ")
    if not native_loaded():
        raise Broken(line)
    return line


def _cuda_kernels() -> str:
    from llmtrain.ops.cuda import (
        HELP,
        NO_HEADERS,
        built_for,
        built_with_cublaslt,
        cublaslt_fault,
        load_fault,
    )

    architectures = built_for()
    if architectures is None:
        raise Broken(f"not built; FP8 on a GPU runs on torch's own casts. {HELP}")
    version, fault = built_with_cublaslt(), load_fault()
    if fault is not None:
        raise Broken(f"built for {architectures}; {fault}")
    without = NO_HEADERS if version is None else cublaslt_fault()
    if without is None:
        sums = f"FP8 weight gradients are summed in the product (cuBLASLt {version})"
    else:
        sums = f"FP8 weight gradients are summed by torch after the product: {without}"
    return f"built for {architectures}; {sums}"


def _semi() -> str:
    import torch

    from llmtrain.ops.semi import LIBRARIES, NAMES, library_fault

    if not torch.cuda.is_available():
        raise Broken("there is no CUDA device; sparse products of a CPU take any mask")
    faults = {name: library_fault(name, torch.device("cuda", 0)) for name in LIBRARIES}
    words = "; ".join(fault or f"{NAMES[name]} runs" for name, fault in faults.items())
    if None not in faults.values():
        raise Broken(words)
    return words


def _streaming() -> str:
    from llmtrain.data.streaming import import_streaming

    version = import_streaming().__version__
    return f"mosaicml-streaming {version}: sources on s3, gs and http can be read"


def _optional(name: str, why: str) -> Callable[[], str]:
    """The check of an optional package: found, without importing it."""

    def check() -> str:
        if find_spec(name) is None:
            raise Broken(f"not installed; for {why}")
        return metadata.version(name)

    return check


def _disk() -> str:
    folder = os.getcwd()
    free = shutil.disk_usage(folder).free
    text = f"{free / 2**30:.1f} GiB free in {folder}"
    if not os.access(folder, os.W_OK):
        raise Broken(f"{folder} cannot be written; start llmtrain elsewhere or set `out`")
    if free < LOW_DISK:
        raise Broken(f"only {text}; free some or write elsewhere")
    return text


def _temporary() -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"x")
    return f"can be written in {tempfile.gettempdir()}"
