"""``llmtrain generate CHECKPOINT --prompt TEXT``."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.cli.process import prepare_process

if TYPE_CHECKING:
    from llmtrain.parallel import World

HELP = "continue texts with a trained model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("checkpoint", help="a checkpoint, or a run's folder for its newest one")
    parser.add_argument(
        "--prompt", action="append", required=True, help="text to continue; repeat for a batch"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=64,
        help="most new tokens (default 64); a text ends at model.max_seq_len in any case",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the most likely token (default 0.8)"
    )
    parser.add_argument(
        "--top-k", type=int, default=40, help="draw from the k most likely; 0: all (default 40)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="and of these from the fewest that have this share of the probability (default 1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument(
        "--batch", type=int, default=16, help="prompts that are computed together (default 16)"
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="compute with the adapters merged into the weights: faster, rounded otherwise",
    )
    parser.add_argument(
        "--dequantise",
        action="store_true",
        help="with --merge: packed weights (model.adapters.base) become float32 ones",
    )
    parser.add_argument(
        "--tensor",
        type=int,
        default=1,
        metavar="N",
        help="under torchrun: processes that share one model's matrices (default 1: each holds "
        "the whole model, and they share the prompts)",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    from llmtrain.errors import LlmtrainError

    if min(args.tokens, args.batch, args.tensor) < 1 or args.temperature < 0 or args.top_k < 0:
        raise LlmtrainError(
            "--tokens, --batch and --tensor must be at least 1; --temperature and --top-k at "
            "least 0"
        )
    if args.dequantise and not args.merge:
        raise LlmtrainError("--dequantise is of --merge; give both or neither")
    if not math.isfinite(args.temperature):
        raise LlmtrainError(f"--temperature must be a finite number, not {args.temperature:g}")
    if not 0 < args.top_p <= 1:
        raise LlmtrainError(f"--top-p must be above 0 and at most 1, not {args.top_p:g}")
    prepare_process()
    from llmtrain.eval.sharing import PATIENCE_MINUTES
    from llmtrain.parallel import close_world, init_world

    world = init_world(args.device, PATIENCE_MINUTES)
    try:
        said = _continue(args, world)
    finally:
        close_world()
    for text in said:
        print(text)
    return 0


def _continue(args: argparse.Namespace, world: World) -> list[str]:
    """The texts, prompts included, on the main process; none on the others."""
    from llmtrain.errors import CheckpointError, LlmtrainError
    from llmtrain.eval.generation import Sampling
    from llmtrain.eval.sharing import generate_shared, load_together
    from llmtrain.model import merge_adapters

    trained, layout = load_together(Path(args.checkpoint), world, args.tensor)
    for fault in trained.warnings if world.is_main else ():
        print(f"llmtrain: warning: {fault}", file=sys.stderr)
    merged = args.merge and merge_adapters(trained.model, keep=False, dequantise=args.dequantise)
    if args.merge and not merged:
        raise LlmtrainError(f"--merge: {trained.path} has no adapters; leave it out")
    tokenizer = trained.tokenizer
    if tokenizer is None:
        raise CheckpointError(
            f"{trained.path} has no tokenizer.json, so text cannot be encoded; train with "
            "data.corpus or data.tokenizer set"
        )
    if not all(args.prompt):
        raise LlmtrainError("--prompt is empty; give some text to continue")
    prompts = [tokenizer.encode(prompt) for prompt in args.prompt]
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    found = generate_shared(trained, layout, prompts, args.tokens, sampling, args.batch)
    if not world.is_main:
        return []
    if any(new.ended == "context" for new in found):
        print(
            f"llmtrain: warning: a text of this model has at most {trained.model_cfg.max_seq_len} "
            "tokens (model.max_seq_len), so it ended before --tokens",
            file=sys.stderr,
        )
    texts = zip(args.prompt, found, strict=True)
    return [prompt + tokenizer.decode(new.tokens) for prompt, new in texts]
