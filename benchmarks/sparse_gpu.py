"""Sparse products on one GPU: 2:4 and blocks of 64x64 against dense bf16, FP8 and torch's own.

    python benchmarks/sparse_gpu.py

Layers: forward and backward of one linear layer (width x width), weights packed once, dense bf16
with a mask, FP8 (``mus_fp8``), 2:4 forward only and both ways, by every library that runs here;
and blocks at 80, 90 and 95% sparsity, against dense and, forward alone, torch's BSR. Steps: a
small model of every kind, forward to AdamW. Choices: what ``products: auto`` takes for the layers.
Predictions, before any run: 2:4 both ways 1.1x dense at 8192 and less at 4096 (forward is 1.2x on
Hopper, the weight gradient stays dense), slower than FP8; blocks level with dense near 75% on
Hopper, and 2x at 90%. Writes benchmarks/results/sparse_gpu.json. Not run on a GPU yet.

``--toy`` tries the control flow on a CPU with small shapes; it writes no result.
"""

from __future__ import annotations

import argparse
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
from gpu_timing import Work, milliseconds, training_step
from torch import nn

from llmtrain import ops
from llmtrain.config.schema import ModelConfig
from llmtrain.linear import BF16, BLOCKS, Linear, Mask, Matmul, fp8_matmul
from llmtrain.model import build_model, complete, hidden_layers
from llmtrain.ops.masking import transposable_mask
from llmtrain.ops.semi import LIBRARIES, library_fault
from llmtrain.sparsity import Case, pick_products
from llmtrain.sparsity.case import BOTH, FORWARD

SPARSITIES = (80, 90, 95)


@dataclass(frozen=True)
class Size:
    """What is measured: layer widths, tokens of a layer, and the model of the steps."""

    device: torch.device
    widths: tuple[int, ...] = (4096, 8192)
    tokens: int = 16384
    model: tuple[int, int, int] = (2048, 8, 16)  # width, layers, heads
    sequence: int = 4096
    rounds: int = 20

    @property
    def on_gpu(self) -> bool:
        """Not the toy."""
        return self.device.type == "cuda"


TOY = Size(torch.device("cpu"), (128,), 48, (64, 1, 4), 16, 2)


def timed(works: dict[str, Work], size: Size) -> dict[str, dict[str, Any]]:
    """Milliseconds of several contenders taken in turn, after three calls that do not count."""
    for work in works.values():
        for _ in range(3):
            work()
    readings = {
        name: lambda work=work: milliseconds(work, on_gpu=size.on_gpu)
        for name, work in works.items()
    }
    return common.interleaved(readings, size.rounds)


def libraries(size: Size) -> dict[str, str | None]:
    """Of torch's 2:4 libraries, why each does not run here; None: it does."""
    return {name: library_fault(name, size.device) for name in LIBRARIES}


def mask_of(kind: str, shape: tuple[int, int], sparsity: int, device: torch.device) -> Mask:
    """A random mask; of the sparsity in percent where it is of blocks."""
    gen = torch.Generator().manual_seed(sum(shape) + sparsity)
    rows, cols = shape
    if kind == BLOCKS:
        kept = torch.rand(-(-rows // 64), -(-cols // 64), generator=gen) >= sparsity / 100
        return Mask(kept.to(device), (64, 64), shape)
    scores = torch.rand(shape, generator=gen).to(device)
    if kind == BOTH:
        return Mask(transposable_mask(scores), (1, 1), shape)
    ranks = scores.view(rows, cols // 4, 4).argsort(-1).argsort(-1)
    return Mask((ranks < 2).view(shape), (1, 1), shape)


def layer_work(width: int, size: Size, matmul: Matmul, mask: Mask | None, kind: str) -> Work:
    """Forward and backward of a layer as one micro-batch of a step, which packs weights once."""
    layer = Linear(width, width, matmul=matmul).to(size.device)
    nn.init.normal_(layer.weight)
    if mask is not None:
        layer.set_mask(mask, sparse=bool(kind), kind=kind)
    x = torch.randn(size.tokens, width, device=size.device).bfloat16().requires_grad_()
    upstream = torch.randn(size.tokens, width, device=size.device).bfloat16()

    def work() -> None:
        with torch.no_grad():
            layer.weight.add_(0.0)  # a new version: packing is part of the time
        layer.weight.grad = x.grad = None
        layer(x).backward(upstream)

    return work


def ratios(found: dict[str, dict[str, Any]], base: str = "dense bf16") -> dict[str, float]:
    """How many times as fast as ``base``."""
    return {n: found[base]["median"] / row["median"] for n, row in found.items() if n != base}


def show(label: str, found: dict[str, float]) -> None:
    """One line of ratios."""
    print(f"{label}: " + ", ".join(f"{name} {ratio:.2f}x" for name, ratio in found.items()))


def semi_layers(size: Size) -> list[dict[str, Any]]:
    """2:4 layers against dense ones and FP8."""
    rows = []
    running = [name for name, fault in libraries(size).items() if fault is None]
    for width in size.widths:
        works: dict[str, Work] = {"dense bf16": layer_work(width, size, BF16, None, "")}
        static = fp8_matmul("mus_fp8", torch.bfloat16)
        works["dense FP8"] = layer_work(width, size, static, None, "")
        for kind in (FORWARD, BOTH):
            mask = mask_of(kind, (width, width), 50, size.device)
            works[f"{kind}, dense with zeros"] = layer_work(width, size, BF16, mask, "")
            for library in running:
                works[f"{kind}, {library}"] = layer_work(width, size, BF16, mask, library)
        found = timed(works, size)
        show(f"2:4, width {width}", ratios(found))
        rows.append({"width": width, "milliseconds": found, "ratios": ratios(found)})
    return rows


def bsr_work(width: int, size: Size, mask: Mask) -> tuple[Work, Work]:
    """y = x W^T by torch's BSR, and by our kernel."""
    weight = torch.randn(width, width, device=size.device).bfloat16()
    dense = torch.where(mask.box((0, 0), mask.shape), weight, 0.0)
    theirs = dense.to_sparse_bsr((64, 64))
    x = torch.randn(size.tokens, width, device=size.device).bfloat16()
    ours = Linear(width, width, matmul=BF16).to(size.device)
    with torch.no_grad():
        ours.weight.copy_(weight)
    ours.set_mask(mask, sparse=True, kind=BLOCKS)

    @torch.no_grad()
    def forward() -> object:
        return ours(x)

    return lambda: nn.functional.linear(x, theirs), forward


def block_layers(size: Size) -> list[dict[str, Any]]:
    """Block-sparse layers against dense ones and torch's BSR."""
    rows = []
    for width in size.widths:
        for sparsity in SPARSITIES:
            mask = mask_of(BLOCKS, (width, width), sparsity, size.device)
            works: dict[str, Work] = {"dense bf16": layer_work(width, size, BF16, None, "")}
            works["dense with zeros"] = layer_work(width, size, BF16, mask, "")
            works["blocks"] = layer_work(width, size, BF16, mask, BLOCKS)
            row: dict[str, Any] = {"width": width, "sparsity": sparsity}
            row["milliseconds"] = timed(works, size)
            row["ratios"] = ratios(row["milliseconds"])
            show(f"blocks, width {width}, {sparsity}% sparse", row["ratios"])
            try:
                theirs, ours = bsr_work(width, size, mask)
                forward = timed({"torch BSR": theirs, "blocks": ours}, size)
                row["forward_milliseconds"] = forward
                show("  forward alone, against torch's BSR", ratios(forward, "torch BSR"))
            except (RuntimeError, NotImplementedError) as error:
                row["bsr_fault"] = str(error).splitlines()[0]
                print(f"  torch's BSR does not run here: {row['bsr_fault']}")
            rows.append(row)
    return rows


def model_step(size: Size, kind: str, sparse: str) -> Work:
    """A training step of a small model, forward to AdamW, with all hidden layers of one kind."""
    width, depth, heads = size.model
    shape = ModelConfig(vocab_size=8192, d_model=width, n_layers=depth, n_heads=heads)
    model_cfg = complete(shape, None, size.sequence)
    dtype = torch.bfloat16
    model = build_model(model_cfg, seed=0, device=str(size.device), compute_dtype=dtype)
    for _, layer in hidden_layers(model):
        rows, cols = layer.weight.shape
        if kind:
            mask = mask_of(kind, (rows, cols), 90, size.device)
            layer.set_mask(mask, sparse=bool(sparse), kind=sparse)
    return training_step(model, 2, size.sequence)


def steps(size: Size) -> dict[str, Any]:
    """Whole steps, each model alone in memory."""
    running = [name for name, fault in libraries(size).items() if fault is None]
    contenders = {"dense bf16": ("", ""), f"{BOTH}, dense with zeros": (BOTH, "")}
    contenders |= {f"{BOTH}, {library}": (BOTH, library) for library in running}
    contenders["blocks, 90% sparse"] = (BLOCKS, BLOCKS)
    found = {}
    for name, (kind, sparse) in contenders.items():
        found |= timed({name: model_step(size, kind, sparse)}, size)
    show("whole steps", ratios(found))
    return {"model": size.model, "milliseconds": found, "ratios": ratios(found)}


def choices(size: Size) -> dict[str, str]:
    """What ``products: auto`` takes."""
    gpu = size.device if size.on_gpu else None
    cases = [Case(w, w, (1, 1), 50, "bfloat16", s) for w in size.widths for s in (FORWARD, BOTH)]
    cases += [
        Case(w, w, (64, 64), 100 - sparsity, "bfloat16")
        for w in size.widths
        for sparsity in SPARSITIES
    ]
    found = {str(case): str(choice) for case, choice in pick_products(cases, gpu=gpu).items()}
    for case, words in found.items():
        print(f"auto: {case}: {words}")
    return found


def driver() -> dict[str, Any]:
    """The versions of the GPU's driver, CUDA and cuSPARSELt."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        version = done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        version = None
    cusparselt = torch.backends.cusparselt.version()
    return {"driver": version, "cuda": torch.version.cuda, "cusparselt": cusparselt}


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.toy:
        size = TOY
    elif (fault := ops.cuda_fault()) is not None:
        raise SystemExit(f"the CUDA kernels are not in use: {fault}")
    else:
        size = Size(torch.device("cuda", 0), tokens=args.tokens, rounds=args.rounds)
    result: dict[str, Any] = {"libraries": libraries(size), "tokens": size.tokens}
    for name, fault in result["libraries"].items():
        print(f"{name}: {fault or 'runs'}")
    result["choices"] = choices(size)
    result |= {"semi": semi_layers(size), "blocks": block_layers(size), "steps": steps(size)}
    if args.toy:
        print("the control flow runs; a toy's times mean nothing, and none were written")
        return
    result |= driver()
    print(f"written: {common.write_result('sparse_gpu', result, 'triton', out=args.out)}")


if __name__ == "__main__":
    main()
