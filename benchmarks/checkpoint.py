"""Bytes per second of saving and loading: llmtrain, torch.distributed.checkpoint and bare files.

    python benchmarks/checkpoint.py [--megabytes 1000] [--rounds 5] [--folder DIR]

A model's parameters and two AdamW moments in fp32, one process. Contenders, in turn within each
round: llmtrain saving synchronously (hashed, flushed, published), llmtrain asynchronously (how
long training stands still, and until it is published), torch.distributed.checkpoint's own file
writer (flushed), ``torch.save`` with a flush, and one bare file with a flush as the disk's limit.
Then loading: llmtrain with and without its checksums, and torch.distributed.checkpoint. Files are
in the page cache when they are read. Medians go to benchmarks/results/checkpoint.json.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import common
import torch
import torch.distributed.checkpoint as dcp

from llmtrain.checkpoint import Checkpointer, load_checkpoint, verify
from llmtrain.config.upkeep import CheckpointConfig

State = dict[str, torch.Tensor]


def make_state(megabytes: int) -> State:
    """Square weights of 4 MB, each with its two moments."""
    count = max(1, megabytes // 12)
    return {
        f"{kind}.layers.{i}.weight{suffix}": torch.randn(1000, 1000)
        for i in range(count)
        for kind, suffix in (("model", ""), ("optim", ".exp_avg"), ("optim", ".exp_avg_sq"))
    }


def bare_file(folder: Path, state: State) -> None:
    """All bytes, one after the other, and a flush."""
    with (folder / "bare").open("wb", buffering=0) as file:
        for tensor in state.values():
            file.write(tensor.numpy().data)
        os.fsync(file.fileno())


def torch_file(folder: Path, state: State) -> None:
    """torch.save and a flush."""
    with (folder / "torch").open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def dcp_folder(folder: Path, state: State) -> None:
    """DCP's own writer, which flushes its files."""
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "dcp"))


def writers(folder: Path, state: State, total: float) -> dict[str, Callable[[], float]]:
    """Name: one reading in MB/s (or seconds for the stall)."""
    sync = Checkpointer(folder / "sync", CheckpointConfig(asynchronous=False, keep=1))
    background = Checkpointer(folder / "async", CheckpointConfig(asynchronous=True, keep=1))

    def rate(work: Callable[[], object]) -> Callable[[], float]:
        return lambda: total / 1e6 / common.seconds(work)

    def stall() -> float:
        background.save(1, state)
        saved = background.wait()
        assert saved is not None
        return saved.stall_seconds

    def background_save() -> None:
        background.save(1, state)
        background.wait()

    return {
        "llmtrain sync MB/s": rate(lambda: sync.save(1, state)),
        "llmtrain async MB/s": rate(background_save),
        "llmtrain async stall s": stall,
        "dcp MB/s": rate(lambda: dcp_folder(folder, state)),
        "torch.save MB/s": rate(lambda: torch_file(folder, state)),
        "bare file MB/s": rate(lambda: bare_file(folder, state)),
    }


def readers(folder: Path, state: State, total: float) -> dict[str, Callable[[], float]]:
    """Name: one reading in MB/s."""
    path = folder / "sync" / "step-00000001"

    def rate(work: Callable[[], object]) -> Callable[[], float]:
        return lambda: total / 1e6 / common.seconds(work)

    def dcp_load() -> None:
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder / "dcp"))

    return {
        "llmtrain load MB/s": rate(lambda: load_checkpoint(path, state, verify=False)),
        "llmtrain verify and load MB/s": rate(lambda: load_checkpoint(path, state)),
        "llmtrain verify MB/s": rate(lambda: verify(path)),
        "dcp load MB/s": rate(dcp_load),
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write (default: the temporary folder)")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch.distributed")
    torch.set_num_threads(1)  # OpenMP threads that spin cost more than they copy
    state = make_state(args.megabytes)
    total = float(sum(t.numel() * t.itemsize for t in state.values()))
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=args.folder))
    try:
        written = common.interleaved(writers(folder, state, total), args.rounds)
        read = common.interleaved(readers(folder, state, total), args.rounds)
    finally:
        shutil.rmtree(folder)
    medians = {name: value["median"] for name, value in (written | read).items()}
    for name, value in medians.items():
        print(f"{name:32} {value:10.2f}")
    best = medians["llmtrain sync MB/s"]
    ratios = {
        "save over dcp": best / medians["dcp MB/s"],
        "save over torch.save": best / medians["torch.save MB/s"],
        "save over a bare file": best / medians["bare file MB/s"],
        "load over dcp": medians["llmtrain load MB/s"] / medians["dcp load MB/s"],
    }
    for name, value in ratios.items():
        print(f"{name:32} {value:10.2f}")
    result = {"bytes": total, "ratios": ratios, "write": written, "read": read}
    print(common.write_result("checkpoint", result, "safetensors", "xxhash"))


if __name__ == "__main__":
    main()
