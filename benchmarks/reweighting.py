"""What dynamic reweighting by sample loss costs: a step with it against a step without.

One process, random tokens, the real train module, hook and optimizer. A step is what the trainer
does of it: the hook's ``before_batch``, the sum of the weights, forward and backward, clipping,
update. All ways take a step in turn, so that a drifting machine cancels, and every ratio is formed
within a round. Ways:

- one micro-batch whose logits exist at once (``loss.chunk_tokens`` at least its tokens): the
  weights wait in the middle of the only forward pass;
- one micro-batch in chunks: the head's logits are computed twice;
- several micro-batches: all but the last go forward twice;
- two passes: every forward twice, which is what pipelines and DeepSpeed do.

    python benchmarks/reweighting.py            # the CPU, one thread: CPU time
    python benchmarks/reweighting.py --quick
    python benchmarks/reweighting.py --device cuda
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from common import summary, write_result  # noqa: E402

from llmtrain.config import RunConfig, from_dict  # noqa: E402
from llmtrain.data.batch import Batch  # noqa: E402
from llmtrain.methods.reweight import Reweight  # noqa: E402
from llmtrain.model import param_counts, resolve_model  # noqa: E402
from llmtrain.parallel import World, build_layout  # noqa: E402
from llmtrain.parallel.hardware import resolve_precision  # noqa: E402
from llmtrain.parallel.world import pick_device  # noqa: E402
from llmtrain.train.clockwork import Clockwork  # noqa: E402
from llmtrain.train.module import TrainModule  # noqa: E402

SHAPES: dict[str, dict[str, Any]] = {
    "quick": {"d_model": 64, "n_layers": 2, "n_heads": 2, "d_ff": 172, "vocab_size": 512},
    "cpu": {"d_model": 256, "n_layers": 6, "n_heads": 4, "d_ff": 704, "vocab_size": 4096},
    "cuda": {"d_model": 1024, "n_layers": 24, "n_heads": 16, "d_ff": 2816, "vocab_size": 32768},
}
# (sequences in a step, tokens of each)
SIZES = {"quick": (4, 64), "cpu": (8, 128), "cuda": (8, 2048)}
PLAIN, PIECES = "without", 4
Way = tuple[str, bool, int, bool, bool]
# name, reweighted, micro-batches, logits of a micro-batch at once, forced to two passes
WAYS: list[Way] = [
    (PLAIN, False, 1, True, False),
    ("one micro-batch", True, 1, True, False),
    ("without, in chunks", False, 1, False, False),
    ("one micro-batch, in chunks", True, 1, False, False),
    (f"without, {PIECES} micro-batches", False, PIECES, True, False),
    (f"{PIECES} micro-batches", True, PIECES, True, False),
    ("two passes", True, 1, True, True),
]
BASES = {
    "one micro-batch": PLAIN,
    "one micro-batch, in chunks": "without, in chunks",
    f"{PIECES} micro-batches": f"without, {PIECES} micro-batches",
    "two passes": PLAIN,
}


def config(shape: str, micro_batches: int, whole: bool) -> RunConfig:
    """A run of the shape; the logits of a micro-batch exist at once, or in 8 chunks."""
    batch, seq = SIZES[shape]
    tokens = batch * seq // micro_batches
    return from_dict(
        {
            "model": {**SHAPES[shape], "tie_embeddings": False},
            "data": {"corpus": "none", "seq_len": seq},
            "loss": {"chunk_tokens": tokens if whole else tokens // 8},
            "train": {
                "duration": "1000000step",
                "global_batch_size": batch,
                "micro_batch_size": batch // micro_batches,
            },
            "reweight": {"samples": "linupper", "warmup": "0step"},
        }
    )


def make_batch(cfg: RunConfig, step: int, device: torch.device) -> Batch:
    """Random tokens, every one of weight 1; samples as step ``step`` has them."""
    batch, seq = cfg.train.global_batch_size, cfg.data.seq_len
    draw = torch.Generator().manual_seed(step)
    vocab = cfg.model.vocab_size or 2
    tokens, targets = (torch.randint(0, vocab, (batch, seq), generator=draw) for _ in range(2))
    ids, zeros = torch.arange(batch), torch.zeros(batch, seq)
    positions = torch.arange(seq).expand(batch, seq)
    made = Batch(tokens, targets, zeros + 1, zeros.int(), positions, ids * 0, ids + step * batch)
    return made.to(device)


def stepper(shape: str, way: Way, device: torch.device) -> Callable[[], float]:
    """A callable that makes one step of a way and returns its seconds."""
    _, reweighted, micro_batches, whole, twice = way
    cfg = config(shape, micro_batches, whole)
    world = World(0, 1, 0, device, None)
    model_cfg = resolve_model(cfg, None)
    precision = resolve_precision(cfg.precision, device)
    module = TrainModule(cfg, model_cfg, precision, build_layout(cfg.parallel, world, 1))
    if twice:
        module.begins = False
    times = Clockwork.from_config(cfg)
    trainer: Any = SimpleNamespace(
        cfg=cfg, world=world, module=module, clockwork=times, step_done=0
    )
    assert cfg.reweight is not None
    hook = Reweight(cfg.reweight)
    hook.on_run_start(trainer)
    clock = time.perf_counter if device.type == "cuda" else time.process_time

    def step() -> float:
        batch = make_batch(cfg, trainer.step_done, device)
        wait(device)
        began = clock()
        if reweighted:
            hook.before_batch(trainer, batch)
        (weight,) = world.sum([module.token_weight(batch)])
        sums = module.forward_backward(batch, max(weight, 1e-9), 1)
        norm = module.gradient_norm()
        float(sums.loss)
        module.update(norm, 1e-4)
        wait(device)
        trainer.step_done += 1
        return clock() - began

    return step


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(shape: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Times of all ways and the costs relative to a step without."""
    steps = {way[0]: stepper(shape, way, device) for way in WAYS}
    for step in steps.values():
        step()
    readings: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            readings[name].append(step())
    costs = {}
    for name, base in BASES.items():
        ratios = [a / b - 1 for a, b in zip(readings[name], readings[base], strict=True)]
        costs[name] = {"base": base, **summary(ratios)}
    counts = param_counts(resolve_model(config(shape, 1, True), None))
    batch, seq = SIZES[shape]
    return {
        "question": "cost of a step with reweight.samples=linupper, over a step without it",
        "shape": {**SHAPES[shape], "sequences": batch, "seq_len": seq},
        "parameters": counts,
        "clock": "wall" if device.type == "cuda" else "CPU time of one thread",
        "rounds": rounds,
        "seconds": {name: summary(values) for name, values in readings.items()},
        "cost": costs,
    }


def main() -> None:
    """Parses the arguments, measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny shape, few rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None, help="result file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shape = "quick" if args.quick else args.device
    device = pick_device(args.device, 0)
    rounds = args.rounds or (3 if args.quick else 15)
    result = measure(shape, device, rounds)
    for name, found in result["seconds"].items():
        print(f"{name:32s} {found['median'] * 1e3:9.1f} ms")
    for name, cost in result["cost"].items():
        low, high = (100 * q for q in statistics.quantiles(cost["readings"], n=4)[::2])
        median = 100 * cost["median"]
        print(f"{name:32s} {median:+7.2f}% of a step (quartiles {low:+.2f} to {high:+.2f})")
    name = "reweighting" if args.device == "cpu" else "reweighting_cuda"
    print("written to", write_result(name, result, out=args.out))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
