"""Sparse products on the CPU against the best dense library of the machine, in one run.

    python benchmarks/sparse_cpu.py [--rounds 5] [--sizes 3072x768 2048x2048 4096x4096]

For each weight shape, 2048 tokens, random masks of 50, 75 and 90% zeros in several block shapes:
y = x W^T, dx = dy W and dW at the mask, one thread, seconds of the thread's own processor time
(other work on the machine would be counted otherwise). Dense contenders are what torch's products
use (MKL) and oneDNN's, each product by whichever is faster in the median; float32, and bfloat16
where the processor has such products. All take turns within each round. Medians and ratios go to
benchmarks/results/sparse_cpu.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain import ops

SPARSITIES = (0.5, 0.75, 0.9)
BLOCKS = ((4, 4), (8, 2), (1, 1))
PRODUCTS = ("fprop", "dgrad", "wgrad")
# Sparsity: at least this many times as fast as dense, forward and forward with backward.
GOALS = {0.5: (1.7, 1.4), 0.75: (3.5, 2.8)}


def reading(work: Callable[[], object]) -> Callable[[], float]:
    """Processor seconds of one call on this thread."""

    def measure() -> float:
        begin = time.thread_time()
        work()
        return time.thread_time() - begin

    return measure


def onednn(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T by oneDNN whatever torch would choose."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


def dense(x: Tensor, dy: Tensor, weight: Tensor) -> dict[str, Callable[[], float]]:
    """The three products by both libraries; oneDNN's operands are turned beforehand."""
    turned, dy_turned, x_turned = (t.t().contiguous() for t in (weight, dy, x))
    return {
        "torch fprop": reading(lambda: F.linear(x, weight)),
        "torch dgrad": reading(lambda: dy @ weight),
        "torch wgrad": reading(lambda: dy.t() @ x),
        "onednn fprop": reading(lambda: onednn(x, weight)),
        "onednn dgrad": reading(lambda: onednn(dy, turned)),
        "onednn wgrad": reading(lambda: onednn(dy_turned, x_turned)),
    }


def label(block: tuple[int, int], sparsity: float) -> str:
    """What a contender is called."""
    return f"{block[0]}x{block[1]} {sparsity:.0%}"


def contenders(
    shape: tuple[int, int], tokens: int, dtype: torch.dtype
) -> dict[str, Callable[[], float]]:
    """Readings of all products by name."""
    rows, cols = shape
    gen = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=gen)
    x, dy = (torch.randn(tokens, n, generator=gen).to(dtype) for n in (cols, rows))
    works = dense(x, dy, weight.to(dtype))
    for block in BLOCKS:
        for sparsity in SPARSITIES:
            grid = (rows // block[0], cols // block[1])
            packed = ops.pack(weight, torch.rand(grid, generator=gen) >= sparsity, block)
            name = label(block, sparsity)
            works[f"{name} fprop"] = reading(lambda p=packed: ops.sparse_fprop(x, p))
            works[f"{name} dgrad"] = reading(lambda p=packed: ops.sparse_dgrad(dy, p))
            works[f"{name} wgrad"] = reading(lambda p=packed: ops.sparse_wgrad(dy, x, p))
    return works


def ratios(found: dict[str, dict[str, Any]], name: str) -> dict[str, float]:
    """How many times as fast as the better dense library a contender is."""
    best = {p: min(found[f"{who} {p}"]["median"] for who in ("torch", "onednn")) for p in PRODUCTS}
    own = {p: found[f"{name} {p}"]["median"] for p in PRODUCTS}
    both = sum(best.values()) / sum(own.values())
    return {**{p: best[p] / own[p] for p in PRODUCTS}, "forward and backward": both}


def measure(shape: tuple[int, int], tokens: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Readings and ratios of one shape."""
    found = common.interleaved(contenders(shape, tokens, dtype), rounds)
    table = {}
    for block in BLOCKS:
        for sparsity in SPARSITIES:
            name = label(block, sparsity)
            table[name] = ratio = ratios(found, name)
            goal = "".join(f" (goal {g})" for g in [GOALS.get(sparsity)] if g and block != (1, 1))
            text = ", ".join(f"{key} {value:.2f}" for key, value in ratio.items())
            print(f"{shape[0]}x{shape[1]} {dtype} {name}: {text}{goal}", flush=True)
    rate = 2 * tokens * shape[0] * shape[1] / 1e9
    flops = {
        f"{who} {p}": rate / found[f"{who} {p}"]["median"]
        for who in ("torch", "onednn")
        for p in PRODUCTS
    }
    return {
        "shape": shape,
        "dtype": str(dtype),
        "times as fast": table,
        "dense GFLOP/s": flops,
        "seconds": found,
    }


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--sizes", nargs="+", default=["3072x768", "2048x2048", "4096x4096"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not ops.native_loaded():
        raise SystemExit("the compiled kernels are not built; run: make build")
    torch.set_num_threads(1)
    dtypes = [torch.float32]
    if any(name in ops.kernels_line() for name in ("amx", "avx512_bf16")):
        dtypes.append(torch.bfloat16)
    sizes = [tuple(int(n) for n in size.split("x")) for size in args.sizes]
    rows = [measure((s[0], s[1]), args.tokens, d, args.rounds) for d in dtypes for s in sizes]
    result = {"kernels": ops.kernels_line(), "threads": 1, "tokens": args.tokens, "rows": rows}
    print(f"written: {common.write_result('sparse_cpu', result, out=args.out)}")


if __name__ == "__main__":
    main()
