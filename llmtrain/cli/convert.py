"""``llmtrain convert from-hf|to-hf|from-peft|to-peft SRC DST``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.errors import EXIT_OK, LlmtrainError

if TYPE_CHECKING:
    from llmtrain.convert import Converted

HELP = "models from and to Hugging Face's formats"
_DTYPES = ("fp32", "bf16", "fp16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    coming = actions.add_parser("from-hf", help="a checkpoint of ours from a Hugging Face folder")
    coming.add_argument("src", metavar="SRC", help="folder with config.json and safetensors")
    coming.add_argument("dst", metavar="DST", help="checkpoint to create")
    coming.add_argument("--dtype", choices=_DTYPES, help="of the stored weights (default: fp32)")
    leaving = actions.add_parser("to-hf", help="a folder that transformers opens")
    leaving.add_argument("src", metavar="SRC", help="a run's folder, or one checkpoint")
    leaving.add_argument("dst", metavar="DST", help="folder to create")
    leaving.add_argument(
        "--architecture", metavar="NAME", help="e.g. llama (default: the one that fits)"
    )
    leaving.add_argument(
        "--dtype", choices=_DTYPES, help="of the weights (default: as they came, or as saved)"
    )
    leaving.add_argument(
        "--fp8",
        action="store_true",
        help="FP8 weights for the layers that computed in FP8, as compressed-tensors",
    )
    adapters = actions.add_parser("to-peft", help="the adapters of a run, for peft and vLLM")
    adapters.add_argument("src", metavar="SRC", help="a run's folder, or one checkpoint")
    adapters.add_argument("dst", metavar="DST", help="folder to create")
    adapters.add_argument(
        "--base", metavar="NAME", help="the base model in Hugging Face's format (default: its own)"
    )
    brought = actions.add_parser("from-peft", help="a checkpoint of ours from peft's adapters")
    brought.add_argument("src", metavar="SRC", help="folder with adapter_config.json")
    brought.add_argument("dst", metavar="DST", help="checkpoint to create")
    brought.add_argument(
        "--base", metavar="CKPT", required=True, help="checkpoint of ours that they adapt, or a run"
    )
    for action in (coming, leaving):
        action.add_argument(
            "--shard-gb", type=float, default=5.0, metavar="GB", help="largest file (default: 5)"
        )


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    if args.action.endswith("-peft"):
        return _to_peft(args) if args.action == "to-peft" else _from_peft(args)
    if not args.shard_gb > 0:
        raise LlmtrainError("--shard-gb must be above 0")
    import torch

    from llmtrain.convert import from_huggingface, to_huggingface

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    options: dict[str, Any] = {"shard_bytes": int(args.shard_gb * 2**30)}
    options["dtype"] = None if args.dtype is None else dtypes[args.dtype]
    src, dst = Path(args.src), Path(args.dst)
    if args.action == "from-hf":
        done = from_huggingface(src, dst, **options)
        after = f"llmtrain generate {dst} --prompt ..., or train with init.path={dst}"
    else:
        options |= {"architecture": args.architecture, "fp8": args.fp8}
        done = to_huggingface(src, dst, **options)
        after = f'transformers.AutoModelForCausalLM.from_pretrained("{dst}")'
    return _report(done, after)


def _to_peft(args: argparse.Namespace) -> int:
    from llmtrain.convert import to_peft

    done = to_peft(Path(args.src), Path(args.dst), base=args.base)
    return _report(done, f'peft.PeftModel.from_pretrained(base, "{done.path}")')


def _from_peft(args: argparse.Namespace) -> int:
    from llmtrain.convert import from_peft

    done = from_peft(Path(args.src), Path(args.dst), base=Path(args.base))
    return _report(done, f"llmtrain generate {done.path} --prompt ..., or init.path={done.path}")


def _report(done: Converted, after: str) -> int:
    for note in done.notes:
        print(f"llmtrain: warning: {note}", file=sys.stderr)
    print(
        f"{done.path}: {done.architecture}, {done.n_params:,} parameters, "
        f"{done.bytes / 1e6:,.1f} MB\nnext: {after}"
    )
    return EXIT_OK
