"""GB/s of casting to FP8 on the CPU, with and without the transposed copy: llmtrain against torch.

    python benchmarks/fp8_cpu.py [--rounds 15] [--sizes 2048 4096]

Contenders, in turn within each round, one thread, on square matrices: llmtrain's clip-and-cast
against ``x.clamp(-max, max).to(float8)``, its clip-cast-transpose against the same and
``.t().contiguous()``, its cast back against ``.to``; then norms with residual and activations,
forward and backward, with their casts against torch's operators and the same clamp and cast.
Readings are of the thread's own processor time, since other work on the machine would be counted
otherwise. GB/s count the bytes that a single pass has to read and write (once per output), whatever
a contender really moves. Outputs are allocated in the call, as in training. Medians go to
benchmarks/results/fp8_cpu.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import common
import torch
import torch.nn.functional as F

from llmtrain import ops

Work = Callable[[], object]
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", ops.E4M3: "e4m3", ops.E5M2: "e5m2"}


def reading(work: Work, moved: int) -> Callable[[], float]:
    """GB/s of one call, by the processor time of this thread."""

    def measure() -> float:
        begin = time.thread_time()
        work()
        return moved / (time.thread_time() - begin) / 1e9

    return measure


def pairs(x: torch.Tensor, fp8: torch.dtype) -> dict[str, tuple[int, dict[str, Work]]]:
    """Operation: bytes it has to move, and its contenders."""
    top, n, size = ops.FP8_MAX[fp8], x.numel(), x.element_size()
    y = ops.fp8_cast(x, fp8)
    return {
        "cast": (
            n * (size + 1),
            {
                "llmtrain": lambda: ops.fp8_cast(x, fp8),
                "torch": lambda: x.clamp(-top, top).to(fp8),
            },
        ),
        "cast+transpose": (
            n * (size + 2),
            {
                "llmtrain": lambda: ops.fp8_cast_transpose(x, fp8),
                "torch": lambda: (z := x.clamp(-top, top).to(fp8), z.t().contiguous()),
            },
        ),
        "cast back": (
            n * (size + 1),
            {
                "llmtrain": lambda: ops.fp8_uncast(y, x.dtype),
                "torch": lambda: y.to(x.dtype),
            },
        ),
    }


def fused_pairs(x: torch.Tensor) -> dict[str, tuple[int, dict[str, Work]]]:
    """The same of norms and activations, whose results are written too. Backward casts to e5m2."""
    n, size, d = x.numel(), x.element_size(), x.shape[1]
    branch, weight = x.flip(0).contiguous(), torch.ones(d).to(x.dtype)
    rms = ops.NormTerms(weight, None, 1e-5, False)
    layer = ops.NormTerms(weight, weight, 1e-5, True)

    def cast(y: torch.Tensor, fp8: torch.dtype = ops.E4M3) -> torch.Tensor:
        return y.clamp(-ops.FP8_MAX[fp8], ops.FP8_MAX[fp8]).to(fp8)

    def backward(name: str) -> Work:
        leaf = x.clone().requires_grad_()
        y = F.gelu(leaf) if name == "gelu" else F.silu(leaf[:, 0::2]) * leaf[:, 1::2]
        grad = torch.ones_like(y)
        return lambda: cast(torch.autograd.grad(y, leaf, grad, retain_graph=True)[0], ops.E5M2)

    half = branch[:, : d // 2].contiguous()
    work: dict[str, tuple[int, tuple[Work, Work]]] = {
        "add, RMSNorm, cast": (
            n * (4 * size + 1),
            (
                lambda: ops.add_norm_cast(x, branch, rms),
                lambda: cast(F.rms_norm(x + branch, (d,), weight, 1e-5)),
            ),
        ),
        "LayerNorm, join, cast": (
            n * (3 * size + 1),
            (
                lambda: ops.norm_join_cast(x, branch, layer, 0.8),
                lambda: cast(
                    torch.add(F.layer_norm(branch, (d,), weight, weight, 1e-5), x, alpha=0.8)
                ),
            ),
        ),
        "GELU, cast": (
            n * (2 * size + 1),
            (lambda: ops.activation_cast(x, "gelu"), lambda: cast(F.gelu(x))),
        ),
        "SwiGLU, cast": (
            n * 3 * size // 2 + n // 2,
            (
                lambda: ops.activation_cast(x, "swiglu"),
                lambda: cast(F.silu(x[:, 0::2]) * x[:, 1::2]),
            ),
        ),
        "GELU backward, cast": (
            n * (3 * size + 1),
            (lambda: ops.activation_backward_cast(branch, x, "gelu"), backward("gelu")),
        ),
        "SwiGLU backward, cast": (
            n * 5 * size // 2 + n,
            (lambda: ops.activation_backward_cast(half, x, "swiglu"), backward("swiglu")),
        ),
    }
    return {
        name: (moved, {"llmtrain": ours, "torch": theirs})
        for name, (moved, (ours, theirs)) in work.items()
    }


def compare(label: str, moved: int, contenders: dict[str, Work], rounds: int) -> dict[str, object]:
    """GB/s of both and their ratio, printed."""
    found = common.interleaved(
        {who: reading(work, moved) for who, work in contenders.items()}, rounds
    )
    ratio = found["llmtrain"]["median"] / found["torch"]["median"]
    print(
        f"{label:40s} {found['llmtrain']['median']:6.2f} GB/s, torch "
        f"{found['torch']['median']:6.2f}, ratio {ratio:.2f}"
    )
    return {"what": label, "ratio": ratio, "gb_per_s": found}


def measure(size: int, rounds: int) -> list[dict[str, object]]:
    """One row per input type, format and operation."""
    rows: list[dict[str, object]] = []
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
        for fp8 in (ops.E4M3, ops.E5M2):
            for name, (moved, contenders) in pairs(x, fp8).items():
                label = f"{size}x{size} {NAMES[dtype]} {NAMES[fp8]} {name}"
                rows.append(compare(label, moved, contenders, rounds))
        for name, (moved, contenders) in fused_pairs(x).items():
            label = f"{size}x{size} {NAMES[dtype]} {name}"
            rows.append(compare(label, moved, contenders, rounds))
    return rows


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not ops.native_loaded():
        raise SystemExit("the compiled kernels are not built; run: make build")
    torch.set_num_threads(1)
    rows = [row for size in args.sizes for row in measure(size, args.rounds)]
    result = {"kernels": ops.kernels_line(), "threads": 1, "rows": rows}
    print(f"written: {common.write_result('fp8_cpu', result, out=args.out)}")


if __name__ == "__main__":
    main()
