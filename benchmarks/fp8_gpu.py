"""FP8 on a GPU: kernels against the copy bandwidth, linear layers and training steps against bf16.

    python benchmarks/fp8_gpu.py [--rounds 20] [--tokens 16384] [--tax 0.0]

First the device's own copy, GB/s of reading and writing 1 GiB. Then llmtrain's kernels on
[tokens, 4096] in bf16, in GB/s of the bytes a single pass has to move (goal: 85% of the copy).
Then forward and backward of one linear layer d -> 4 d, all casts included, in turn within each
round: bf16, static scales, current scaling, and torchao's float8 and TransformerEngine where they
are installed (goal at 4096: 1.7 times bf16). Then whole training steps, eager, of models shaped
like 1B and 7B (8 of its 32 layers) with unit scaling (goals: 1.30 and 1.45). The widths at which
FP8 loses are listed. --tax: share of more tokens that FP8 needs for the loss of bf16, as `llmtrain
reproduce mus-fp8` finds; speeds at equal quality are divided by 1 + tax. Times are of CUDA events.
Medians go to benchmarks/results/fp8_gpu.json. Not run on a GPU yet.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from torch import nn

from llmtrain import ops
from llmtrain.config.scaling import ScalingConfig
from llmtrain.config.schema import LossConfig, ModelConfig
from llmtrain.errors import EnvironmentFault
from llmtrain.linear import BF16, Linear, Matmul, TeMatmul, enter_recipe, fp8_matmul
from llmtrain.linear.te import import_te
from llmtrain.loss import head_loss
from llmtrain.model import build_model, complete, hidden_layers

WIDTHS = (512, 1024, 2048, 4096, 8192)
# Width, layers, heads; sequences of 4096 tokens, two to a step.
MODELS = {"1B": (2048, 24, 16), "7B shape, 8 layers": (4096, 8, 32)}
SEQUENCE, VOCABULARY = 4096, 50304
Work = Callable[[], object]


def milliseconds(work: Work) -> float:
    """GPU time of one call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def median(work: Work, rounds: int) -> float:
    """Median milliseconds after three calls that do not count."""
    for _ in range(3):
        work()
    return float(common.summary([milliseconds(work) for _ in range(rounds)])["median"])


def kernel_works(tokens: int, device: str) -> dict[str, tuple[int, int, Work]]:
    """Name: bytes an element, elements, and a call."""
    x, branch = torch.randn(2, tokens, 4096, device=device).bfloat16()
    pairs, weight = torch.cat((x, branch), 1), torch.ones(4096, device=device)
    master, y = torch.randn(4096, 4096, device=device), ops.fp8_cast(x, ops.E4M3)
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


def kernels(tokens: int, rounds: int) -> dict[str, Any]:
    """GB/s of the copy and of each kernel, and its share of the copy."""
    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() / median(lambda: target.copy_(source), rounds) / 1e6
    found: dict[str, Any] = {"copy": {"gb_per_s": copy}}
    for name, (moved, elements, work) in kernel_works(tokens, "cuda").items():
        rate = moved * elements / median(work, rounds) / 1e6
        found[name] = {"gb_per_s": rate, "share_of_copy": rate / copy}
        print(f"{name:16s} {rate:8.0f} GB/s, {rate / copy:.0%} of the copy's {copy:.0f}")
    return found


def layer_work(width: int, tokens: int, module: nn.Module, weight: torch.Tensor) -> Work:
    """Forward and backward of one layer, as a micro-batch of a step that casts weights once."""
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    upstream = torch.randn(tokens, 4 * width, device="cuda", dtype=torch.bfloat16)

    def work() -> None:
        with torch.no_grad():
            weight.add_(0.0)  # a new version: the cast of the weight is part of the time
        weight.grad = x.grad = None
        module(x).backward(upstream)

    return work


def our_layer(width: int, matmul: Matmul) -> tuple[nn.Module, torch.Tensor]:
    """A layer of ours in a format, and its weight."""
    layer = Linear(width, 4 * width, matmul=matmul, scale=width**-0.5).cuda()
    nn.init.normal_(layer.weight)
    return layer, layer.weight


def rivals(width: int) -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """The same layer by torchao (compiled) and TransformerEngine, where they are installed."""
    found: dict[str, tuple[nn.Module, torch.Tensor]] = {}
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        print("torchao is not installed: left out")
    else:
        plain = nn.Sequential(nn.Linear(width, 4 * width, bias=False)).cuda().bfloat16()
        config = Float8LinearConfig.from_recipe_name("tensorwise")
        converted = convert_to_float8_training(plain, config=config)
        found["torchao compiled"] = (torch.compile(converted), next(converted.parameters()))
    try:
        import_te()
    except EnvironmentFault as fault:
        print(f"left out: {fault}")
    else:
        for recipe in ("delayed", "current"):
            layer, weight = our_layer(width, TeMatmul(recipe, (4 * width, width)))
            enter_recipe(layer, recipe)
            found[f"te {recipe}"] = (layer, weight)
    return found


def layers(tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds and ratios per width."""
    rows = []
    for width in WIDTHS:
        formats = {
            "bf16": BF16,
            "mus_fp8": fp8_matmul("mus_fp8", torch.bfloat16),
            "fp8_current": fp8_matmul("fp8_current", torch.bfloat16),
        }
        modules = {name: our_layer(width, matmul) for name, matmul in formats.items()}
        modules |= rivals(width)
        works = {name: layer_work(width, tokens, *pair) for name, pair in modules.items()}
        for work in works.values():
            for _ in range(3):
                work()
        found = common.interleaved(
            {name: lambda work=work: milliseconds(work) for name, work in works.items()}, rounds
        )
        ratios = {n: found["bf16"]["median"] / found[n]["median"] for n in works if n != "bf16"}
        print(f"d {width}: " + ", ".join(f"{n} {r:.2f}x bf16" for n, r in ratios.items()))
        rows.append({"width": width, "ratios": ratios, "milliseconds": found})
    return rows


def model_work(shape: tuple[int, int, int], sequence: int, device: str) -> Callable[[str], object]:
    """A training step (forward, backward, AdamW) in a format, of a model with unit scaling."""
    width, depth, heads = shape
    scaling = ScalingConfig(parametrization="mus", tau_by_depth=True)
    cfg = ModelConfig(
        vocab_size=VOCABULARY,
        d_model=width,
        n_layers=depth,
        n_heads=heads,
        norm="layernorm",
        norm_placement="post_branch",
        activation="gelu",
        scaling=scaling,
    )
    compute = torch.bfloat16
    model = build_model(complete(cfg, None, sequence), seed=0, device=device, compute_dtype=compute)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, VOCABULARY, (2, sequence), device=device)
    ones = torch.ones(tokens.shape, device=device)
    scale = 2.0 ** round(torch.tensor(float(tokens.numel() * width)).log2().item())
    formats: dict[str, Matmul] = {
        "bf16": BF16,
        "mus_fp8": fp8_matmul("mus_fp8", compute, scale),
        "fp8_current": fp8_matmul("fp8_current", compute),
    }

    def step(name: str) -> object:
        for _, layer in hidden_layers(model):
            if layer.matmul is not formats[name]:
                layer.set_matmul(formats[name])
        optimizer.zero_grad()
        output = model(
            tokens,
            head_fn=lambda hidden, head: head_loss(
                hidden, head, tokens, ones, LossConfig(), float(tokens.numel())
            ),
        )
        output.loss.backward()
        return optimizer.step()

    return step


def models(rounds: int, tax: float) -> list[dict[str, Any]]:
    """Milliseconds a step, and speed against bf16, raw and at equal quality."""
    rows = []
    for label, shape in MODELS.items():
        step = model_work(shape, SEQUENCE, "cuda")
        times: dict[str, float] = {}
        for name in ("bf16", "mus_fp8", "fp8_current"):
            times[name] = median(partial(step, name), rounds)
        raw = {n: times["bf16"] / t for n, t in times.items() if n != "bf16"}
        equal = {name: ratio / (1 + tax) for name, ratio in raw.items()}
        for name, ratio in raw.items():
            print(f"{label}: {name} {ratio:.2f}x bf16, {equal[name]:.2f}x at equal quality")
        rows.append({"model": label, "milliseconds": times, "raw": raw, "equal_quality": equal})
        del step
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--tax", type=float, default=0.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    fault = ops.cuda_fault()
    if fault is not None:
        raise SystemExit(f"the CUDA kernels are not in use: {fault}")
    found = {"kernels": kernels(args.tokens, args.rounds), "tokens": args.tokens, "tax": args.tax}
    rows = layers(args.tokens, args.rounds)
    slower = [row["width"] for row in rows if row["ratios"]["mus_fp8"] < 1]
    print(f"FP8 loses at widths: {slower or 'none of these'}")
    steps = models(max(args.rounds // 2, 5), args.tax)
    path = common.write_result("fp8_gpu", {**found, "layers": rows, "models": steps}, out=args.out)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
