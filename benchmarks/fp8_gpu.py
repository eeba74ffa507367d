"""FP8 on a GPU: kernels against the copy bandwidth, sums of weight gradients, linear layers.

    python benchmarks/fp8_gpu.py [--parts kernels sums layers] [--rounds 20] [--tokens 16384]
    python benchmarks/fp8_gpu.py --quick --device cpu    # toy shapes: does the script work?

kernels: the device's own copy, GB/s of reading and writing 1 GiB; then llmtrain's kernels on
[tokens, 4096] in bf16, in GB/s of the bytes a single pass has to move (goal: 85% of the copy).

sums: the weight gradient of a layer d -> 4 d added to an earlier one, within the product (cuBLASLt
with beta = 1) and after it.

layers: forward and backward of one linear layer d -> 4 d, all casts included, in turn within each
round: bf16 (ours, and torch's own with bf16 weights), static scales, current scaling, each eager
and compiled, and torchao's float8 and TransformerEngine where they are installed (goal at 4096: 1.7
times bf16). "later": a micro-batch that is not the first of its step, whose weight is cast already
and whose weight gradient is added to the earlier one's. The widths at which FP8 loses are listed.

Whole training steps are in fp8_steps_gpu.py. Times are of CUDA events; of layers they are those of
four calls in a row and the host's where it is slower. Medians go to
benchmarks/results/fp8_gpu.json, written after each part. Not run on a GPU yet.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from gpu_timing import Work, milliseconds
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from llmtrain import ops
from llmtrain.errors import EnvironmentFault
from llmtrain.linear import (
    BF16,
    Linear,
    Matmul,
    TeMatmul,
    enter_recipe,
    fp8_matmul,
    summing_gradients,
)
from llmtrain.linear.te import import_te

WIDTHS = (512, 1024, 2048, 4096, 8192)
# Compilation takes seconds each.
COMPILED_WIDTHS = (1024, 2048, 4096)
PARTS = ("kernels", "sums", "layers")


def median(work: Work, rounds: int) -> float:
    """Median milliseconds of the kernels of a call, after three calls that do not count."""
    for _ in range(3):
        work()
    readings = [milliseconds(work, 4, ahead=True) for _ in range(rounds)]
    return float(common.summary(readings)["median"])


def kernel_works(tokens: int, width: int, device: str) -> dict[str, tuple[int, int, Work]]:
    """Name: bytes an element, elements, and a call."""
    x, branch = torch.randn(2, tokens, width, device=device).bfloat16()
    pairs, weight = torch.cat((x, branch), 1), torch.ones(width, device=device)
    master, y = torch.randn(width, width, device=device), ops.fp8_cast(x, ops.E4M3)
    rms = ops.NormTerms(weight, None, 1e-5, False)
    layer = ops.NormTerms(weight, weight, 1e-5, True)
    n, turned = x.numel(), True
    return {
        "cast": (3, n, lambda: ops.fp8_cast(x, ops.E4M3)),
        "cast+transpose": (4, n, lambda: ops.fp8_cast_transpose(x, ops.E4M3)),
        "transpose": (2, n, lambda: ops.fp8_transpose(y)),
        "RMSNorm": (4, n, lambda: ops.add_norm_cast(x, None, rms, turned, False)),
        "add+RMSNorm": (8, n, lambda: ops.add_norm_cast(x, branch, rms, turned, False)),
        "LayerNorm+join": (8, n, lambda: ops.norm_join_cast(x, branch, layer, 0.8, turned)),
        "GELU": (4, n, lambda: ops.activation_cast(x, "gelu", turned, False)),
        "SwiGLU": (6, n, lambda: ops.activation_cast(pairs, "swiglu", turned, False)),
        "GELU backward": (8, n, lambda: ops.activation_backward_cast(x, branch, "gelu", 2.0, True)),
        "SwiGLU backward": (
            14,
            n,
            lambda: ops.activation_backward_cast(x, pairs, "swiglu", 2.0, True),
        ),
        "weight": (6, master.numel(), lambda: ops.fp8_weight(master, torch.bfloat16)),
    }


def kernels(args: argparse.Namespace) -> dict[str, Any]:
    """GB/s of the copy and of each kernel, and its share of the copy."""
    source = torch.empty(1 << (20 if args.quick else 29), dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / median(lambda: target.copy_(source), args.rounds) / 1e6
    found: dict[str, Any] = {"copy": {"gb_per_s": copy}}
    works = kernel_works(args.tokens, 64 if args.quick else 4096, args.device)
    for name, (moved, elements, work) in works.items():
        rate = moved * elements / median(work, args.rounds) / 1e6
        found[name] = {"gb_per_s": rate, "share_of_copy": rate / copy}
        print(f"{name:16s} {rate:8.0f} GB/s, {rate / copy:.0%} of the copy's {copy:.0f}")
    return found


def sum_works(width: int, tokens: int, device: str) -> dict[str, Work]:
    """A weight gradient [4 width, width] added to a sum, in several ways."""
    matmul = fp8_matmul("mus_fp8", torch.bfloat16)
    grad = torch.randn(tokens, 4 * width, device=device).bfloat16()
    x = torch.randn(tokens, width, device=device).bfloat16()
    packed = matmul.pack_grad(grad, turned=True), matmul.pack_input(x, turned=True)
    across = [ops.fp8_cast_transpose(t, f)[1] for t, f in ((grad, ops.E5M2), (x, ops.E4M3))]
    total = torch.zeros(4 * width, width, device=device)
    works: dict[str, Work] = {
        "product alone": lambda: matmul.wgrad(*packed),
        "product, then sum": lambda: total.add_(matmul.wgrad(*packed)),
        "bf16 product, then sum": lambda: total.add_(BF16.wgrad(grad, x)),
    }
    if device == "cpu" or ops.fp8_wgrad_(total, *across):
        works["sum within the product"] = lambda: ops.fp8_wgrad_(total, *across)
    return works


def sums(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds of each way."""
    rows = []
    for width in (32,) if args.quick else (2048, 4096):
        works = sum_works(width, args.tokens, args.device)
        times = {name: median(work, args.rounds) for name, work in works.items()}
        print(f"d {width}: " + ", ".join(f"{n} {t:.3f} ms" for n, t in times.items()))
        rows.append({"width": width, "milliseconds": times})
    return rows


def layer_work(module: nn.Module, weight: Tensor, shape: tuple[int, int], later: bool) -> Work:
    """Forward and backward of one layer in a micro-batch: the first of a step, which casts the
    weight, or a later one."""
    (tokens, width), device = shape, weight.device
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16).requires_grad_()
    upstream = torch.randn(tokens, 4 * width, device=device, dtype=torch.bfloat16)

    def work() -> None:
        x.grad = None
        if not later:
            increment_version([weight])  # as an optimizer does
            weight.grad = None
        if isinstance(module, Linear):
            module.prepare()
        with summing_gradients():
            module(x).backward(upstream)

    return work


def our_layer(width: int, matmul: Matmul, device: str) -> tuple[Linear, Tensor]:
    """A layer of ours in a format, and its weight."""
    layer = Linear(width, 4 * width, matmul=matmul, scale=width**-0.5).to(device)
    nn.init.normal_(layer.weight)
    return layer, layer.weight


def rivals(width: int, device: str) -> dict[str, tuple[nn.Module, Tensor]]:
    """The same layer by torch, torchao (compiled) and TransformerEngine, as far as installed."""
    plain = nn.Linear(width, 4 * width, bias=False).to(device).bfloat16()
    found: dict[str, tuple[nn.Module, Tensor]] = {"torch bf16": (plain, plain.weight)}
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        print("torchao is not installed: left out")
    else:
        inner = nn.Sequential(nn.Linear(width, 4 * width, bias=False)).to(device).bfloat16()
        config = Float8LinearConfig.from_recipe_name("tensorwise")
        converted = convert_to_float8_training(inner, config=config)
        found["torchao compiled"] = (torch.compile(converted), next(converted.parameters()))
    try:
        import_te()
    except EnvironmentFault as fault:
        print(f"left out: {fault}")
    else:
        for recipe in ("delayed", "current"):
            layer, weight = our_layer(width, TeMatmul(recipe, (4 * width, width)), device)
            enter_recipe(layer, recipe)
            found[f"te {recipe}"] = (layer, weight)
    return found


def contenders(width: int, args: argparse.Namespace) -> dict[str, Work]:
    """All that is timed at a width."""
    formats = {
        "bf16": BF16,
        "mus_fp8": fp8_matmul("mus_fp8", torch.bfloat16),
        "fp8_current": fp8_matmul("fp8_current", torch.bfloat16),
    }
    shape, works = (args.tokens, width), {}
    for name, matmul in formats.items():
        works[name] = layer_work(*our_layer(width, matmul, args.device), shape, False)
        works[f"{name} later"] = layer_work(*our_layer(width, matmul, args.device), shape, True)
        if width in COMPILED_WIDTHS or args.quick:
            layer, weight = our_layer(width, matmul, args.device)
            layer.compile(backend="aot_eager" if args.quick else "inductor", dynamic=False)
            works[f"{name} compiled"] = layer_work(layer, weight, shape, False)
    for name, (module, weight) in rivals(width, args.device).items():
        works[name] = layer_work(module, weight, shape, False)
    return works


def baseline(name: str) -> str:
    """The bf16 reading that one is compared with: of its own kind."""
    kind = name.rpartition(" ")[2]
    return f"bf16 {kind}" if kind in ("compiled", "later") else "bf16"


def warmed(works: dict[str, Work]) -> dict[str, Work]:
    """Those that run, after three calls; what fails is said and left out."""
    running = {}
    for name, work in works.items():
        try:
            for _ in range(3):
                work()
        except Exception as error:  # a rival's failure is a result, too
            print(f"left out: {name}: {str(error).partition(chr(10))[0][:200]}")
        else:
            running[name] = work
    return running


def layers(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds and ratios per width."""
    rows = []
    for width in (32,) if args.quick else WIDTHS:
        torch.compiler.reset()
        works = warmed(contenders(width, args))
        readings: dict[str, Callable[[], float]] = {
            name: lambda work=work: milliseconds(work, 4)  # type: ignore[misc]
            for name, work in works.items()
        }
        found = common.interleaved(readings, args.rounds)
        times = {name: values["median"] for name, values in found.items()}
        ratios = {
            n: times[baseline(n)] / t
            for n, t in times.items()
            if baseline(n) != n and baseline(n) in times
        }
        print(f"d {width}: " + ", ".join(f"{n} {r:.2f}x {baseline(n)}" for n, r in ratios.items()))
        rows.append({"width": width, "ratios": ratios, "milliseconds": found})
    slower = [row["width"] for row in rows if row["ratios"].get("mus_fp8", 0) < 1]
    print(f"eager FP8 loses against eager bf16 at widths: {slower or 'none of these'}")
    return rows


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="toy shapes, no result file")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.tokens = 2, 64
    elif args.device == "cpu":
        parser.error("the shapes are for a GPU; on a CPU only --quick is sensible")
    fault = ops.cuda_fault()
    if args.device == "cuda" and fault is not None:
        raise SystemExit(f"the CUDA kernels are not in use: {fault}")
    parts = {"kernels": kernels, "sums": sums, "layers": layers}
    found: dict[str, Any] = {"tokens": args.tokens}
    for name in args.parts:
        found[name] = parts[name](args)
        if args.out is not None or not args.quick:
            packages = ("torchao", "transformer-engine")
            path = common.write_result("fp8_gpu", found, *packages, out=args.out)
            print(f"written: {path}", flush=True)


if __name__ == "__main__":
    main()
