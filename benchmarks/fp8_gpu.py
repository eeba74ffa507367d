"""FP8 on a GPU: kernels as a share of the copy bandwidth, and linear layers against bf16.

    python benchmarks/fp8_gpu.py [--rounds 20] [--tokens 16384]

First the device's own copy, GB/s of reading and writing 1 GiB. Then llmtrain's cast, cast with
transpose and transpose on [tokens, 4096] in bf16, in GB/s of the bytes a single pass has to move.
Then forward and backward of one linear layer d -> 4 d, all casts included, in bf16, in FP8 with
static scales and with current scaling, in turn within each round, at several widths. Times are of
CUDA events. The widths at which FP8 loses are listed. Medians go to
benchmarks/results/fp8_gpu.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch

from llmtrain import ops
from llmtrain.linear import BF16, Linear, Matmul, fp8_matmul

WIDTHS = (512, 1024, 2048, 4096, 8192)


def milliseconds(work: Callable[[], object]) -> float:
    """GPU time of one call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def median(work: Callable[[], object], rounds: int) -> float:
    """Median milliseconds after three calls that do not count."""
    for _ in range(3):
        work()
    return float(common.summary([milliseconds(work) for _ in range(rounds)])["median"])


def kernels(tokens: int, rounds: int) -> dict[str, Any]:
    """GB/s of the copy and of each kernel, and its share of the copy."""
    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() / median(lambda: target.copy_(source), rounds) / 1e6
    x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
    y = ops.fp8_cast(x, ops.E4M3)
    works: dict[str, tuple[int, Callable[[], object]]] = {
        "cast": (3, lambda: ops.fp8_cast(x, ops.E4M3)),
        "cast+transpose": (4, lambda: ops.fp8_cast_transpose(x, ops.E4M3)),
        "transpose": (2, lambda: ops.fp8_transpose(y)),
    }
    found: dict[str, Any] = {"copy": {"gb_per_s": copy}}
    for name, (moved, work) in works.items():
        rate = moved * x.numel() / median(work, rounds) / 1e6
        found[name] = {"gb_per_s": rate, "share_of_copy": rate / copy}
        print(f"{name:16s} {rate:8.0f} GB/s, {rate / copy:.0%} of the copy's {copy:.0f}")
    return found


def layer_work(width: int, tokens: int, matmul: Matmul) -> Callable[[], object]:
    """Forward and backward of one layer, as a micro-batch of a step that casts weights once."""
    layer = Linear(width, 4 * width, matmul=matmul, scale=width**-0.5).cuda()
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    upstream = torch.randn(tokens, 4 * width, device="cuda", dtype=torch.bfloat16)

    def work() -> None:
        with torch.no_grad():
            layer.weight.add_(0.0)  # a new version: the cast of the weight is part of the time
        layer.weight.grad = x.grad = None
        layer(x).backward(upstream)

    return work


def layers(tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds and ratios per width."""
    rows = []
    for width in WIDTHS:
        formats = {
            "bf16": BF16,
            "mus_fp8": fp8_matmul("mus_fp8", torch.bfloat16),
            "fp8_current": fp8_matmul("fp8_current", torch.bfloat16),
        }
        works = {name: layer_work(width, tokens, matmul) for name, matmul in formats.items()}
        for work in works.values():
            for _ in range(3):
                work()
        found = common.interleaved(
            {name: lambda work=work: milliseconds(work) for name, work in works.items()}, rounds
        )
        ratios = {n: found["bf16"]["median"] / found[n]["median"] for n in formats if n != "bf16"}
        print(f"d {width}: " + ", ".join(f"{n} {r:.2f}x bf16" for n, r in ratios.items()))
        rows.append({"width": width, "ratios": ratios, "milliseconds": found})
    return rows


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    fault = ops.cuda_fault()
    if fault is not None:
        raise SystemExit(f"the CUDA kernels are not in use: {fault}")
    found = {"kernels": kernels(args.tokens, args.rounds), "tokens": args.tokens}
    rows = layers(args.tokens, args.rounds)
    slower = [row["width"] for row in rows if row["ratios"]["mus_fp8"] < 1]
    print(f"FP8 loses at widths: {slower or 'none of these'}")
    path = common.write_result("fp8_gpu", {**found, "layers": rows}, out=args.out)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
