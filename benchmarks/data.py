"""Tokens per second read in random order: llmtrain, mosaicml-streaming and a bare memory map.

    python benchmarks/data.py [--quick]

One MDS folder of uint16 tokens in the page cache is read by all: windows of ``--seq-len`` + 1
tokens at random places by a memory map and by our reader, samples of ``--seq-len`` tokens in
random order by StreamingDataset (which can only read whole samples). Everybody ends with int64
batches of ``--batch`` rows. The contenders take turns within each round, each reading in a fresh
process after its first batch, with the allocator settings that the llmtrain command makes; the
result is the median over rounds, written to benchmarks/results/data.json with all readings.

The share of a training step is (training tokens/s of a rank) / (tokens per CPU second of our
loader): what loading would cost if nothing of it ran beside the step.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import numpy as np

from llmtrain.cli.process import wanted_environment
from llmtrain.config.schema import DataConfig, RunConfig, SourceConfig
from llmtrain.data.formats import FlatSource, open_source
from llmtrain.data.streaming import import_streaming

# What training uses up, tokens/s per rank: 17M parameters on two CPU cores; 1B and 125M on an H200.
TRAINING = {"17M, 2 CPU cores": 6e3, "1B, H200": 5e4, "125M, H200": 5e5}
VOCAB = 50_000
EOS = 0
WORKERS = re.compile("[12] workers?$")


def write_corpus(folder: Path, tokens: int, seq_len: int) -> None:
    """Random tokens as MDS samples of ``seq_len``, by mosaicml-streaming's own writer."""
    rng = np.random.default_rng(0)
    with import_streaming().MDSWriter(
        out=str(folder), columns={"tokens": f"ndarray:uint16:{seq_len}"}, hashes=["xxh64"]
    ) as writer:
        for _ in range(tokens // seq_len):
            writer.write({"tokens": rng.integers(0, VOCAB, seq_len, dtype=np.uint16)})


def write_flat(folder: Path, source: FlatSource) -> Path:
    """The same tokens as one raw file for the bare memory map."""
    path = folder / "flat.bin"
    with path.open("wb") as out:
        for start in range(0, source.num_tokens, 1 << 20):
            stop = min(source.num_tokens, start + (1 << 20))
            out.write(source.read(start, stop).astype(np.uint16).tobytes())
    return path


def rate(batches: Iterator[int], budget: float) -> tuple[float, float]:
    """Tokens per second of wall clock and of this process's CPU time, all threads together.

    Over ``budget`` seconds or to the end; the first batch is not counted.
    """
    next(batches)
    begin, cpu, tokens = time.perf_counter(), time.process_time(), 0
    for count in batches:
        tokens += count
        if time.perf_counter() - begin > budget:
            break
    cpu = time.process_time() - cpu
    return tokens / (time.perf_counter() - begin), tokens / cpu


def windows(total: int, args: argparse.Namespace) -> Iterator[list[int]]:
    """Where the windows of one batch after the other begin."""
    rng = np.random.default_rng(1)
    while True:
        yield rng.integers(0, total - args.seq_len - 1, args.batch).tolist()


def read_map(args: argparse.Namespace, plain: bool) -> Iterator[int]:
    """A memory map sliced window by window: np.memmap, or the same seen as a plain array."""
    tokens: np.ndarray = np.memmap(args.folder / "flat.bin", dtype=np.uint16, mode="r")
    if plain:
        tokens = np.asarray(tokens)
    length = args.seq_len + 1
    for starts in windows(len(tokens), args):
        out = np.empty((args.batch, length), np.int64)
        for row, start in enumerate(starts):
            out[row] = tokens[start : start + length]
        yield out.size


def read_ours(args: argparse.Namespace, documents: bool) -> Iterator[int]:
    """Our reader on the MDS folder, with or without the document starts that packing needs."""
    source = open_source("corpus", SourceConfig(path=str(args.folder / "corpus")), eos_id=EOS)
    length = args.seq_len + 1
    for starts in windows(source.num_tokens, args):
        out = np.empty((args.batch, length), np.int64)
        for row, start in enumerate(starts):
            source.read_into(start, start + length, out[row])
            if documents:
                source.document_starts(start, start + length, out[row])
        yield out.size


def collate(samples: list[dict[str, np.ndarray]]) -> int:
    """An int64 batch of StreamingDataset's samples; its tokens."""
    return np.stack([sample["tokens"] for sample in samples]).astype(np.int64).size


def collate_packed(samples: list[dict[str, np.ndarray]]) -> int:
    """The same with what our batches hold: targets, weights, document numbers, positions."""
    tokens = np.stack([sample["tokens"] for sample in samples]).astype(np.int64)
    targets = np.zeros_like(tokens)
    targets[:, :-1] = tokens[:, 1:]
    starts = np.zeros(tokens.shape, np.bool_)
    np.equal(tokens[:, :-1], EOS, out=starts[:, 1:])
    weights = np.ones(tokens.shape, np.float32)
    weights[:, :-1][starts[:, 1:]] = 0.0
    doc_ids = np.cumsum(starts, axis=1, dtype=np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape).copy()
    return min(tokens.size, targets.size, weights.size, doc_ids.size, positions.size)


def read_streaming(
    args: argparse.Namespace, workers: int | None, packed: bool = False
) -> Iterator[int]:
    """StreamingDataset: sample by sample (workers None), or one epoch of torch's DataLoader.

    An epoch has as many samples as fit the budget and is read to its end: one that is left in
    the middle can hang the next.
    """
    samples = int(args.seconds * 3e6 / args.seq_len) // args.batch * args.batch
    dataset = import_streaming().StreamingDataset(
        local=str(args.folder / "corpus"), shuffle=True, batch_size=args.batch, epoch_size=samples
    )
    if workers is None:
        rng = np.random.default_rng(1)
        for _ in range(samples // args.batch):
            rows = rng.integers(0, dataset.num_samples, args.batch).tolist()
            yield collate([dataset[row] for row in rows])
        return
    from torch.utils.data import DataLoader

    yield from DataLoader(
        dataset,
        batch_size=args.batch,
        num_workers=workers,
        collate_fn=collate_packed if packed else collate,
    )


def read_loader(args: argparse.Namespace) -> Iterator[int]:
    """llmtrain's Loader: mixture, order, packing with document ids, prefetching."""
    from llmtrain.data.loader import Loader
    from llmtrain.data.plan import build_plan

    data = DataConfig(
        sources={"corpus": SourceConfig(path=str(args.folder / "corpus"))},
        weights={"corpus": 1.0},
        seq_len=args.seq_len,
        eos_id=EOS,
        document_mask=True,
    )
    cfg, steps = RunConfig(data=data), 100_000
    loader = Loader(build_plan(cfg, steps * args.batch), args.batch, 0, 1)
    for batch in loader.iterate(0, steps):
        yield batch.tokens.numel()


CONTENDERS: dict[str, Callable[[argparse.Namespace], Iterator[int]]] = {
    "array over a memory map": lambda args: read_map(args, plain=True),
    "np.memmap": lambda args: read_map(args, plain=False),
    "llmtrain reader": lambda args: read_ours(args, documents=False),
    "llmtrain reader and document starts": lambda args: read_ours(args, documents=True),
    "llmtrain loader": read_loader,
    "StreamingDataset[i]": lambda args: read_streaming(args, None),
    "StreamingDataset, DataLoader, 0 workers": lambda args: read_streaming(args, 0),
    "StreamingDataset, DataLoader, 1 worker": lambda args: read_streaming(args, 1),
    "StreamingDataset, DataLoader, 2 workers": lambda args: read_streaming(args, 2),
    "StreamingDataset, packed, 0 workers": lambda args: read_streaming(args, 0, packed=True),
    "StreamingDataset, packed, 2 workers": lambda args: read_streaming(args, 2, packed=True),
}


def in_own_process(name: str, args: argparse.Namespace) -> tuple[float, float]:
    """One reading of one contender in a fresh process, killed with its workers if it hangs."""
    command = [sys.executable, __file__, "--one", name, "--folder", str(args.folder)]
    command += ["--seconds", str(args.seconds), "--seq-len", str(args.seq_len)]
    command += ["--batch", str(args.batch)]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **wanted_environment(os.environ)},
    )
    try:
        output, errors = child.communicate(timeout=60 + 10 * args.seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        raise SystemExit(f"{name} hung") from None
    if child.returncode:
        raise SystemExit(f"{name} failed:\n{errors}")
    wall, cpu = output.split()[-2:]
    return float(wall), float(cpu)


@contextmanager
def scratch(place: Path | None) -> Iterator[Path]:
    """A folder for the corpus; removed at the end unless the caller named one."""
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
        yield place
        return
    folder = Path(tempfile.mkdtemp(prefix="llmtrain-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def prepare(args: argparse.Namespace) -> int:
    """Writes the corpus and its flat twin unless they are there; the number of tokens."""
    corpus = args.folder / "corpus"
    if not (corpus / "index.json").exists():
        write_corpus(corpus, args.tokens, args.seq_len)
    source = open_source("corpus", SourceConfig(path=str(corpus)), eos_id=EOS)
    write_flat(args.folder, source)
    return source.num_tokens


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All contenders in turn; the result without the machine."""
    tokens = prepare(args)
    cpu: dict[str, list[float]] = {}

    def reading(name: str) -> float:
        wall, busy = in_own_process(name, args)
        cpu.setdefault(name, []).append(busy)
        return wall

    results = common.interleaved(
        {name: (lambda name=name: reading(name)) for name in CONTENDERS}, args.rounds
    )
    # the time of worker processes is not this process's: no CPU rate for them
    busy = {n: common.summary(values) for n, values in cpu.items() if not WORKERS.search(n)}
    return {
        "question": "tokens/s read in random order by one consumer, page cache",
        "tokens": tokens,
        "seq_len": args.seq_len,
        "batch": args.batch,
        "rounds": args.rounds,
        "tokens_per_second": results,
        "tokens_per_cpu_second": busy,
        "ratios": {**ratios(results, "wall clock"), **ratios(busy, "CPU time")},
        "share_of_step": {
            name: used / busy["llmtrain loader"]["median"] for name, used in TRAINING.items()
        },
    }


def ratios(results: dict[str, dict[str, Any]], clock: str) -> dict[str, float]:
    """Our medians over the best of StreamingDataset's that do the same work."""
    median = {name: result["median"] for name, result in results.items()}

    def best(part: str) -> float:
        return max(value for name, value in median.items() if part in name)

    return {
        f"reader over StreamingDataset, {clock}": median["llmtrain reader"]
        / best("StreamingDataset"),
        f"reader over np.memmap, {clock}": median["llmtrain reader"] / median["np.memmap"],
        f"loader over StreamingDataset packed, {clock}": median["llmtrain loader"] / best("packed"),
    }


def show(result: dict[str, Any]) -> None:
    """A table on the terminal."""
    for name, readings in result["tokens_per_second"].items():
        low, high = readings["min"] / 1e6, readings["max"] / 1e6
        cpu = result["tokens_per_cpu_second"].get(name)
        more = f"{cpu['median'] / 1e6:9.1f} per CPU second" if cpu else ""
        print(f"{name:40s} {readings['median'] / 1e6:8.1f} Mtok/s ({low:.1f} to {high:.1f}) {more}")
    for name, ratio in result["ratios"].items():
        print(f"{name:50s} {ratio:9.2f} times")
    for name, share in result["share_of_step"].items():
        print(f"share of a step, {name:25s} {100 * share:9.4f} %")


def main() -> None:
    """Parses the arguments, measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small corpus, short readings")
    parser.add_argument("--tokens", type=int, default=None, help="tokens of the corpus")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=None, help="length of one reading")
    parser.add_argument("--folder", type=Path, default=None, help="keep the corpus here")
    parser.add_argument("--out", type=Path, default=None, help="result file")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.tokens = args.tokens or (4_000_000 if args.quick else 100_000_000)
    args.rounds = args.rounds or (2 if args.quick else 5)
    args.seconds = args.seconds or (0.3 if args.quick else 2.0)
    if args.one:
        print(*rate(CONTENDERS[args.one](args), args.seconds))
        return
    with scratch(args.folder) as args.folder:
        result = measure(args)
    show(result)
    print("written to", common.write_result("data", result, "mosaicml-streaming", out=args.out))


if __name__ == "__main__":
    main()
