"""Merging 1-GB checkpoints: llmtrain merge against mergekit; the in-training merge against memory.

    python benchmarks/merge.py --mergekit VENV/bin/python [--rounds 3] [--dtype fp32] [--folder DIR]

Two and four random Llama folders of Hugging Face's layout, merged by both commands in turn with
the same number of threads, each in a fresh process, from files in the page cache. Per command:
wall and CPU seconds of the whole process, of the merge without start and imports, until
everything is also on the disk (``llmtrain merge`` flushes what it writes, mergekit does not; its
files are flushed afterwards and the time added), and peak memory: the process's own
(``RssAnon``) and with the mapped pages of files (``VmHWM``). Results are compared element by
element. mergekit is left out without ``--mergekit``.

Then the merge of SFA in training, ``theta <- (1 - beta) theta + beta theta_o`` over the same
number of bytes, against one pass that reads two tensors and writes one at memory bandwidth
(``torch.add(a, b, out=a)`` on the whole memory), in processor time of one thread, since other work
on the machine would be counted otherwise. Medians go to benchmarks/results/merge.json and
merge_training.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

ALONE = Path(__file__).resolve().parent / "peers" / "timed_merge.py"
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
    "intermediate_size": 2816,
}
# 268M parameters in fp32, twice as many in bf16.
LAYERS = {"fp32": 16, "bf16": 37}


@dataclass(frozen=True)
class Case:
    """A merge: llmtrain's method and keys, mergekit's, and how many checkpoints take part."""

    ours: str
    theirs: str
    count: int
    based: bool
    keys: tuple[str, ...] = ()
    parameters: tuple[tuple[str, float], ...] = ()
    entry: tuple[tuple[str, float], ...] = ()
    base_listed: bool = False


CASES = {
    "linear of 2": Case("linear", "linear", 2, False, entry=(("weight", 1.0),)),
    "linear of 4": Case("linear", "linear", 4, False, entry=(("weight", 1.0),)),
    "slerp of 2": Case(
        "slerp", "slerp", 2, True, ("t=0.3",), (("t", 0.3),), base_listed=True
    ),
    "task arithmetic of 4": Case(
        "task-arithmetic", "task_arithmetic", 4, True, ("scale=0.5",), (("lambda", 0.5),),
        (("weight", 1.0),),
    ),
    "ties of 2": Case(
        "ties", "ties", 2, True, ("density=0.2",), (("lambda", 1.0),),
        (("weight", 1.0), ("density", 0.2)),
    ),
    "ties of 4": Case(
        "ties", "ties", 4, True, ("density=0.2",), (("lambda", 1.0),),
        (("weight", 1.0), ("density", 0.2)),
    ),
    "model stock of 4": Case("model-stock", "model_stock", 4, True, base_listed=True),
}  # fmt: skip


def make_models(folder: Path, dtype: str, count: int) -> list[Path]:
    """Random folders: a base and models near it."""
    import torch
    from safetensors.torch import save_file

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    random = torch.Generator().manual_seed(0)
    base = {k: torch.randn(s, generator=random).mul_(0.02).to(kind) for k, s in shapes(dtype)}
    config = {**SHAPE, "num_hidden_layers": LAYERS[dtype], "torch_dtype": str(kind)[6:]}
    made = []
    for i in range(count):
        path = folder / f"model{i}"
        path.mkdir(parents=True)
        for value in base.values() if i else ():
            value.add_(torch.randn(value.shape, generator=random).mul_(0.005).to(kind))
        save_file(base, path / "model.safetensors", {"format": "pt"})
        (path / "config.json").write_text(json.dumps(config))
        made.append(path)
    return made


def shapes(dtype: str) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of Hugging Face's Llama."""
    d, f, v = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    assert isinstance(d, int) and isinstance(f, int) and isinstance(v, int)
    found: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (v, d)),
        ("lm_head.weight", (v, d)),
        ("model.norm.weight", (d,)),
    ]
    for i in range(LAYERS[dtype]):
        stem = f"model.layers.{i}"
        found += [(f"{stem}.self_attn.{p}_proj.weight", (d, d)) for p in "qkvo"]
        found += [(f"{stem}.mlp.{p}_proj.weight", (f, d)) for p in ("gate", "up")]
        found += [
            (f"{stem}.mlp.down_proj.weight", (d, f)),
            (f"{stem}.input_layernorm.weight", (d,)),
            (f"{stem}.post_attention_layernorm.weight", (d,)),
        ]
    return found


def our_command(case: Case, models: list[Path], out: Path) -> list[str]:
    """``llmtrain merge``."""
    paths = [str(m) for m in models[: case.count]]
    line = [case.ours, *paths[1 if case.based else 0 :], *case.keys, "--out", str(out)]
    if case.based:
        line += ["--base", paths[0]]
    return [sys.executable, str(ALONE), "ours", *line]


def their_command(case: Case, models: list[Path], out: Path, python: str) -> list[str]:
    """``mergekit-yaml``."""
    import yaml

    paths = [str(m) for m in models[: case.count]]
    entry = dict(case.entry)
    first = 1 if case.based and not case.base_listed else 0
    recipe: dict[str, Any] = {
        "merge_method": case.theirs,
        "models": [{"model": p, **({"parameters": entry} if entry else {})} for p in paths[first:]],
    }
    if case.parameters:
        recipe["parameters"] = dict(case.parameters)
    if case.based:
        recipe["base_model"] = paths[0]
    file = out.parent / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return [python, str(ALONE), "mergekit", str(file), str(out), "--quiet", "--no-copy-tokenizer"]


def measured(command: list[str], out: Path, environment: dict[str, str]) -> dict[str, float]:
    """Run a command; seconds and bytes as the module says."""
    os.sync()
    peak = mapped = 0
    log = out.parent / "log.txt"
    begin = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)

        def watch() -> None:
            nonlocal peak, mapped
            while process.returncode is None:
                own, whole = memory(process.pid)
                peak, mapped = max(peak, own), max(mapped, whole)
                time.sleep(0.005)

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        watcher.join()
    wall = time.perf_counter() - begin
    if process.returncode:
        raise RuntimeError(f"{command} failed:\n{log.read_text()[-2000:]}")
    os.sync()
    flushed = time.perf_counter() - begin
    merge_wall, merge_cpu = map(float, log.read_text().split()[-2:])
    return {
        "wall_s": wall,
        "flushed_s": flushed,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "anonymous_bytes": float(peak),
        "resident_bytes": float(mapped),
        "merge_s": merge_wall,
        "merge_cpu_s": merge_cpu,
    }


def memory(pid: int) -> tuple[int, int]:
    """Bytes of a process's own memory now, and its peak with mapped files."""
    found = {"RssAnon": 0, "VmHWM": 0}
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in found:
                found[key] = int(value.split()[0]) * 1024
    except OSError:
        pass
    return found["RssAnon"], found["VmHWM"]


def difference(one: Path, two: Path) -> float:
    """Share of the elements in which two results differ by more than 1e-5 of the largest.

    Of equal magnitudes TIES may keep any.
    """
    from safetensors import safe_open

    apart = total = 0
    with safe_open(one, "pt") as a, safe_open(two, "pt") as b:
        names = list(a.keys())
        for name in names:
            x, y = a.get_tensor(name).float(), b.get_tensor(name).float()
            apart += int(((x - y).abs() > 1e-5 * x.abs().max()).sum())
            total += x.numel()
    return apart / total


def warm(models: list[Path]) -> None:
    """Read the models once, so that both sides find them in the page cache."""
    for model in models:
        with (model / "model.safetensors").open("rb", buffering=0) as file:
            while file.read(16 << 20):
                pass


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Readings of all cases, and their ratios."""
    names = args.only.split(",") if args.only else list(CASES)
    models = make_models(folder, args.dtype, max(CASES[name].count for name in names))
    threads = str(args.threads or common.usable_cores())
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    plain = {**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    # Each side in its own environment: mergekit must not see this one's packages.
    sides: dict[str, Callable[[Case, Path], list[str]]] = {
        "llmtrain": lambda case, out: our_command(case, models, out)
    }
    environments = {"llmtrain": {**plain, "PYTHONPATH": path}}
    if args.mergekit:
        sides["mergekit"] = lambda case, out: their_command(case, models, out, args.mergekit)
        environments["mergekit"] = {k: v for k, v in plain.items() if k != "PYTHONPATH"}
    found: dict[str, Any] = {}
    for name in names:
        case = CASES[name]
        readings: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            outs = {}
            for side, command in sides.items():
                warm(models[: case.count])
                outs[side] = out = folder / side
                readings[side].append(measured(command(case, out), out, environments[side]))
            files = [out / "model.safetensors" for out in outs.values()]
            apart = difference(files[0], files[1]) if len(files) == 2 else None
            for out in outs.values():
                shutil.rmtree(out)
        found[name] = result = {
            side: {key: common.summary([r[key] for r in rows]) for key in rows[0]}
            for side, rows in readings.items()
        }
        if apart is not None:
            result["share_that_differs"] = apart
            result["mergekit_over_llmtrain"] = ratios(result)
        report(name, result)
    return found


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """Medians of mergekit over those of llmtrain."""
    ours, theirs = result["llmtrain"], result["mergekit"]
    return {key: theirs[key]["median"] / ours[key]["median"] for key in ours}


def report(name: str, result: dict[str, Any]) -> None:
    """A line for each side."""
    for side in ("llmtrain", "mergekit"):
        if side in result:
            row = {key: value["median"] for key, value in result[side].items()}
            print(
                f"{name:22} {side:9} merge {row['merge_s']:6.2f} s, whole {row['wall_s']:6.2f} s, "
                f"on disk {row['flushed_s']:6.2f} s, CPU {row['cpu_s']:6.2f} s (merge "
                f"{row['merge_cpu_s']:6.2f} s), own memory "
                f"{row['anonymous_bytes'] / 1e6:7.0f} MB, with maps "
                f"{row['resident_bytes'] / 1e6:7.0f} MB",
                flush=True,
            )
    if "mergekit_over_llmtrain" in result:
        words = ", ".join(f"{k} {v:.1f}" for k, v in result["mergekit_over_llmtrain"].items())
        print(f"{name:22} ratios: {words}; share that differs {result['share_that_differs']:.1e}")


def in_training(megabytes: int, rounds: int) -> dict[str, Any]:
    """Seconds of SFA's merge over the parameters, and of one pass over as many bytes."""
    import torch

    from llmtrain.merge.copies import move_towards

    count = max(1, megabytes // 4)
    torch.set_num_threads(1)
    params = {str(i): torch.randn(1000, 1000) for i in range(count)}
    anchor = {k: torch.randn(1000, 1000) for k in params}
    one, two = torch.randn(count * 1000 * 1000), torch.randn(count * 1000 * 1000)
    torch.add(one, two, out=one)
    move_towards(params, anchor, 0.5)

    def seconds(work: Callable[[], object]) -> float:
        begin = time.thread_time()
        work()
        return time.thread_time() - begin

    readings = common.interleaved(
        {
            "merge_s": lambda: seconds(lambda: move_towards(params, anchor, 0.5)),
            "pass_s": lambda: seconds(lambda: torch.add(one, two, out=one)),
        },
        rounds,
    )
    pairs = zip(readings["merge_s"]["readings"], readings["pass_s"]["readings"], strict=True)
    ratio = statistics.median(merge / whole for merge, whole in pairs)
    print(f"in training: merge {readings['merge_s']['median']:.3f} s, {ratio:.2f} passes")
    return {**readings, "bytes_of_parameters": 4_000_000 * count, "merge_over_pass": ratio}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit", metavar="PYTHON", help="interpreter that has mergekit")
    parser.add_argument("--part", choices=("all", "offline", "training"), default="all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, help="of each side (default: usable cores)")
    parser.add_argument("--only", help="cases, separated by commas")
    parser.add_argument("--folder", help="where to write (default: the temporary folder)")
    parser.add_argument("--out", type=Path, help="result file")
    args = parser.parse_args()
    if args.part != "offline":
        found = in_training(1000, max(args.rounds, 15))
        print(common.write_result("merge_training", found))
    if args.part == "training":
        return
    folder = Path(tempfile.mkdtemp(prefix="merge-", dir=args.folder))
    try:
        cases = compare(args, folder)
    finally:
        shutil.rmtree(folder)
    result = {
        "dtype": args.dtype,
        "threads": args.threads or common.usable_cores(),
        "offline": cases,
        "mergekit": their_version(args.mergekit) if args.mergekit else None,
    }
    print(common.write_result("merge", result, "safetensors", out=args.out))


def their_version(python: str) -> str:
    """mergekit's version."""
    code = "import importlib.metadata as m; print(m.version('mergekit'), m.version('torch'))"
    return subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
