"""One GPU: tokens/s and MFU of llmtrain, of transformers and of a bare compiled torch loop.

Shapes: 160M, 1B, and a 7B-shaped slice (d_model 4096, as many layers as fit); bf16 with fp32
master weights, fused AdamW, blocks compiled. The measured matmul ceiling is the rate of the
shape's own largest products in bf16; the goal is 55% of it or better at the 7B shape. All
contenders of a shape run in turn in one process, each freed before the next; ratios are formed
within a round.

    python benchmarks/gpu_single.py                      # needs a GPU and transformers
    python benchmarks/gpu_single.py --quick --device cpu # a toy shape: does the script work?
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from common import write_result  # noqa: E402
from torch import Tensor  # noqa: E402

from llmtrain.config.schema import ModelConfig, RunConfig  # noqa: E402
from llmtrain.data.batch import Batch  # noqa: E402
from llmtrain.model import complete, flops_per_token, param_counts  # noqa: E402
from llmtrain.parallel import Degrees, Layout, World  # noqa: E402
from llmtrain.parallel.hardware import Precision  # noqa: E402
from llmtrain.train.module import TrainModule  # noqa: E402
from llmtrain.train.throughput import device_peak  # noqa: E402

Step = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama shape and the batch it is measured with."""

    name: str
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    vocab: int
    seq: int
    batch: int

    def config(self) -> ModelConfig:
        """The resolved model section."""
        model = ModelConfig(
            d_model=self.d_model,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            d_ff=self.d_ff,
            vocab_size=self.vocab,
        )
        return complete(model, self.vocab, self.seq)


SHAPES = [
    Shape("160M", 768, 12, 12, 2048, 50304, 2048, 16),
    Shape("1B", 2048, 16, 16, 5632, 50304, 2048, 8),
    Shape("7B slice", 4096, 6, 32, 11008, 32000, 4096, 4),
]
TOY = Shape("toy", 64, 2, 4, 128, 512, 64, 2)


def tokens_of(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random inputs and targets [batch, seq]."""
    draw = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.seq)
    return tuple(torch.randint(0, shape.vocab, size, generator=draw).to(device) for _ in range(2))


def llmtrain_step(shape: Shape, device: torch.device, dtype: torch.dtype) -> Step:
    """A step of the train module, as ``llmtrain train`` makes it."""
    cfg = RunConfig()
    cfg = dataclasses.replace(
        cfg,
        model=shape.config(),
        data=dataclasses.replace(cfg.data, seq_len=shape.seq),
        train=dataclasses.replace(
            cfg.train, global_batch_size=shape.batch, compile=device.type == "cuda"
        ),
    )
    layout = Layout(World(0, 1, 0, device, None), Degrees())
    module = TrainModule(cfg, shape.config(), Precision(dtype, torch.float32), layout)
    inputs, targets = tokens_of(shape, device)
    ones = torch.ones(shape.batch, shape.seq, device=device)
    ids = torch.arange(shape.batch, device=device)
    positions = torch.arange(shape.seq, device=device).expand(shape.batch, -1)
    batch = Batch(inputs, targets, ones, (ones * 0).int(), positions, ids * 0, ids)

    def step() -> float:
        sums = module.forward_backward(batch, float(ones.numel()), 1)
        module.update(module.gradient_norm(), 1e-4)
        return float(sums.loss)

    return step


def loop_step(
    model: torch.nn.Module, forward: Callable[[Tensor], Tensor], shape: Shape, dtype: torch.dtype
) -> Step:
    """Autocast, cross-entropy, clipping and fused AdamW around any model's logits."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    inputs, targets = tokens_of(shape, device)

    def step() -> float:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = forward(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def transformers_step(shape: Shape, device: torch.device, dtype: torch.dtype) -> Step:
    """``LlamaForCausalLM`` with SDPA, compiled as its documentation has it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        max_position_embeddings=shape.seq,
        use_cache=False,
    )
    with device:
        model = LlamaForCausalLM(config)
    compiled: Any = torch.compile(model) if device.type == "cuda" else model
    return loop_step(model, lambda x: compiled(input_ids=x).logits, shape, dtype)


def bare_step(shape: Shape, device: torch.device, dtype: torch.dtype) -> Step:
    """The tutorial's Llama of ``parallel.py``'s DTensor side, whole-model compiled."""
    from peers.bare import Llama

    with device:
        model = Llama(shape.vocab, shape.d_model, shape.n_layers, shape.n_heads, shape.d_ff)
    compiled: Any = torch.compile(model) if device.type == "cuda" else model
    return loop_step(model, compiled, shape, dtype)


CONTENDERS: dict[str, Callable[[Shape, torch.device, torch.dtype], Step]] = {
    "llmtrain": llmtrain_step,
    "transformers": transformers_step,
    "bare compiled loop": bare_step,
}


def ceiling(shape: Shape, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the shape's up projection [tokens, d] x [d, 2 d_ff], the median of ten."""
    n = shape.batch * shape.seq
    a = torch.randn(n, shape.d_model, device=device, dtype=dtype)
    b = torch.randn(2 * shape.d_ff, shape.d_model, device=device, dtype=dtype)
    times = [seconds_of(lambda: a @ b.t(), device) for _ in range(13)][3:]
    return 2.0 * n * shape.d_model * 2 * shape.d_ff / statistics.median(times)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds with the device idle before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def timed(step: Step, steps: int, device: torch.device) -> tuple[list[float], list[float]]:
    """Losses of all steps, and the seconds of each after three that are not counted."""
    losses = [step() for _ in range(3)]
    times = [seconds_of(lambda: losses.append(step()), device) for _ in range(steps)]
    return losses, times


def measure(shape: Shape, device: torch.device, steps: int, rounds: int) -> dict[str, Any]:
    """Every contender of a shape, ``rounds`` times in turn."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens, per_token = shape.batch * shape.seq, flops_per_token(shape.config(), shape.seq)
    top, peak = ceiling(shape, device, dtype), device_peak(device)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for i in range(rounds):
        for name in list(CONTENDERS) if i % 2 else reversed(list(CONTENDERS)):
            losses, times = timed(CONTENDERS[name](shape, device, dtype), steps, device)
            memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
            rate = tokens / statistics.median(times)
            runs[name].append(
                {
                    "tokens_per_second": rate,
                    "mfu": None if peak is None else rate * per_token / peak,
                    "of_matmul_ceiling": rate * per_token / top,
                    "memory_bytes": memory,
                    "losses": [losses[0], losses[-1]],
                    "step_seconds": times,
                }
            )
            print(
                f"{shape.name:9} {name:20} {rate:10.0f} tokens/s, "
                f"{rate * per_token / top:.1%} of the matmul ceiling",
                flush=True,
            )
            gc.collect()
            torch.compiler.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    return {
        "shape": dataclasses.asdict(shape),
        "parameters": param_counts(shape.config())["total"],
        "flops_per_token": per_token,
        "matmul_ceiling_flops": top,
        "device_peak_flops": peak,
        "runs": runs,
    }


def main() -> None:
    """Measure all shapes and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a toy shape, no result file")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --quick --device cpu tries the script on a CPU")
    if args.device == "cpu" and not args.quick:
        parser.error("the shapes are for a GPU; on a CPU only --quick is sensible")
    device = torch.device(args.device)
    shapes, steps, rounds = ([TOY], 2, 1) if args.quick else (SHAPES, args.steps, args.rounds)
    results = [measure(shape, device, steps, rounds) for shape in shapes]
    if args.quick and args.out is None:
        print("quick: nothing recorded")
        return
    result = {"goal": "55% of the matmul ceiling at the 7B shape", "shapes": results}
    print(f"recorded in {write_result('gpu_single', result, 'transformers', out=args.out)}")


if __name__ == "__main__":
    main()
