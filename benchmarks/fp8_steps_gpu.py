"""FP8 on a GPU: whole training steps against bf16, eager and compiled.

    python benchmarks/fp8_steps_gpu.py [--models 1B 7B] [--rounds 10] [--tax 0.0]
    python benchmarks/fp8_steps_gpu.py --quick --device cpu    # a toy shape: does the script work?

Forward, backward and fused AdamW of models shaped like 1B and 7B (8 of its 32 layers) with unit
scaling, 8192 tokens a step: bf16, static scales, current scaling, and TransformerEngine's delayed
scaling where it is installed (goals: 1.30 times bf16 at 1B, 1.45 at the 7B shape; eager FP8 never
below eager bf16). Where torchao is installed, a bare compiled Llama of the width and depth in bf16
and in its float8: its gain is over its own bf16. --tax: share of more tokens that FP8 needs for the
loss of bf16; speeds at equal quality are divided by 1 + tax. `llmtrain reproduce mus-fp8` finds the
gap of the losses. Times are of CUDA events, four steps in a row. Medians go to
benchmarks/results/fp8_steps_gpu.json, written after each contender. Not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
from gpu_timing import Work, milliseconds, training_step
from torch import nn

from llmtrain import ops
from llmtrain.config.scaling import ScalingConfig
from llmtrain.config.schema import ModelConfig
from llmtrain.errors import EnvironmentFault
from llmtrain.linear import BF16, TeMatmul, enter_recipe, fp8_matmul
from llmtrain.linear.te import import_te
from llmtrain.model import Decoder, build_model, compile_blocks, complete, hidden_layers


@dataclass(frozen=True)
class Shape:
    """A GPT of unit scaling and the batch it is measured with."""

    name: str
    width: int
    depth: int
    heads: int
    vocab: int = 50304
    seq: int = 4096
    batch: int = 2


SHAPES = {
    "1B": Shape("1B", 2048, 24, 16),
    "7B": Shape("7B shape, 8 layers", 4096, 8, 32),
}
TOY = Shape("toy", 64, 2, 2, 256, 32, 2)


def set_format(model: Decoder, name: str, tokens: int) -> None:
    """Products of the hidden layers in a format from now on."""
    scale = 2.0 ** round(torch.tensor(float(tokens * model.cfg.d_model)).log2().item())
    for _, layer in hidden_layers(model):
        if name == "te delayed":
            layer.set_matmul(TeMatmul("delayed", (layer.out_features, layer.in_features)))
        elif name == "bf16":
            layer.set_matmul(BF16)
        else:
            layer.set_matmul(fp8_matmul(name, torch.bfloat16, scale))
    if name == "te delayed":
        enter_recipe(model, "delayed")


def llmtrain_step(shape: Shape, name: str, compiled: bool, args: argparse.Namespace) -> Work:
    """A step of a new model in a format."""
    cfg = ModelConfig(
        vocab_size=shape.vocab,
        d_model=shape.width,
        n_layers=shape.depth,
        n_heads=shape.heads,
        norm="layernorm",
        norm_placement="post_branch",
        activation="gelu",
        scaling=ScalingConfig(parametrization="mus", tau_by_depth=True),
    )
    model = build_model(
        complete(cfg, None, shape.seq), seed=0, device=args.device, compute_dtype=torch.bfloat16
    )
    set_format(model, name, shape.batch * shape.seq)
    if compiled:
        compile_blocks(model)
    return training_step(model, shape.batch, shape.seq)


def torchao_step(shape: Shape, name: str, args: argparse.Namespace) -> Work:
    """A step of a bare compiled Llama in bf16, or with torchao's float8 in its blocks."""
    from peers.bare import Llama
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    with torch.device(args.device):
        llama = Llama(shape.vocab, shape.width, shape.depth, shape.heads, 4 * shape.width)
    llama = llama.bfloat16()
    if name == "float8":
        recipe = Float8LinearConfig.from_recipe_name("tensorwise")
        convert_to_float8_training(llama.blocks, config=recipe)
    compiled: Any = torch.compile(llama)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, shape.vocab, (shape.batch, shape.seq), device=args.device)

    def step() -> object:
        optimizer.zero_grad()
        logits = compiled(tokens)
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        return optimizer.step()

    return step


def contenders(shape: Shape, args: argparse.Namespace) -> dict[str, Callable[[], Work]]:
    """What is measured of a shape, in order; each is made when its turn comes."""
    names = ["bf16", "mus_fp8", "fp8_current"]
    found = {n: lambda n=n: llmtrain_step(shape, n, False, args) for n in names}
    try:
        import_te()
        found["te delayed"] = lambda: llmtrain_step(shape, "te delayed", False, args)
    except EnvironmentFault as fault:
        print(f"left out: {fault}")
    if not args.eager:
        for name in names:
            make = lambda n=name: llmtrain_step(shape, n, True, args)  # noqa: E731
            found[f"{name} compiled"] = make
        try:
            import torchao  # noqa: F401
        except ImportError:
            print("torchao is not installed: left out")
        else:
            for name in ("bf16", "float8"):
                found[f"torchao {name}"] = lambda n=name: torchao_step(shape, n, args)
    return found


def baseline(name: str) -> str:
    """The bf16 reading that one is compared with."""
    if name.startswith("torchao"):
        return "torchao bf16"
    return "bf16 compiled" if name.endswith("compiled") else "bf16"


def timed(make: Callable[[], Work], rounds: int) -> float:
    """Median milliseconds of a step, after three that do not count."""
    step = make()
    for _ in range(3):
        step()
    return float(common.summary([milliseconds(step, 4) for _ in range(rounds)])["median"])


def measure(shape: Shape, args: argparse.Namespace, row: dict[str, Any]) -> None:
    """Fill ``row`` with times and ratios, contender by contender."""
    times: dict[str, float] = row["milliseconds"]
    for name, make in contenders(shape, args).items():
        torch.compiler.reset()
        try:
            times[name] = timed(make, args.rounds)
        except Exception as error:  # a rival's failure is a result, too
            print(f"left out: {name}: {str(error).partition(chr(10))[0][:200]}")
            continue
        finally:
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
        base = baseline(name)
        if base in times and base != name:
            ratio = times[base] / times[name]
            row["raw"][name], row["equal_quality"][name] = ratio, ratio / (1 + args.tax)
            print(
                f"{shape.name}: {name} {times[name]:.1f} ms, {ratio:.2f}x {base}, "
                f"{ratio / (1 + args.tax):.2f}x at equal quality",
                flush=True,
            )
        else:
            print(f"{shape.name}: {name} {times[name]:.1f} ms", flush=True)
        write(args)


ROWS: list[dict[str, Any]] = []


def write(args: argparse.Namespace) -> None:
    """The result file as far as it has come."""
    if args.out is None and args.quick:
        return
    found = {"tax": args.tax, "models": ROWS}
    common.write_result("fp8_steps_gpu", found, "torchao", "transformer-engine", out=args.out)


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=tuple(SHAPES), default=tuple(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tax", type=float, default=0.0)
    parser.add_argument("--eager", action="store_true", help="nothing compiled")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="a toy shape, no result file")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.rounds = 1
    elif args.device == "cpu":
        parser.error("the shapes are for a GPU; on a CPU only --quick is sensible")
    fault = ops.cuda_fault()
    if args.device == "cuda" and fault is not None:
        raise SystemExit(f"the CUDA kernels are not in use: {fault}")
    for shape in [TOY] if args.quick else [SHAPES[name] for name in args.models]:
        row: dict[str, Any] = {"model": shape.name, "milliseconds": {}}
        ROWS.append({**row, "raw": {}, "equal_quality": {}})
        measure(shape, args, ROWS[-1])


if __name__ == "__main__":
    main()
