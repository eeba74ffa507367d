"""LoRA by llmtrain against peft with Hugging Face's Trainer, and full finetuning by both, on a CPU.

One random Llama (``--width`` and ``--layers`` say how large), rank 16 beside every matrix, sequence
256, batch 4, fused AdamW, clipping, float32, the same random tokens, the same number of threads and
the same settings of OpenMP and the allocator on both sides. Every reading is a process of its own:
``llmtrain train`` with ``init.path``, and a script with ``Trainer``. Rounds take the contenders in
turn and every ratio is formed within a round.

Measured: tokens per second of wall time and of processor time (median over the steps after the
warmup), peak resident memory of the process, what it takes beyond the imports of its libraries.

    python benchmarks/finetune.py             # needs transformers, peft and accelerate
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE / "peers")]

from common import ROOT, write_result  # noqa: E402
from finetune_job import (  # noqa: E402
    BATCH,
    BETAS,
    CLIP,
    LR,
    RANK,
    SEQ_LEN,
    TOKENS_PER_STEP,
)

from llmtrain.cli.process import SETTINGS  # noqa: E402

VOCAB = 8192
OURS, THEIRS = "llmtrain", "peft and Trainer"
CONTENDERS = [(who, method) for method in ("lora", "full") for who in (OURS, THEIRS)]
IMPORTS = {
    OURS: "import llmtrain.train.run",
    THEIRS: "import peft; from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer",
}


def make_model(folder: Path, width: int, layers: int) -> int:
    """A random Llama in Hugging Face's format and as a checkpoint of ours; returns its size."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmtrain.convert import from_huggingface

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=-(-8 * width // 3 // 64) * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "hf")
    from_huggingface(folder / "hf", folder / "ours")
    return int(model.num_parameters())


def write_tokens(path: Path, steps: int) -> None:
    """Uniform random uint16 tokens for ``steps`` steps, the same for everybody."""
    import numpy as np

    count = steps * TOKENS_PER_STEP + 1
    np.random.default_rng(0).integers(0, VOCAB, count, dtype=np.uint16).tofile(path)


def our_config(work: Path, folder: Path, steps: int, method: str) -> Path:
    """The run's YAML (JSON is YAML)."""
    import yaml

    stored = yaml.safe_load((work / "ours" / "config.yaml").read_text())["model"]
    model = {**stored, "max_seq_len": None}
    if method == "lora":
        model["adapters"] = {"rank": RANK}
    config = {
        "name": "run",
        "out": str(folder),
        "device": "cpu",
        "init": {"path": str(work / "ours")},
        "model": model,
        "data": {
            "sources": {
                "random": {"path": str(work / "tokens.npy"), "format": "npy", "dtype": "uint16"}
            },
            "weights": {"random": 1.0},
            "seq_len": SEQ_LEN,
            "eos_id": 0,
        },
        "optim": {"lr": LR, "betas": list(BETAS), "weight_decay": 0.0, "clip_norm": CLIP},
        "schedule": {"name": "constant", "warmup": "0step"},
        "precision": {"compute": "fp32"},
        "train": {"duration": f"{steps}step", "global_batch_size": BATCH},
        "log": {"every": 1, "tensorboard": False},
        "eval": {"every": None},
        "checkpoint": {"every": None, "resume": "never"},
        "hooks": [{"use": "finetune_hooks:Stamps"}],
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(config, indent=1))
    return path


def spawn(command: list[str], environment: dict[str, str], log: Path) -> float:
    """Run to the end; returns the peak resident bytes."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{tail}")
    return float(usage.ru_maxrss * 1024)


def environment(work: Path, steps: int, method: str, out: Path, threads: int) -> dict[str, str]:
    """Variables of a contender's process."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "LLMTRAIN_"))}
    return {
        **kept,
        **SETTINGS,
        "OMP_NUM_THREADS": str(threads),
        "LLMTRAIN_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join((str(HERE.parent), str(HERE / "peers"))),
        "PEER_TOKENS": str(work / "tokens.npy"),
        "PEER_STEPS": str(steps),
        "PEER_METHOD": method,
        "PEER_MODEL": str(work / "hf"),
        "PEER_OUT": str(out),
    }


def one_run(work: Path, who: str, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """One reading."""
    folder = work / "runs" / f"{who}-{method}".replace(" ", "-")
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    folder.mkdir(parents=True)
    out = folder / "result.json"
    variables = environment(work, args.steps, method, out, args.threads)
    if who == OURS:
        config = our_config(work, folder, args.steps, method)
        command = [sys.executable, "-m", "llmtrain", "train", str(config)]
    else:
        command = [sys.executable, str(HERE / "peers" / "peft_trainer.py")]
    memory = spawn(command, variables, folder / "log.txt")
    raw = json.loads(out.read_text())
    rates = {}
    for key, clock in (("tokens_per_second", "stamps"), ("tokens_per_cpu_second", "cpu")):
        spent = [b - a for a, b in itertools.pairwise(raw[clock])][args.warmup - 1 :]
        rates[key] = TOKENS_PER_STEP / statistics.median(spent)
    return {
        **rates,
        "peak_memory_bytes": memory,
        "trained_parameters": raw["trained"],
        "first_loss": raw["losses"][0],
        "load_average": os.getloadavg()[0],
    }


def verdict(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """llmtrain over peft, medians of the rounds' ratios."""

    def ratio(key: str, one: str, two: str) -> float:
        pairs = zip(runs[one], runs[two], strict=False)
        return statistics.median(a[key] / b[key] for a, b in pairs)

    ours, theirs = f"{OURS}, lora", f"{THEIRS}, lora"
    found = {
        "speed_over_peft_wall": {"value": ratio("tokens_per_second", ours, theirs), "goal": 1.2},
        "speed_over_peft_cpu": {"value": ratio("tokens_per_cpu_second", ours, theirs), "goal": 1.2},
        "memory_over_peft": {"value": ratio("peak_memory_bytes", ours, theirs), "goal": 1.0},
    }
    full = f"{OURS}, full"
    for key in ("tokens_per_cpu_second", "peak_memory_bytes") if runs[full] else ():
        found[f"lora_over_full_{key}"] = {"value": ratio(key, ours, full), "goal": None}
    return found


def main() -> None:
    """Run everything and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "finetune")
    parser.add_argument("--width", type=int, default=448)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full-rounds", type=int, default=1, help="of them with full finetuning")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-imports", action="store_true", help="skip the memory of imports")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    work = args.work.resolve()
    subprocess.run(["rm", "-rf", str(work)], check=True)
    work.mkdir(parents=True)
    n_params = make_model(work, args.width, args.layers)
    write_tokens(work / "tokens.npy", args.steps)
    imports = {
        who: spawn(
            [sys.executable, "-c", text],
            environment(work, 0, "lora", work / "none", args.threads),
            work / "imports.txt",
        )
        for who, text in IMPORTS.items()
        if not args.no_imports
    }
    runs: dict[str, list[dict[str, Any]]] = {f"{who}, {m}": [] for who, m in CONTENDERS}
    for i in range(args.rounds):
        field = [c for c in CONTENDERS if c[1] == "lora" or i < args.full_rounds]
        for who, method in reversed(field) if i % 2 else field:
            result = one_run(work, who, method, args)
            runs[f"{who}, {method}"].append(result)
            print(
                f"round {i + 1}  {who + ', ' + method:24}{result['tokens_per_second']:8.0f} "
                f"tokens/s {result['tokens_per_cpu_second']:8.0f} per CPU s "
                f"{result['peak_memory_bytes'] / 1e6:8.0f} MB",
                flush=True,
            )
    goals = verdict(runs)
    for key, value in goals.items():
        goal = "" if value["goal"] is None else f" (goal {value['goal']})"
        print(f"{key}: {value['value']:.3f}{goal}")
    result = {
        "model": {"parameters": n_params, "width": args.width, "layers": args.layers},
        "threads": args.threads,
        "precision": "fp32",
        "rank": RANK,
        "tokens_per_step": TOKENS_PER_STEP,
        "steps": args.steps,
        "warmup": args.warmup,
        "settings": SETTINGS,
        "imports_memory_bytes": imports,
        "goals": goals,
        "runs": runs,
    }
    packages = ("transformers", "peft", "accelerate")
    print(f"recorded in {write_result('finetune', result, *packages, out=args.out)}")


if __name__ == "__main__":
    main()
