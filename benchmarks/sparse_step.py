"""A training step of a small GPT with 75% of its hidden weights pruned, against its dense twin.

    python benchmarks/sparse_step.py [--rounds 5] [--blocks 4x4]

Both are llmtrain's decoder with the same weights: the twin has ``Linear`` layers and torch's fused
AdamW, the sparse model ``SparseLinear`` layers and ``SparseAdamW``. A step is forward, loss,
backward and update on 2048 tokens, one thread, seconds of the process' own processor time, in turn
within each round. Memory is counted (weights, gradients, moments, indices of hidden layers and
the rest) and read as peak resident memory of a process that trains one of them for two steps.
Goal: 1.8 times the twin's speed in less memory. benchmarks/results/sparse_step.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import nn

from llmtrain import ops
from llmtrain.config.schema import ModelConfig
from llmtrain.linear import Mask, SparseLinear
from llmtrain.model import build_model, complete, hidden_layers
from llmtrain.optim import SparseAdamW

TOKENS, SEQ = 2048, 256
SHAPE = {"d_model": 512, "n_layers": 3, "n_heads": 8, "d_ff": 2048, "vocab_size": 1024}
RATE = {"lr": 1e-4, "weight_decay": 0.1}


def prune(model: nn.Module, block: tuple[int, int], sparsity: float) -> None:
    """Put ``SparseLinear`` layers with random masks in place of the hidden ones."""
    gen = torch.Generator().manual_seed(1)
    for name, layer in list(hidden_layers(model)):
        shape = (layer.out_features, layer.in_features)
        grid = [-(-n // b) for n, b in zip(shape, block, strict=True)]
        mask = Mask(torch.rand(grid, generator=gen) >= sparsity, block, shape)
        parent, _, own = name.rpartition(".")
        sparse = SparseLinear(layer.weight.detach(), mask, layer.bias)
        setattr(model.get_submodule(parent), own, sparse)


def twin(
    block: tuple[int, int] | None, sparsity: float
) -> tuple[Callable[[], None], nn.Module, list]:
    """A step, its model and its optimizers; block None: dense."""
    cfg = complete(ModelConfig(**SHAPE), None, SEQ)
    model = build_model(cfg, seed=0, device="cpu", compute_dtype=torch.float32)
    packed = {}
    if block is not None:
        prune(model, block, sparsity)
        layers = [m for m in model.modules() if isinstance(m, SparseLinear)]
        packed = {layer.values: layer.packed for layer in layers}
    rest = [p for p in model.parameters() if p not in packed]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, fused=True, **RATE)]
    if packed:
        optimizers.append(SparseAdamW(packed, **RATE))
    gen = torch.Generator().manual_seed(2)
    tokens = torch.randint(SHAPE["vocab_size"], (TOKENS // SEQ, SEQ + 1), generator=gen)

    def step() -> None:
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step, model, optimizers


def held(model: nn.Module, optimizers: list) -> int:
    """Bytes of weights, gradients, moments, and of indices and transposed copies."""
    total = sum(2 * p.numel() * p.element_size() for p in model.parameters())
    for optimizer in optimizers:
        for state in optimizer.state.values():
            total += sum(t.numel() * t.element_size() for t in state.values())
    for layer in model.modules():
        if isinstance(layer, SparseLinear):
            total += layer.packed.bytes() - layer.values.numel() * 4
    return total


def reading(step: Callable[[], None]) -> Callable[[], float]:
    """Processor seconds of a step."""

    def measure() -> float:
        begin = time.process_time()
        step()
        return time.process_time() - begin

    return measure


def own_peak() -> int:
    """Peak resident bytes of this process; getrusage would count the parent's before exec too."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def peak(block: str, sparsity: float) -> int:
    """Peak resident bytes of a process that does two steps."""
    command = [sys.executable, __file__, "--only", block, "--sparsity", str(sparsity)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout)["peak"])


def parse(block: str) -> tuple[int, int] | None:
    """(4, 4) of "4x4"; None of "dense"."""
    if block == "dense":
        return None
    high, wide = block.split("x")
    return int(high), int(wide)


def compare(blocks: list[str], sparsity: float, rounds: int) -> dict[str, Any]:
    """Times, memory and ratios of the dense twin and of the model with each of ``blocks``."""
    names = ["dense", *blocks]
    twins = {name: twin(parse(name), sparsity) for name in names}
    for step, _, _ in twins.values():
        step()
    found = common.interleaved({name: reading(t[0]) for name, t in twins.items()}, rounds)
    rows = {}
    for name, (_, model, optimizers) in twins.items():
        faster = found["dense"]["median"] / found[name]["median"]
        rows[name] = {
            "times as fast": faster,
            "held bytes": held(model, optimizers),
            "peak resident bytes": peak(name, sparsity),
            "seconds": found[name],
        }
        sizes = f"{rows[name]['held bytes'] / 1e6:.0f} MB held"
        resident = f"{rows[name]['peak resident bytes'] / 1e6:.0f} MB resident at most"
        print(f"{name}: {faster:.2f} times the dense step, {sizes}, {resident}", flush=True)
    return rows


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--blocks", nargs="+", default=["4x4"])
    parser.add_argument("--only", help="of one contender, the peak memory of two steps, as JSON")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not ops.native_loaded():
        raise SystemExit("the compiled kernels are not built; run: make build")
    torch.set_num_threads(1)
    if args.only:
        step = twin(parse(args.only), args.sparsity)[0]
        step()
        step()
        print(json.dumps({"peak": own_peak()}))
        return
    rows = compare(args.blocks, args.sparsity, args.rounds)
    result = {
        "kernels": ops.kernels_line(),
        "threads": 1,
        "model": SHAPE,
        "tokens": TOKENS,
        "sparsity": args.sparsity,
        "rows": rows,
    }
    print(f"written: {common.write_result('sparse_step', result, out=args.out)}")


if __name__ == "__main__":
    main()
