"""``llmtrain checkpoint list|verify|prune|export|to-deepspeed|from-deepspeed``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from llmtrain.errors import EXIT_BAD_INPUT, EXIT_OK, CheckpointError

HELP = "list, verify, prune, export or convert the checkpoints of a run"
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_DTYPES = ("fp32", "bf16", "fp16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    listing = actions.add_parser("list", help="what a run has saved")
    listing.add_argument("run", metavar="RUN", help="folder of a run")

    checking = actions.add_parser("verify", help="read every byte and compare the checksums")
    checking.add_argument("run", metavar="RUN", help="folder of a run, or one checkpoint")

    pruning = actions.add_parser("prune", help="delete old checkpoints; permanent ones stay")
    pruning.add_argument("run", metavar="RUN", help="folder of a run")
    pruning.add_argument(
        "--keep", type=int, default=2, metavar="N", help="newest ones to keep (default: 2)"
    )
    pruning.add_argument(
        "--abandoned", action="store_true", help="also those a restarted run has put away"
    )
    pruning.add_argument("--dry-run", action="store_true", help="only say what would go")

    exporting = actions.add_parser("export", help="write the model alone as safetensors")
    exporting.add_argument("run", metavar="RUN", help="folder of a run, or one checkpoint")
    exporting.add_argument("out", metavar="DST", help="folder to create")
    exporting.add_argument("--dtype", choices=_DTYPES, help="cast the weights (default: as saved)")
    exporting.add_argument(
        "--shard-gb", type=float, default=5.0, metavar="GB", help="largest file (default: 5)"
    )
    _add_conversions(actions)


def _add_conversions(actions: Any) -> None:
    leaving = actions.add_parser("to-deepspeed", help="write a DeepSpeed universal checkpoint")
    leaving.add_argument("run", metavar="RUN", help="folder of a run, or one checkpoint")
    leaving.add_argument("out", metavar="DST", help="folder to create")

    coming = actions.add_parser("from-deepspeed", help="read a DeepSpeed universal checkpoint")
    coming.add_argument("source", metavar="SRC", help="folder with latest_universal, or of a step")
    coming.add_argument("out", metavar="RUN", help="folder of the run that gets the checkpoint")
    coming.add_argument(
        "--like", metavar="RUN", help="run or checkpoint with the same model, for its config"
    )
    coming.add_argument("--step", type=int, metavar="N", help="updates made, if it does not say")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    actions = {
        "list": _list,
        "verify": _verify,
        "prune": _prune,
        "export": _export,
        "to-deepspeed": _to_deepspeed,
        "from-deepspeed": _from_deepspeed,
    }
    return actions[args.action](args)


def _list(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from llmtrain.checkpoint import Store, checkpoints_folder, scan

    root = checkpoints_folder(_existing(args.run))
    found = scan(root)
    if not found:
        raise CheckpointError(f"{root} holds no checkpoint")
    table = Table(box=None, pad_edge=False)
    for name in ("step", "tokens", "size", "age", "ranks"):
        table.add_column(name, justify="right")
    table.add_column("kept")
    table.add_column("status")
    for c in found:
        table.add_row(
            str(c.step),
            _count(c.meta.get("tokens")),
            size_text(c.bytes),
            age_text(time.time() - float(c.meta.get("saved_at", time.time()))),
            str(c.meta.get("world_size", "")),
            "permanent" if c.permanent else "temporary",
            "complete" if c.problem is None else "damaged",
        )
    Console().print(table)
    for c in found:
        if c.problem is not None:
            print(c.problem)
    for line in sorted({_base_line(c.path) for c in found} - {""}):
        print(line)
    abandoned = Store(root).abandoned()
    if abandoned:
        size = size_text(sum(c.bytes for c in abandoned))
        print(f"{len(abandoned)} abandoned by a restart ({size}): prune --abandoned deletes them")
    return EXIT_OK


def _verify(args: argparse.Namespace) -> int:
    from llmtrain.checkpoint import checkpoints_folder, scan, verify
    from llmtrain.checkpoint.layout import describe, parse_step

    path = _existing(args.run)
    alone = parse_step(path.resolve().name) is not None or (path / "checksums.json").exists()
    found = [describe(path)] if alone else scan(checkpoints_folder(path))
    if not found:
        raise CheckpointError(f"{checkpoints_folder(path)} holds no checkpoint")
    code = EXIT_OK
    for checkpoint in found:
        began = time.monotonic()
        problems = verify(checkpoint.path)
        rate = checkpoint.bytes / max(time.monotonic() - began, 1e-9)
        for problem in problems:
            print(f"{checkpoint.path.name}: {problem}")
            code = EXIT_BAD_INPUT
        if not problems:
            read = f"{size_text(checkpoint.bytes)} read at {size_text(rate)}/s"
            print(f"{checkpoint.path.name}: good ({read})")
            if line := _base_line(checkpoint.path):
                print(line)
    return code


def _base_line(path: Path) -> str:
    """Where the frozen weights of a checkpoint lie, "" when in itself."""
    from llmtrain.checkpoint.layout import base_of

    try:
        base = base_of(path)
    except CheckpointError as error:
        return str(error)
    return "" if base is None else f"frozen weights: in {base.path}"


def _prune(args: argparse.Namespace) -> int:
    from llmtrain.checkpoint import Store, checkpoints_folder

    if args.keep < 1:
        raise CheckpointError("--keep must be at least 1: the newest checkpoint always stays")
    store = Store(checkpoints_folder(_existing(args.run)))
    gone = store.superfluous(args.keep) + (store.abandoned() if args.abandoned else [])
    for checkpoint in [] if args.dry_run else gone:
        store.delete(checkpoint.path)
    verb = "would delete" if args.dry_run else "deleted"
    for checkpoint in gone:
        print(f"{verb} {checkpoint.path} ({size_text(checkpoint.bytes)})")
    if not gone:
        print("nothing to delete")
    return EXIT_OK


def _export(args: argparse.Namespace) -> int:
    import torch

    from llmtrain.checkpoint import export_model

    dtypes = dict(zip(_DTYPES, (torch.float32, torch.bfloat16, torch.float16), strict=True))
    written = export_model(
        _existing(args.run),
        Path(args.out),
        dtype=dtypes[args.dtype] if args.dtype else None,
        shard_bytes=max(1, int(args.shard_gb * 1e9)),
        warn=lambda text: print(f"llmtrain: warning: {text}", file=sys.stderr),
    )
    for path in written:
        print(f"{path} ({size_text(path.stat().st_size)})")
    return EXIT_OK


def _to_deepspeed(args: argparse.Namespace) -> int:
    from llmtrain.checkpoint.universal import to_deepspeed

    print(to_deepspeed(_existing(args.run), Path(args.out)))
    return EXIT_OK


def _from_deepspeed(args: argparse.Namespace) -> int:
    from llmtrain.checkpoint.universal import from_deepspeed

    if args.step is not None and args.step < 1:
        raise CheckpointError("--step must be at least 1: it counts updates made")
    like = _existing(args.like) if args.like is not None else None
    print(from_deepspeed(_existing(args.source), Path(args.out), like=like, step=args.step))
    return EXIT_OK


def _existing(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; give the folder of a run or a checkpoint")
    return path


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def size_text(size: float) -> str:
    """Bytes with a decimal unit: 1234567 -> 1.2 MB."""
    for scale, unit in _UNITS:
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"


def age_text(seconds: float) -> str:
    """A span in its largest whole unit: 7300 -> 2 h."""
    for scale, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= scale:
            return f"{int(seconds // scale)} {unit}"
    return f"{max(0, int(seconds))} s"
