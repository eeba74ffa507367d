"""Tensor + sequence parallelism over gloo ranks: llmtrain against DTensor's parallelize_module.

The same Llama shape, tokens, dtype, AdamW and number of threads in the same processes; both take
a step in turn, so that a drifting machine cancels, and every ratio is formed within a round.
DTensor's side is written as its tutorial has it: column- and row-wise linears, SequenceParallel
norms, a vocabulary-parallel head under ``loss_parallel``. Both are checked to compute the same
loss before anything is timed. Then two ratios of llmtrain to itself: without sequence
parallelism, and in deterministic mode.

    python benchmarks/parallel.py                 # 2 ranks, one thread each
    python benchmarks/parallel.py --quick
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from common import ROOT, write_result  # noqa: E402
from peers.bare import Llama  # noqa: E402
from torch import Tensor  # noqa: E402

from llmtrain.config.schema import ModelConfig, RunConfig  # noqa: E402
from llmtrain.data.batch import Batch  # noqa: E402
from llmtrain.model import complete  # noqa: E402
from llmtrain.parallel import World, build_layout  # noqa: E402
from llmtrain.parallel.hardware import Precision  # noqa: E402
from llmtrain.train.module import TrainModule  # noqa: E402

D_MODEL, N_LAYERS, N_HEADS, D_FF, VOCAB, SEQ, BATCH = 512, 4, 8, 1408, 8192, 256, 8
LR = 1e-3
Step = Callable[[], float]


def make_batch() -> Batch:
    """Random tokens, every one of weight 1."""
    draw = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(0, VOCAB, (BATCH, SEQ), generator=draw) for _ in range(2))
    zeros = torch.zeros(BATCH, SEQ)
    ids = torch.arange(BATCH)
    positions = torch.arange(SEQ).expand(BATCH, SEQ)
    return Batch(tokens, targets, zeros + 1, zeros.int(), positions, ids * 0, ids)


def ours(world: World, **changes: Any) -> tuple[Step, TrainModule]:
    """A step of llmtrain's train module under ``parallel.tensor`` = the world."""
    cfg = RunConfig()
    model = ModelConfig(
        d_model=D_MODEL, n_layers=N_LAYERS, n_heads=N_HEADS, d_ff=D_FF, vocab_size=VOCAB
    )
    parallel = dataclasses.replace(cfg.parallel, tensor=world.size, **changes)
    loss = dataclasses.replace(cfg.loss, chunk_tokens=BATCH * SEQ)
    optim = dataclasses.replace(cfg.optim, lr=LR, clip_norm=None)
    data = dataclasses.replace(cfg.data, seq_len=SEQ)
    train = dataclasses.replace(cfg.train, global_batch_size=BATCH)
    cfg = dataclasses.replace(
        cfg, model=model, parallel=parallel, loss=loss, optim=optim, data=data, train=train
    )
    layout = build_layout(cfg.parallel, world, N_HEADS)
    precision = Precision(torch.float32, torch.float32)
    module = TrainModule(cfg, complete(model, VOCAB, SEQ), precision, layout)
    batch = module.receive(make_batch())

    def step() -> float:
        sums = module.forward_backward(batch, float(BATCH * SEQ), 1)
        module.update(torch.ones(()), LR)
        (value,) = world.sum([float(sums.loss)])
        return value

    return step, module


def weights_of(module: TrainModule) -> dict[str, Tensor]:
    """llmtrain's whole weights under the tutorial model's names."""
    from torch.distributed.tensor import DTensor

    whole = {}
    for name, param in module.params.items():
        value = param.detach()
        whole[name] = value.full_tensor() if isinstance(value, DTensor) else value
    out = {"embed.weight": whole["embedding.weight"], "norm.weight": whole["final_norm.weight"]}
    out["head.weight"] = whole["head.projection.weight"]
    for i in range(N_LAYERS):
        a, b = f"blocks.{i}.", f"blocks.{i}."
        heads = whole[f"{a}attention.qkv.weight"].view(N_HEADS, 3, -1, D_MODEL)
        for j, name in enumerate("qkv"):
            out[f"{b}attention.{name}.weight"] = heads[:, j].reshape(D_MODEL, D_MODEL)
        out[f"{b}attention.o.weight"] = whole[f"{a}attention.out.weight"]
        pairs = whole[f"{a}mlp.up.weight"].view(D_FF, 2, D_MODEL)
        out[f"{b}mlp.gate.weight"], out[f"{b}mlp.up.weight"] = pairs[:, 0], pairs[:, 1]
        out[f"{b}mlp.down.weight"] = whole[f"{a}mlp.down.weight"]
        out[f"{b}norm1.weight"] = whole[f"{a}attention_norm.weight"]
        out[f"{b}norm2.weight"] = whole[f"{a}mlp_norm.weight"]
    return out


def dtensor(world: World, weights: dict[str, Tensor]) -> Step:
    """A step of the tutorial model under ``parallelize_module`` with sequence parallelism."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        loss_parallel,
        parallelize_module,
    )

    model = Llama(VOCAB, D_MODEL, N_LAYERS, N_HEADS, D_FF)
    model.load_state_dict(weights)
    mesh = init_device_mesh("cpu", (world.size,))
    rows = {"input_layouts": Replicate(), "output_layouts": Shard(1)}
    parallelize_module(
        model,
        mesh,
        {
            "embed": RowwiseParallel(**rows),
            "norm": SequenceParallel(),
            "head": ColwiseParallel(
                input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False
            ),
        },
    )
    for block in model.blocks:
        parallelize_module(
            block,
            mesh,
            {
                "norm1": SequenceParallel(),
                "norm2": SequenceParallel(),
                # One gather for the three (two) products that read it.
                "attention": PrepareModuleInput(
                    input_layouts=(Shard(1), None, None),
                    desired_input_layouts=(Replicate(), None, None),
                ),
                "mlp": PrepareModuleInput(
                    input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
                ),
                **{f"attention.{name}": ColwiseParallel() for name in "qkv"},
                "attention.o": RowwiseParallel(output_layouts=Shard(1)),
                "mlp.gate": ColwiseParallel(),
                "mlp.up": ColwiseParallel(),
                "mlp.down": RowwiseParallel(output_layouts=Shard(1)),
            },
        )
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)
    batch = make_batch()

    def step() -> float:
        with loss_parallel():
            logits = model(batch.tokens)
            loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.full_tensor() if hasattr(loss, "full_tensor") else loss
        return float(value.detach())

    return step


def rank_main(rounds: int, warmup: int, out: Path) -> None:
    """One rank: build, check, time in turn."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, rank, torch.device("cpu"), dist.group.WORLD)
    first, module = ours(world)
    steps = {"llmtrain": first, "DTensor": dtensor(world, weights_of(module))}
    steps["llmtrain, sequence: false"] = ours(world, sequence=False)[0]
    steps["llmtrain, deterministic"] = deterministic(ours(world)[0])
    losses: dict[str, list[float]] = {name: [] for name in steps}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(warmup + rounds):
        names = list(steps)
        for name in names if i % 2 else reversed(names):
            dist.barrier()
            begin = time.perf_counter()
            losses[name].append(steps[name]())
            dist.barrier()
            seconds[name].append(time.perf_counter() - begin)
    if rank == 0:
        out.write_text(json.dumps({"losses": losses, "seconds": seconds, "warmup": warmup}))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def deterministic(step: Step) -> Step:
    """The step with deterministic algorithms, as ``train.deterministic`` sets them."""

    def run() -> float:
        torch.use_deterministic_algorithms(True)
        try:
            return step()
        finally:
            torch.use_deterministic_algorithms(False)

    return run


def main() -> None:
    """Launch the ranks, form the ratios, write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="3 rounds, no result file")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--rank-out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    rounds = 3 if args.quick else args.rounds
    if args.rank_out:
        rank_main(rounds, args.warmup, args.rank_out)
    with tempfile.TemporaryDirectory() as folder:
        raw_file = Path(folder) / "raw.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={args.ranks}", __file__, "--rank-out", str(raw_file)]
        command += ["--rounds", str(rounds), "--warmup", str(args.warmup)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, env=environment)
        raw = json.loads(raw_file.read_text())
    times = {name: values[args.warmup :] for name, values in raw["seconds"].items()}
    base = times["llmtrain"]
    rows = []
    for name, values in times.items():
        ratio = statistics.median(v / b for v, b in zip(values, base, strict=True))
        rows.append({"contender": name, "seconds": statistics.median(values), "ratio": ratio})
        print(f"{name:28}{rows[-1]['seconds']:8.3f} s a step {ratio:8.3f} of llmtrain's")
    gap = max(
        abs(a - b) for a, b in zip(raw["losses"]["llmtrain"], raw["losses"]["DTensor"], strict=True)
    )
    print(f"largest difference of losses, llmtrain against DTensor: {gap:.1e}")
    result = {
        "ranks": args.ranks,
        "rounds": rounds,
        "shape": {"d_model": D_MODEL, "layers": N_LAYERS, "d_ff": D_FF, "vocab": VOCAB},
        "tokens_per_step": BATCH * SEQ,
        "table": rows,
        "goal": "DTensor's step at least as long as llmtrain's: ratio of DTensor >= 1",
        "largest_loss_difference": gap,
        "seconds": times,
    }
    if args.quick and args.out is None:
        print("quick: nothing recorded")
    else:
        print(f"recorded in {write_result('parallel', result, out=args.out)}")


if __name__ == "__main__":
    main()
