"""Seconds from the start of a process to the end of its first step, from a 1-GB checkpoint.

    python benchmarks/resume.py [--layers 12] [--rounds 3] [--folder DIR]

Both sides in turn: ``llmtrain train`` that resumes (finds, verifies checksums, loads, one step),
and a bare script with the same model, torch's AdamW and torch.distributed.checkpoint (loads, one
step; no data pipeline, no checksums). Files are in the page cache. Also: for which part of a step
an asynchronous save holds training up, at 8 sequences of 128 tokens. One process, CPU. Medians go
to benchmarks/results/resume.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import yaml

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "and",
    "then",
    "more",
]
WIDTH, SEQ = 768, 128


def write_config(folder: Path, layers: int) -> Path:
    """A run on a tiny corpus whose state is a gigabyte at 12 layers."""
    text = folder / "text.jsonl"
    lines = (json.dumps({"text": " ".join(WORDS[i % 7 :] * 9)}) for i in range(200))
    text.write_text("\n".join(lines), encoding="utf-8")
    config = {
        "name": "run",
        "out": str(folder),
        "device": "cpu",
        "model": {"d_model": WIDTH, "n_layers": layers, "n_heads": 12, "d_ff": 2048},
        "prepare": {
            "out": str(folder / "corpus"),
            "sources": {"text": {"kind": "jsonl", "paths": [str(text)]}},
            "tokenizer": {"kind": "byte"},
            "workers": 1,
        },
        "data": {"corpus": str(folder / "corpus"), "weights": {"text": 1.0}, "seq_len": SEQ},
        "train": {"duration": "100step", "global_batch_size": 8},
        "eval": {"every": None, "samples": 1},
        "checkpoint": {"every": "1step", "keep": 1},
        "log": {"every": 1, "tensorboard": False},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


def until(command: list[str], mark: str) -> float:
    """Seconds until a process prints a line that begins with ``mark``; it is killed then."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(mark):
            seconds = time.perf_counter() - began
            process.kill()
            process.wait()
            return seconds
    raise RuntimeError(f"{command} ended without {mark!r}")


def bare(folder: Path, layers: int, save: bool) -> None:
    """The other side: the same model, plain AdamW, DCP, one step."""
    import torch
    import torch.distributed.checkpoint as dcp

    from llmtrain.config import from_dict
    from llmtrain.model import Decoder, complete

    shape = {"d_model": WIDTH, "n_layers": layers, "n_heads": 12, "d_ff": 2048, "vocab_size": 257}
    cfg = from_dict({"model": shape, "data": {"seq_len": SEQ}})
    model = Decoder(complete(cfg.model, None, SEQ), torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    named = dict(model.named_parameters())
    for param in named.values():
        state = optimizer.state[param]
        state["step"] = torch.zeros(())
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
    tensors = {f"model.{name}": param.detach() for name, param in named.items()}
    for name, param in named.items():
        tensors |= {f"optim.{name}.{k}": v for k, v in optimizer.state[param].items()}
    if save:
        dcp.save(tensors, checkpoint_id=folder / "dcp")
        return
    dcp.load(tensors, checkpoint_id=folder / "dcp")
    tokens = torch.randint(0, 257, (8, SEQ))
    model(tokens).float().logsumexp(-1).mean().backward()
    optimizer.step()
    print("step", flush=True)


def stall(run: Path) -> dict[str, float]:
    """Seconds of a step, and those for which an asynchronous save held it up."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = sorted(r["seconds"] for r in records if r["kind"] == "step")
    saves = [r["text"] for r in records if r["kind"] == "event" and "training waited" in r["text"]]
    # The first save takes fresh memory; those after it are what training meets.
    waited = [float(text.split("training waited ")[1].split()[0]) for text in saves[1:]]
    return {
        "step seconds": steps[len(steps) // 2],
        "stall seconds": sorted(waited)[len(waited) // 2],
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to write (default: the temporary folder)")
    parser.add_argument("--bare", choices=("save", "load"), help="be the other side, in --folder")
    args = parser.parse_args()
    if args.bare:
        bare(Path(args.folder), args.layers, args.bare == "save")
        return
    folder = Path(tempfile.mkdtemp(prefix="resume-", dir=args.folder))
    me = [sys.executable, str(Path(__file__).resolve())]
    me += ["--layers", str(args.layers), "--folder", str(folder), "--bare"]
    try:
        config = write_config(folder, args.layers)
        train = [sys.executable, "-m", "llmtrain", "train", str(config)]
        prepare = [sys.executable, "-m", "llmtrain", "data", "prepare", str(config)]
        for command in (prepare, [*train, "train.stop_after=5step"], [*me, "save"]):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        waits = stall(folder / "run")
        found = common.interleaved(
            {
                "llmtrain s": lambda: until([*train, "checkpoint.every=null"], "step   6/"),
                "dcp s": lambda: until([*me, "load"], "step"),
            },
            args.rounds,
        )
        newest = max((folder / "run" / "checkpoints").glob("step-*"))
        size = float(sum(os.path.getsize(file) for file in newest.iterdir()))
    finally:
        shutil.rmtree(folder)
    medians = {name: value["median"] for name, value in found.items()}
    ratios = {
        "llmtrain over dcp": medians["llmtrain s"] / medians["dcp s"],
        "stall over step": waits["stall seconds"] / waits["step seconds"],
    }
    for name, value in {**medians, **waits, **ratios}.items():
        print(f"{name:24} {value:8.3f}")
    result = {"bytes": size, "ratios": ratios, "seconds": found, "save": waits}
    print(common.write_result("resume", result, "safetensors", "xxhash"))


if __name__ == "__main__":
    main()
