"""LoRA by llmtrain against peft with Hugging Face's Trainer, and full finetuning by both, on a CPU.

One random Llama (``--width`` and ``--layers`` say how large), rank 16 beside every matrix, fused
AdamW, clipping, float32, the same number of threads and the same settings of OpenMP and the
allocator on both sides. Every reading is a process of its own: ``llmtrain train`` with
``init.path``, and a script with ``Trainer``. Rounds take the contenders in turn and every ratio is
formed within a round. Two scenes:

rows: the same random tokens in rows of 256, 4 to a step; LoRA, and full finetuning.
talks: the same conversations, of which the answers count, their lengths log-normal (median 150
tokens, sigma 0.7, at most 480). llmtrain packs them whole into windows without attention across;
the Trainer pads each batch to its longest, as it does by default; with ``group_by_length`` it would
take conversations of about a length together; with fewer than eight batches it merely shuffles
anew.

Measured: useful tokens (those that count in the loss) per second of wall time and of processor
time, of rows by the median over the steps after the warmup, of talks over all steps, since no two
are alike; peak resident memory of the process, what it takes beyond the imports of its libraries.

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
    TALKS,
    WINDOW,
    WINDOWS,
)

from llmtrain.cli.process import SETTINGS  # noqa: E402

VOCAB = 8192
OURS, THEIRS, GROUPED = "llmtrain", "peft and Trainer", "peft and Trainer by length"
# Scene, who, method.
CONTENDERS = [
    *(("rows", who, "lora") for who in (OURS, THEIRS)),
    *(("talks", who, "lora") for who in (OURS, THEIRS, GROUPED)),
    *(("rows", who, "full") for who in (OURS, THEIRS)),
]
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
        max_position_embeddings=WINDOW,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "hf")
    from_huggingface(folder / "hf", folder / "ours")
    return int(model.num_parameters())


def write_rows(path: Path, steps: int) -> None:
    """Uniform random uint16 tokens for ``steps`` steps, the same for everybody."""
    import numpy as np

    count = steps * BATCH * SEQ_LEN + 1
    np.random.default_rng(0).integers(0, VOCAB, count, dtype=np.uint16).tofile(path)


def write_talks(work: Path, steps: int) -> None:
    """Conversations of random letters for ``steps`` steps of the peer: as records that llmtrain
    prepares, and as the tokens that come of it, [[tokens, where the answer begins], ...]."""
    import numpy as np

    random = np.random.default_rng(0)
    records, talks = [], []
    for size in np.clip(random.lognormal(np.log(150), 0.7, steps * TALKS), 48, 480).astype(int):
        before, between = b"### User\n", b"\n\n### Assistant\n"
        room = int(size) - len(before) - len(between) - 1
        letters = random.integers(97, 123, room, dtype=np.uint8).tobytes()
        question, answer = letters[: room // 3], letters[room // 3 :]
        records.append({"prompt": question.decode(), "response": answer.decode()})
        opening = before + question + between
        talks.append([[*opening, *answer, 256], len(opening)])
    (work / "talks.json").write_text(json.dumps(talks))
    (work / "talks.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    source = {
        "kind": "jsonl",
        "paths": [str(work / "talks.jsonl")],
        "chat": {"template": "plain", "window": WINDOW},
    }
    prepare = {
        "out": str(work / "talks"),
        "tokenizer": {"kind": "byte"},
        "heldout_fraction": 0,
        "workers": 1,
        "sources": {"talks": source},
    }
    (work / "prepare.yaml").write_text(json.dumps({"prepare": prepare}))
    command = [sys.executable, "-m", "llmtrain", "data", "prepare", str(work / "prepare.yaml")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def our_data(work: Path, scene: str) -> dict[str, Any]:
    """The section ``data``."""
    if scene == "talks":
        return {
            "corpus": str(work / "talks"),
            "weights": {"talks": 1.0},
            "seq_len": WINDOW,
            "document_mask": True,
            "reset_positions": True,
        }
    tokens = {"path": str(work / "rows.npy"), "format": "npy", "dtype": "uint16"}
    return {
        "sources": {"random": tokens},
        "weights": {"random": 1.0},
        "seq_len": SEQ_LEN,
        "eos_id": 0,
    }


def our_config(work: Path, folder: Path, steps: int, scene: str, method: str) -> Path:
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
        "data": our_data(work, scene),
        "optim": {"lr": LR, "betas": list(BETAS), "weight_decay": 0.0, "clip_norm": CLIP},
        "schedule": {"name": "constant", "warmup": "0step"},
        "precision": {"compute": "fp32"},
        "train": {
            "duration": f"{steps}step",
            "global_batch_size": WINDOWS if scene == "talks" else BATCH,
        },
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


def environment(work: Path, out: Path, threads: int, **peer: str) -> dict[str, str]:
    """Variables of a contender's process. peer: those of ``FinetuneJob``, without PEER_."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "LLMTRAIN_"))}
    return {
        **kept,
        **SETTINGS,
        "OMP_NUM_THREADS": str(threads),
        "LLMTRAIN_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join((str(HERE.parent), str(HERE / "peers"))),
        "PEER_MODEL": str(work / "hf"),
        "PEER_OUT": str(out),
        **{f"PEER_{key.upper()}": value for key, value in peer.items()},
    }


def one_run(
    work: Path, contender: tuple[str, str, str], args: argparse.Namespace
) -> dict[str, Any]:
    """One reading."""
    scene, who, method = contender
    folder = work / "runs" / "-".join(contender).replace(" ", "-")
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    folder.mkdir(parents=True)
    out = folder / "result.json"
    variables = environment(
        work,
        out,
        args.threads,
        data=scene,
        tokens=str(work / ("talks.json" if scene == "talks" else "rows.npy")),
        steps=str(args.steps),
        method=method,
        groups="yes" if who == GROUPED else "no",
    )
    if who == OURS:
        config = our_config(work, folder, args.steps, scene, method)
        command = [sys.executable, "-m", "llmtrain", "train", str(config)]
    else:
        command = [sys.executable, str(HERE / "peers" / "peft_trainer.py")]
    memory = spawn(command, variables, folder / "log.txt")
    raw = json.loads(out.read_text())
    rates = {}
    # No two steps of talks are alike, and short ones may come last: all of them count.
    skipped = 0 if scene == "talks" else args.warmup
    useful = raw["useful"][skipped : len(raw["stamps"])]
    clocks = (("tokens_per_second", "stamps"), ("tokens_per_cpu_second", "cpu"))
    for (key, clock), begun in zip(clocks, raw["begun"], strict=True):
        spent = [b - a for a, b in itertools.pairwise([begun, *raw[clock]])][skipped:]
        whole = sum(spent) if scene == "talks" else len(spent) * statistics.median(spent)
        rates[key] = sum(useful) / whole
    return {
        **rates,
        "useful_tokens": sum(useful),
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

    keys = {
        "speed_{}_wall": ("tokens_per_second", 1.2),
        "speed_{}_cpu": ("tokens_per_cpu_second", 1.2),
        "memory_{}": ("peak_memory_bytes", 1.0),
    }
    found = {}
    for scene, them, name in (
        ("rows", THEIRS, "over_peft"),
        ("talks", THEIRS, "over_peft_on_talks"),
    ):
        for key, (quantity, goal) in keys.items():
            value = ratio(quantity, f"{scene}, {OURS}, lora", f"{scene}, {them}, lora")
            found[key.format(name)] = {"value": value, "goal": goal}
    full = f"rows, {OURS}, full"
    for key in ("tokens_per_cpu_second", "peak_memory_bytes") if runs[full] else ():
        value = ratio(key, f"rows, {OURS}, lora", full)
        found[f"lora_over_full_{key}"] = {"value": value, "goal": None}
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
    write_rows(work / "rows.npy", args.steps)
    write_talks(work, args.steps)
    imports = {
        who: spawn(
            [sys.executable, "-c", text],
            environment(work, work / "none", args.threads),
            work / "imports.txt",
        )
        for who, text in IMPORTS.items()
        if not args.no_imports
    }
    runs: dict[str, list[dict[str, Any]]] = {", ".join(c): [] for c in CONTENDERS}
    for i in range(args.rounds):
        field = [c for c in CONTENDERS if c[2] == "lora" or i < args.full_rounds]
        for contender in reversed(field) if i % 2 else field:
            name = ", ".join(contender)
            result = one_run(work, contender, args)
            runs[name].append(result)
            print(
                f"round {i + 1}  {name:40}{result['tokens_per_second']:8.0f} "
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
        "rows": {"length": SEQ_LEN, "batch": BATCH},
        "talks": {"window": WINDOW, "windows": WINDOWS, "batch_of_the_peer": TALKS},
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
