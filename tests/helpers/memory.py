"""Bytes of tensors on the CPU, from the allocator's own records."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Bytes:
    """result: of the function. kept: bytes allocated and not freed by it. peak: the most that
    was allocated at once, on top of what there was before."""

    result: Any
    kept: int
    peak: int


def allocated(function: Callable[[], Any]) -> Bytes:
    """Run ``function`` and follow every allocation and release of tensor memory in it."""
    gc.collect()  # or tensors of before are released within
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function()
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        now += change
        peak = max(peak, now)
    return Bytes(result, now, peak)
