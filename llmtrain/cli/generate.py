"""``llmtrain generate CHECKPOINT --prompt TEXT``."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

from llmtrain.cli.process import prepare_process

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
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    from llmtrain.errors import LlmtrainError

    if args.tokens < 1 or args.batch < 1 or args.temperature < 0 or args.top_k < 0:
        raise LlmtrainError(
            "--tokens and --batch must be at least 1; --temperature and --top-k at least 0"
        )
    if not math.isfinite(args.temperature):
        raise LlmtrainError(f"--temperature must be a finite number, not {args.temperature:g}")
    if not 0 < args.top_p <= 1:
        raise LlmtrainError(f"--top-p must be above 0 and at most 1, not {args.top_p:g}")
    if os.environ.get("RANK", "0") != "0":
        return 0  # under torchrun the first process answers
    prepare_process()
    from llmtrain.errors import CheckpointError
    from llmtrain.eval.generation import Sampling, generate
    from llmtrain.eval.loading import load_trained
    from llmtrain.model import merge_adapters
    from llmtrain.parallel.world import pick_device

    device = pick_device(args.device, 0)
    trained = load_trained(Path(args.checkpoint), device)
    for fault in trained.warnings:
        print(f"llmtrain: warning: {fault}", file=sys.stderr)
    if args.merge and not merge_adapters(trained.model, keep=False):
        raise LlmtrainError(f"--merge: {trained.path} has no adapters; leave it out")
    tokenizer = trained.tokenizer
    if tokenizer is None:
        raise CheckpointError(
            f"{trained.path} has no tokenizer.json, so text cannot be encoded; train with "
            "data.corpus or data.tokenizer set"
        )
    if not all(args.prompt):
        raise LlmtrainError("--prompt is empty; give some text to continue")
    context = trained.model_cfg.max_seq_len
    assert context is not None
    found = generate(
        trained.model,
        [tokenizer.encode(prompt) for prompt in args.prompt],
        args.tokens,
        context,
        Sampling(args.temperature, args.top_k, args.top_p, args.seed),
        eos_id=tokenizer.eos_id,
        batch=args.batch,
    )
    for prompt, new in zip(args.prompt, found, strict=True):
        print(prompt + tokenizer.decode(new.tokens))
    if any(new.ended == "context" for new in found):
        print(
            f"llmtrain: warning: a text of this model has at most {context} tokens "
            "(model.max_seq_len), so it ended before --tokens",
            file=sys.stderr,
        )
    return 0
