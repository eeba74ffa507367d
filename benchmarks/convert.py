"""Peak memory of ``llmtrain convert from-hf`` and ``to-hf`` on a synthetic model of 3 GB.

A Llama of about 0.76e9 float32 parameters whose vocabulary is the largest tensor. Each conversion
is a process of its own; its peak resident memory must stay within 1.3 times the largest tensor and
1 GB. What comes back must be what went in, to the byte.

    python benchmarks/convert.py              # writes about 9 GB under build/convert
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from common import ROOT, write_result  # noqa: E402

from llmtrain.checkpoint.safefile import hash_bytes, read_header  # noqa: E402
from llmtrain.convert.writing import Target, write_file  # noqa: E402

WIDTH, FF, VOCAB, HEADS = 2048, 5504, 100_000, 16
_BLOCK = 1 << 22


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a Llama with tied embeddings."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH)}
    for i in range(layers):
        base = f"model.layers.{i}."
        for x in "qkvo":
            found[f"{base}self_attn.{x}_proj.weight"] = (WIDTH, WIDTH)
        found[f"{base}mlp.gate_proj.weight"] = (FF, WIDTH)
        found[f"{base}mlp.up_proj.weight"] = (FF, WIDTH)
        found[f"{base}mlp.down_proj.weight"] = (WIDTH, FF)
        found[f"{base}input_layernorm.weight"] = (WIDTH,)
        found[f"{base}post_attention_layernorm.weight"] = (WIDTH,)
    return found | {"model.norm.weight": (WIDTH,)}


def make(folder: Path, layers: int) -> dict[str, int]:
    """The model as transformers saves it; returns its bytes and those of the largest tensor."""
    folder.mkdir(parents=True)
    targets = [Target(name, torch.float32, shape) for name, shape in shapes(layers).items()]
    noise = torch.randn(2 * _BLOCK)

    def values(target: Target, number: int) -> Iterator[torch.Tensor]:
        left = target.bytes // 4
        while left:
            first = (number * 7919 + left) % _BLOCK
            block = noise[first : first + min(left, _BLOCK)]
            left -= len(block)
            yield block

    write_file(folder / "model.safetensors", targets, (values(t, i) for i, t in enumerate(targets)))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": FF,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    sizes = [target.bytes for target in targets]
    return {"bytes": sum(sizes), "largest_bytes": max(sizes)}


def converted(action: str, src: Path, dst: Path) -> dict[str, float]:
    """One conversion in a process of its own."""
    command = [sys.executable, "-m", "llmtrain", "convert", action, str(src), str(dst)]
    variables = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    begin = time.perf_counter()
    process = subprocess.Popen(command, env=variables)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return {
        "peak_memory_bytes": float(usage.ru_maxrss * 1024),
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }


def digests(folder: Path) -> dict[str, str]:
    """A hash of the bytes of every tensor."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as data:
            for name, entry in read_header(file).items():
                data.seek(entry.begin)
                found[name] = hash_bytes(data.read(entry.end - entry.begin))
    return found


def main() -> None:
    """Run both conversions and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "convert")
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    work = args.work.resolve()
    subprocess.run(["rm", "-rf", str(work)], check=True)
    size = make(work / "hf", args.layers)
    bound = 1.3 * size["largest_bytes"] + 1e9
    runs: dict[str, Any] = {
        "from-hf": converted("from-hf", work / "hf", work / "ours"),
        "to-hf": converted("to-hf", work / "ours", work / "back"),
    }
    for action, run in runs.items():
        run["of_bound"] = run["peak_memory_bytes"] / bound
        print(
            f"{action}: {run['peak_memory_bytes'] / 1e9:.2f} GB of {bound / 1e9:.2f} allowed, "
            f"{run['seconds']:.0f} s"
        )
    same = digests(work / "hf") == digests(work / "back")
    print(f"back to the byte: {same}")
    subprocess.run(["rm", "-rf", str(work)], check=True)
    result = {**size, "bound_bytes": bound, "runs": runs, "byte_equal": same}
    print(f"recorded in {write_result('convert', result, out=args.out)}")


if __name__ == "__main__":
    main()
