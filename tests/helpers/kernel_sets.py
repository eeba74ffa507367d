"""Checks of the compiled kernels for other processors than this one."""

from __future__ import annotations

from helpers import warm

# From the newest to any processor.
SETS = ("amx", "avx512_bf16", "avx512", "avx2", "baseline")


def passes_on(level: str, code: str) -> None:
    """``code``, which begins by printing ``ops.kernels_line()``, runs with kernels of ``level``,
    or of less where this processor has less."""
    done = warm.python(code, LLMTRAIN_CPU_KERNELS=level)
    assert done.returncode == 0, done.stderr
    used = done.stdout.split("compiled, ")[1].split()[0]
    assert used in SETS and SETS.index(used) >= SETS.index(level)
