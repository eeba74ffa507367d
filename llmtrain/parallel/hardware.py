"""What the hardware can do: the tier of number formats, in one line for the log."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch

from llmtrain.config.schema import PrecisionConfig
from llmtrain.errors import EnvironmentFault

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """Resolved number formats: of the matmuls and activations, and of the gradient reduction."""

    compute: torch.dtype
    reduce: torch.dtype


def cpu_flags() -> frozenset[str]:
    """Feature flags of the processor as Linux names them; empty elsewhere."""
    try:
        with open("/proc/cpuinfo") as info:
            for line in info:
                if line.startswith("flags"):
                    return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matmuls run in hardware: AMX or AVX512-BF16 on a CPU, Ampere on a GPU."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool({"amx_bf16", "avx512_bf16"} & cpu_flags())


def resolve_precision(cfg: PrecisionConfig, device: torch.device) -> Precision:
    """Turn ``precision`` into dtypes.

    auto: bf16 where the hardware has it, else fp32. Asking for bf16 where it would be emulated
    raises EnvironmentFault: it would be many times slower than fp32, never silently replaced.
    """
    fast = has_fast_bf16(device)
    if cfg.compute == "bf16" and not fast:
        raise EnvironmentFault(
            "precision.compute: bf16 has no hardware here (needs AVX512-BF16 or AMX on a CPU, "
            "Ampere or newer on a GPU); use precision.compute: auto or fp32"
        )
    compute = "bf16" if cfg.compute == "bf16" or (cfg.compute == "auto" and fast) else "fp32"
    return Precision(DTYPES[compute], DTYPES[cfg.reduce])


def tier_line(device: torch.device, precision: Precision) -> str:
    """One line: device, instruction set or GPU, threads, number format and why."""
    name = {torch.bfloat16: "bf16 with fp32 master weights", torch.float32: "fp32"}
    compute = name[precision.compute]
    if device.type == "cuda":
        props = torch.cuda.get_device_properties(device)
        return (
            f"hardware: {props.name} ({props.total_memory / 2**30:.0f} GiB, "
            f"sm_{props.major}{props.minor}), {compute}"
        )
    flags = cpu_flags()
    best = [f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in flags]
    policy = os.environ.get("OMP_WAIT_POLICY", "active")
    return (
        f"hardware: CPU {platform.machine()} {best[0] if best else 'no vector flags seen'}, "
        f"{torch.get_num_threads()} threads ({policy} waiting), {compute}"
    )
