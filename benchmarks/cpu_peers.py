"""The same small Llama trained on CPU by llmtrain and by what its users might use instead.

17 M parameters, sequence 256, batch 16, fused AdamW, clipping, the same random tokens, the same
number of threads, bf16 where the processor has it and fp32 elsewhere. Contenders, each in its
own environment and process: ``llmtrain train``, litgpt's ``pretrain.setup``, Hugging Face's
Trainer and a plain torch loop. Peers run in two
manners: ``as run`` (only the thread count is set) and ``our settings`` (with the process
settings that ``llmtrain train`` makes for itself). litgpt compiles its model; ``litgpt eager``
is the same with TORCHDYNAMO_DISABLE=1.

Rounds alternate the order, and every ratio is formed within a round, so that a drifting machine
cancels. Measured per run: tokens/s (median over the steps after the warmup), peak resident
memory of the process, seconds from process start to the end of the first step, CPU seconds per
step. Then the loop overhead: a real step of the trainer against bare forward, backward, clip and
optimizer step of the same model in the same process, in turn.

    python benchmarks/cpu_peers.py                 # environments are made under build/cpu_peers
    python benchmarks/cpu_peers.py --quick --only llmtrain,plain

Environments need the network (or pip's own cache) the first time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from common import ROOT, write_result  # noqa: E402
from peers.environments import PEERS, installed, make_environment  # noqa: E402
from peers.shape import (  # noqa: E402
    BATCH,
    BETAS,
    CLIP,
    D_FF,
    D_MODEL,
    LR,
    N_HEADS,
    N_LAYERS,
    NORM_EPS,
    PARAMETERS,
    ROPE_THETA,
    SEQ_LEN,
    TOKENS_PER_STEP,
    VOCAB,
    WEIGHT_DECAY,
)

from llmtrain.cli.process import SETTINGS  # noqa: E402
from llmtrain.machine import usable_cores  # noqa: E402
from llmtrain.parallel.hardware import has_fast_bf16  # noqa: E402

AS_RUN, SETTLED = "as run", "our settings"


@dataclass(frozen=True)
class Plan:
    """What is run."""

    work: Path
    steps: int
    warmup: int
    rounds: int
    threads: int
    tokens: Path
    precision: str

    def environment(self, manner: str) -> dict[str, str]:
        """Variables of a contender's process: the user's without our settings, or with them."""
        ours = {*SETTINGS, "LD_PRELOAD", "GLIBC_TUNABLES", "PYTHONPATH", "LLMTRAIN_PROCESS_READY"}
        base = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("OMP_")}
        base["OMP_NUM_THREADS"] = str(self.threads)
        base["PEER_PRECISION"] = self.precision
        return {**base, **SETTINGS} if manner == SETTLED else base


def write_tokens(path: Path, steps: int) -> None:
    """Uniform random uint16 tokens for ``steps`` steps, the same for everybody."""
    import numpy as np

    count = steps * TOKENS_PER_STEP + 1
    tokens = np.random.default_rng(0).integers(0, VOCAB, count, dtype=np.uint16)
    tokens.tofile(path)


def llmtrain_config(plan: Plan, folder: Path, hooks: list[dict[str, Any]]) -> Path:
    """The run's YAML (JSON is YAML): the peers' model, data and optimizer."""
    config = {
        "name": "llmtrain",
        "out": str(folder),
        "device": "cpu",
        "model": {
            "vocab_size": VOCAB,
            "d_model": D_MODEL,
            "n_layers": N_LAYERS,
            "n_heads": N_HEADS,
            "d_ff": D_FF,
            "norm_eps": NORM_EPS,
            "rope_theta": ROPE_THETA,
        },
        "data": {
            "sources": {"random": {"path": str(plan.tokens), "format": "npy", "dtype": "uint16"}},
            "weights": {"random": 1.0},
            "seq_len": SEQ_LEN,
            "eos_id": 0,
        },
        "optim": {"lr": LR, "betas": list(BETAS), "weight_decay": WEIGHT_DECAY, "clip_norm": CLIP},
        "schedule": {"name": "constant", "warmup": "1step"},
        "precision": {"compute": plan.precision},
        "train": {"duration": f"{plan.steps}step", "global_batch_size": BATCH},
        "guard": {"spike": "count"},
        "log": {"every": 1},
        "eval": {"every": None},
        "checkpoint": {"every": None, "resume": "never"},
        "hooks": hooks,
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(config, indent=1))
    return path


def spawn(command: list[str], environment: dict[str, str], log: Path) -> tuple[float, float, float]:
    """Run to the end. Returns start (Unix time), peak resident bytes, CPU seconds."""
    begin = time.time()
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(
            f"{' '.join(command)} ended with {process.returncode}; {log} ends:\n{tail}"
        )
    unit = 1 if sys.platform == "darwin" else 1024
    return begin, float(usage.ru_maxrss * unit), usage.ru_utime + usage.ru_stime


def one_run(plan: Plan, name: str, manner: str, python: Path) -> dict[str, Any]:
    """One contender's run: its raw stamps and what follows from them."""
    folder = plan.work / "runs" / f"{name}-{manner}".replace(" ", "_")
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    folder.mkdir(parents=True)
    out = folder / "result.json"
    environment = plan.environment(manner)
    environment |= {
        "PEER_TOKENS": str(plan.tokens),
        "PEER_STEPS": str(plan.steps),
        "PEER_OUT": str(out),
    }
    if name == "llmtrain":
        environment["PYTHONPATH"] = str(HERE / "peers")
        config = llmtrain_config(plan, folder, [{"use": "llmtrain_hooks:Stamps"}])
        command = [str(python), "-m", "llmtrain", "train", str(config)]
    else:
        environment |= dict(PEERS[name].environment)
        command = [str(python), str(HERE / "peers" / PEERS[name].script)]
    begin, memory, cpu = spawn(command, environment, folder / "log.txt")
    raw = json.loads(out.read_text())
    stamps, work = raw["stamps"], raw["cpu"]
    seconds = [b - a for a, b in itertools.pairwise(stamps)][plan.warmup - 1 :]
    busy = [b - a for a, b in itertools.pairwise(work)][plan.warmup - 1 :]
    return {
        "tokens_per_second": TOKENS_PER_STEP / statistics.median(seconds),
        "cpu_seconds_per_step": statistics.median(busy),
        "peak_memory_bytes": memory,
        "seconds_to_first_step": stamps[0] - begin,
        "process_cpu_seconds": cpu,
        "step_seconds": seconds,
        "losses": raw["losses"],
        "note": raw["note"],
        "load_average": os.getloadavg()[0],
    }


def contenders(names: list[str]) -> list[tuple[str, str]]:
    """(name, manner) of everything that is run; llmtrain makes its settings itself."""
    out = [("llmtrain", AS_RUN)] if "llmtrain" in names else []
    return out + [(n, m) for n in PEERS if n in names for m in (AS_RUN, SETTLED)]


def measure(plan: Plan, names: list[str], pythons: dict[str, Path]) -> dict[str, list[Any]]:
    """All runs of all rounds by ``name, manner``; a round's order is rotated and reversed."""
    field = contenders(names)
    runs: dict[str, list[Any]] = {f"{n}, {m}": [] for n, m in field}
    for i in range(plan.rounds):
        shift = i % len(field)
        order = field[shift:] + field[:shift]
        for name, manner in reversed(order) if i % 2 else order:
            result = one_run(plan, name, manner, pythons[name])
            runs[f"{name}, {manner}"].append(result)
            print(
                f"round {i + 1}/{plan.rounds}  {name + ', ' + manner:28} "
                f"{result['tokens_per_second']:8.0f} tokens/s",
                flush=True,
            )
    return runs


def ratio(runs: dict[str, list[Any]], other: str, key: str) -> float:
    """Median over rounds of llmtrain's reading over the other's of the same round."""
    ours = runs["llmtrain, " + AS_RUN]
    pairs = zip(ours, runs[other], strict=True)
    return statistics.median(float(a[key]) / float(b[key]) for a, b in pairs)


def table(runs: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """One row per contender: medians over the rounds and llmtrain's ratios to it."""
    keys = (
        "tokens_per_second",
        "peak_memory_bytes",
        "seconds_to_first_step",
        "cpu_seconds_per_step",
    )
    rows = []
    for name, results in runs.items():
        row: dict[str, Any] = {"contender": name}
        row |= {key: statistics.median(r[key] for r in results) for key in keys}
        if "llmtrain, " + AS_RUN in runs:
            row["llmtrain_speed_ratio"] = ratio(runs, name, "tokens_per_second")
            row["llmtrain_memory_ratio"] = ratio(runs, name, "peak_memory_bytes")
        row["note"] = results[0]["note"]
        rows.append(row)
    return rows


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The goals: 1.2x the fastest peer as run, 1.1x with our settings, less memory than any."""
    peers = [r for r in rows if not r["contender"].startswith("llmtrain")]
    if len(peers) == len(rows) or not peers:
        return {}

    def least(manner: str) -> float:
        found = [r["llmtrain_speed_ratio"] for r in peers if r["contender"].endswith(manner)]
        return min(found, default=math.nan)

    return {
        "speed_over_fastest_as_run": {"value": least(AS_RUN), "goal": 1.2},
        "speed_over_fastest_with_our_settings": {"value": least(SETTLED), "goal": 1.1},
        "memory_over_smallest_peer": {
            "value": max(r["llmtrain_memory_ratio"] for r in peers),
            "goal": 1.0,
        },
    }


def loop_overhead(plan: Plan, python: Path) -> dict[str, Any]:
    """Real steps of the trainer against bare ones, in turn, in one process."""
    folder = plan.work / "runs" / "overhead"
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    folder.mkdir(parents=True)
    out = folder / "result.json"
    environment = {**plan.environment(SETTLED), "PYTHONPATH": str(HERE / "peers")}
    environment |= {
        "PEER_TOKENS": str(plan.tokens),
        "PEER_STEPS": str(plan.steps),
        "PEER_OUT": str(out),
    }
    config = llmtrain_config(plan, folder, [{"use": "llmtrain_hooks:Overhead"}])
    spawn([str(python), "-m", "llmtrain", "train", str(config)], environment, folder / "log.txt")
    raw = json.loads(out.read_text())
    result: dict[str, Any] = {"goal": 0.01}
    for clock in ("wall", "cpu"):
        pairs = raw[clock][plan.warmup :]
        # The pairs' difference, not their ratio: its median is not pulled by slow pairs.
        extra = statistics.median(real - bare for real, bare in pairs)
        result[clock] = {
            "bare_seconds": statistics.median(bare for _, bare in pairs),
            "extra_seconds": extra,
            "overhead": extra / statistics.median(bare for _, bare in pairs),
            "pairs": pairs,
        }
    return result


def show(rows: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """Print the table and the verdict."""
    print(
        f"\n{'contender':28}{'tokens/s':>10}{'peak MB':>9}{'1st step s':>12}"
        f"{'CPU s/step':>12}{'speed':>8}{'memory':>8}"
    )
    for r in rows:
        print(
            f"{r['contender']:28}{r['tokens_per_second']:10.0f}"
            f"{r['peak_memory_bytes'] / 1e6:9.0f}{r['seconds_to_first_step']:12.1f}"
            f"{r['cpu_seconds_per_step']:12.2f}{r.get('llmtrain_speed_ratio', math.nan):8.2f}"
            f"{r.get('llmtrain_memory_ratio', math.nan):8.2f}"
        )
    print("speed, memory: llmtrain over this contender, median of the rounds' ratios")
    for key, value in result["goals"].items():
        print(f"{key}: {value['value']:.3f} (goal {value['goal']})")
    if "loop_overhead" in result:
        o = result["loop_overhead"]
        print(
            f"loop overhead: {o['wall']['overhead']:.2%} of wall time, "
            f"{o['cpu']['overhead']:.2%} of CPU time (goal below 1%)"
        )


def main() -> None:
    """Run everything and write the result."""
    names = ["llmtrain", *PEERS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "cpu_peers")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a run")
    parser.add_argument("--warmup", type=int, default=8, help="steps that are not counted")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument(
        "--precision", choices=("bf16", "fp32"), help="of all; bf16 where the processor has it"
    )
    parser.add_argument("--only", default=",".join(names), help="contenders, separated by commas")
    parser.add_argument("--quick", action="store_true", help="8 steps, 1 round, no result file")
    parser.add_argument("--no-overhead", action="store_true", help="skip the loop overhead")
    parser.add_argument("--pip-args", default="", help="for pip, e.g. --index-url=...")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    chosen = [n.strip() for n in args.only.split(",")]
    if unknown := set(chosen) - set(names):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; known: {', '.join(names)}")
    steps, warmup, rounds = (8, 3, 1) if args.quick else (args.steps, args.warmup, args.rounds)
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    precision = args.precision or ("bf16" if has_fast_bf16(torch.device("cpu")) else "fp32")
    plan = Plan(work, steps, warmup, rounds, args.threads, work / "tokens.npy", precision)
    write_tokens(plan.tokens, steps)
    pythons = {"llmtrain": Path(sys.executable)}
    for name, peer in PEERS.items():
        if name in chosen:
            pythons[name] = make_environment(work, peer, args.pip_args.split())
    if os.getloadavg()[0] > plan.threads / 2:
        print(
            f"the machine is busy (load average {os.getloadavg()[0]:.1f}): peers as run spin while "
            "they wait and lose many times more than on an idle machine",
            flush=True,
        )
    runs = measure(plan, chosen, pythons)
    rows = table(runs)
    result: dict[str, Any] = {
        "model": {"parameters": PARAMETERS, "seq_len": SEQ_LEN, "batch": BATCH, "vocab": VOCAB},
        "threads": plan.threads,
        "precision": plan.precision,
        "steps": steps,
        "warmup": warmup,
        "settings": SETTINGS,
        "environments": {n: installed(p) for n, p in pythons.items()},
        "table": rows,
        "goals": verdict(rows),
        "runs": runs,
    }
    if "llmtrain" in chosen and not args.no_overhead:
        result["loop_overhead"] = loop_overhead(plan, pythons["llmtrain"])
    show(rows, result)
    if args.quick and args.out is None:
        print("quick: nothing recorded")
    else:
        print(f"recorded in {write_result('cpu_peers', result, out=args.out)}")


if __name__ == "__main__":
    main()
