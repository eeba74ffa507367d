"""A training step of a small GPT with 75% of its hidden weights pruned, against its dense twin.

    python benchmarks/sparse_step.py [--rounds 5] [--blocks 4x4]

All are train modules of a config, as a run from a YAML file makes them: the twin has no
``sparsity``; "4x4" holds kept weights alone (``storage: packed``), "4x4, zeros" dense weights with
zeros; both with sparse products. A step is forward, loss, backward, gradient norm, clipping and
update on 2048 tokens, one thread, seconds of the process' own processor time, in turn within each
round. Memory is counted (weights, gradients, moments, masks, places and copies of weights, of all
layers) and read as peak resident memory of a process that trains one of them for two
steps. Goal: 1.8 times the twin's speed in less memory. benchmarks/results/sparse_step.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import torch
from torch import Tensor

from llmtrain import ops
from llmtrain.config import RunConfig, from_dict
from llmtrain.data.batch import Batch
from llmtrain.linear import SparseMatmul
from llmtrain.methods.sparsity import sparsity
from llmtrain.model import complete, hidden_layers
from llmtrain.parallel import World, build_layout
from llmtrain.parallel.hardware import Precision
from llmtrain.train.engine import build_module
from llmtrain.train.module import TrainModule

TOKENS, SEQ = 2048, 256
SHAPE = {"d_model": 512, "n_layers": 3, "n_heads": 8, "d_ff": 2048, "vocab_size": 1024}
ZEROS = ", zeros"


def config(name: str, sparsity: float) -> RunConfig:
    """The run of a contender: dense, or blocks, with ``ZEROS`` or without."""
    raw: dict[str, Any] = {
        "model": SHAPE,
        "data": {"corpus": "none", "seq_len": SEQ},
        "precision": {"compute": "fp32"},
        "train": {"global_batch_size": TOKENS // SEQ},
    }
    if name != "dense":
        raw["sparsity"] = {
            "density": 1 - sparsity,
            "granularity": name.removesuffix(ZEROS),
            "products": "sparse",
            "storage": "dense" if name.endswith(ZEROS) else "packed",
        }
    return from_dict(raw)


def module_of(cfg: RunConfig) -> TrainModule:
    """The train module, with the masks that the run's hook makes."""
    model = complete(cfg.model, None, SEQ)
    layout = build_layout(cfg.parallel, World(0, 1, 0, torch.device("cpu"), None), 1)
    module = build_module(cfg, model, Precision(torch.float32, torch.float32), layout)
    if cfg.sparsity is not None:
        sparsity(cfg.sparsity).begin(SimpleNamespace(cfg=cfg, module=module))  # type: ignore[arg-type]
    return module


def batch() -> Batch:
    """The same random tokens for all."""
    gen = torch.Generator().manual_seed(2)
    n = TOKENS // SEQ
    tokens = torch.randint(SHAPE["vocab_size"], (n, SEQ + 1), generator=gen)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=torch.ones(n, SEQ),
        doc_ids=torch.zeros(n, SEQ, dtype=torch.int32),
        positions=torch.arange(SEQ).expand(n, SEQ),
        source_ids=torch.zeros(n, dtype=torch.int64),
        sample_ids=torch.arange(n),
    )


def twin(name: str, sparsity: float) -> tuple[Callable[[], None], TrainModule]:
    """A step, and what it trains."""
    module, given = module_of(config(name, sparsity)), batch()

    def step() -> None:
        module.forward_backward(given, float(TOKENS), 1)
        module.update(module.gradient_norm(), 1e-4)

    return step, module


def beside(module: TrainModule) -> Iterator[Tensor]:
    """What sparse layers keep beside weights, gradients and moments."""
    for _, layer in hidden_layers(module.model):
        if layer.mask is None:
            continue
        yield layer.mask.kept
        if isinstance(layer.matmul, SparseMatmul):
            index = layer.matmul.index
            yield index.place
            yield from (index.values, index.backward.values)
            for side in (index.forward, index.backward):
                yield from (side.starts, side.columns_of)


def held(module: TrainModule) -> int:
    """Bytes of weights, gradients, moments, and of masks, places and copies; memory that two share
    counts once."""
    found = {t.data_ptr(): t.nbytes for t in (*module.params.values(), *beside(module))}
    total = sum(found.values()) + sum(p.nbytes for p in module.params.values())
    states = module.optimizer.state.values()
    return total + sum(t.nbytes for state in states for t in state.values())


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


def compare(blocks: list[str], sparsity: float, rounds: int) -> dict[str, Any]:
    """Times, memory and ratios of the dense twin and of the model with each of ``blocks``."""
    names = ["dense", *blocks, *(block + ZEROS for block in blocks)]
    twins = {name: twin(name, sparsity) for name in names}
    for step, _ in twins.values():
        step()
    found = common.interleaved({name: reading(t[0]) for name, t in twins.items()}, rounds)
    rows = {}
    for name, (_, module) in twins.items():
        faster = found["dense"]["median"] / found[name]["median"]
        rows[name] = {
            "times as fast": faster,
            "held bytes": held(module),
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
        step = twin(args.only, args.sparsity)[0]
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
