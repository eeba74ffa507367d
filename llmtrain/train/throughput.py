"""Tokens per second, model FLOPs utilisation, time left, memory.

MFU = tokens/s x FLOPs per token / (devices x peak). The FLOPs per token are those of
``llmtrain.model.flops`` (multiply-adds of forward and backward counted as two, causal attention
as half, recomputation not counted); the peak is the vendor's dense bf16 figure for the device's
name. A device that is not in the table prints n/a: a guess would be worse than nothing.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

import torch

# Dense bf16 tensor-core peak in FLOP/s, from the vendors' data sheets (without sparsity).
# Ordered: the first key contained in the device name wins, so longer names come first.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("H200 NVL", 835e12),
    ("H200", 989.4e12),
    ("GH200", 989.4e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.4e12),
    ("H20", 148e12),
    ("H800", 989.4e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("MI325X", 1307.4e12),
    ("MI300X", 1307.4e12),
    ("MI250X", 191.5e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of one device by its name; None when unknown."""
    name = device_name.upper()
    for key, peak in PEAK_FLOPS:
        if key.upper() in name:
            return peak
    return None


def device_peak(device: torch.device) -> float | None:
    """Peak of ``device``; None on CPU and on devices that are not in the table."""
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device))


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a GPU, resident set of this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Throughput:
    """Training speed between log lines, without evaluation and checkpoints.

    clock: seconds, monotonic; replaceable for tests.
    """

    def __init__(
        self,
        flops_per_token: float,
        devices: int,
        peak: float | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._flops, self._devices, self._peak, self._clock = flops_per_token, devices, peak, clock
        self._tokens = 0
        self._seconds = 0.0
        self._since: float | None = None
        self._ema: float | None = None

    def set_flops(self, flops_per_token: float) -> None:
        """A token costs so much from the next read on: the model became denser or sparser."""
        self._flops = flops_per_token

    def start(self) -> None:
        """The clock runs: training goes on."""
        if self._since is None:
            self._since = self._clock()

    def pause(self) -> None:
        """The clock stops: evaluation or a checkpoint follows."""
        if self._since is not None:
            self._seconds += self._clock() - self._since
            self._since = None

    def add(self, tokens: int) -> None:
        """Count ``tokens`` trained on, over all ranks."""
        self._tokens += tokens

    def read(self) -> tuple[float, float | None, float]:
        """(tokens/s over all devices, MFU or None, seconds) since the last read; starts anew."""
        running = self._since is not None
        self.pause()
        seconds, tokens = self._seconds, self._tokens
        self._seconds, self._tokens = 0.0, 0
        if running:
            self.start()
        rate = tokens / seconds if seconds > 0 else 0.0
        self._ema = rate if self._ema is None else 0.7 * self._ema + 0.3 * rate
        mfu = None
        if self._peak is not None:
            mfu = rate * self._flops / (self._devices * self._peak)
        return rate, mfu, seconds

    def eta_seconds(self, tokens_left: int) -> float | None:
        """Seconds of training left at the smoothed rate; None before the first read."""
        return tokens_left / self._ema if self._ema else None
