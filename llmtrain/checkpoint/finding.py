"""Which checkpoint a path means, and whether it is good: the work shared by the ranks."""

from __future__ import annotations

from pathlib import Path

from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.layout import META, checkpoints_folder, known_files, parse_step, scan
from llmtrain.checkpoint.verify import cheap_problems, checksum_problems, needed_files
from llmtrain.errors import CheckpointError


def examine(ranks: Ranks, path: Path, prefix: str = "") -> list[str]:
    """``verify`` with every file read by one rank only; the same answer on all ranks.

    prefix: look only at what a reader of the tensors of such names reads.
    """

    def shares() -> tuple[list[str], list[list[str]]]:
        problems = cheap_problems(path, prefix)
        if problems:
            return problems, []
        parts: list[list[str]] = [[] for _ in range(ranks.size)]
        loads = [0] * ranks.size
        sums = known_files(path)
        needed = {name: sums[name].bytes for name in needed_files(path, prefix)}
        for name in sorted(needed, key=lambda n: (-needed[n], n)):
            least = loads.index(min(loads))
            parts[least].append(name)
            loads[least] += needed[name]
        return [], parts

    problems, parts = ranks.on_main(shares)
    if problems:
        return problems
    return ranks.reduce(
        lambda: checksum_problems(path, parts[ranks.rank]),
        lambda found: [text for part in found for text in part],
    )


def newest_good(ranks: Ranks, root: Path, prefix: str = "") -> tuple[Path | None, list[str]]:
    """The newest checkpoint under ``root`` with nothing wrong, and the fault of each newer one."""
    skipped: list[str] = []
    for checkpoint in reversed(ranks.on_main(lambda: scan(root))):
        problems = examine(ranks, checkpoint.path, prefix)
        if not problems:
            return checkpoint.path, skipped
        skipped.append(problems[0])
    return None, skipped


def find(ranks: Ranks, path: Path, prefix: str = "") -> tuple[Path, list[str]]:
    """The verified checkpoint a user's path means: itself, or the newest good one of a run.

    prefix: of the tensors that will be read, and so verified; "" for all of them. Returned
    besides: the fault of each newer one passed over. Raises CheckpointError naming what is
    damaged or missing.
    """

    def is_checkpoint() -> bool:
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a folder; give a checkpoint or a run's folder")
        return parse_step(path.name) is not None or (path / META).exists()

    if ranks.on_main(is_checkpoint):
        require_good(ranks, path, prefix)
        return path, []
    good, skipped = newest_good(ranks, checkpoints_folder(path), prefix)
    if good is None:
        because = f": {skipped[0]}" if skipped else ranks.on_main(lambda: foreign(path))
        raise CheckpointError(f"{path} holds no checkpoint that can be used{because}")
    return good, skipped


def foreign(path: Path) -> str:
    """What to do with a folder in the format of peft or transformers; "" for any other."""
    what = ""
    if (path / "adapter_config.json").exists():
        what, way = "an adapter of peft", "from-peft"
    elif any(path.glob("*.safetensors")):
        what, way = "a Hugging Face folder", "from-hf"
    return what and f"; it is {what}: make a checkpoint of it with `llmtrain convert {way}`"


def require_good(ranks: Ranks, path: Path, prefix: str = "") -> None:
    """Raise CheckpointError naming the damaged file of a checkpoint and what to use instead."""
    problems = examine(ranks, path, prefix)
    if problems:
        raise CheckpointError(f"{problems[0]}; {ranks.on_main(lambda: advice(path, prefix))}")


def advice(path: Path, prefix: str = "") -> str:
    """What to do about a damaged checkpoint; prefix: of the tensors wanted from it."""
    step = parse_step(path.name)
    earlier = [
        c for c in scan(path.parent) if c.problem is None and step is not None and c.step < step
    ]
    if not earlier:
        return "there is no earlier checkpoint of this run to fall back on"
    if prefix:
        return f"an earlier one is {earlier[-1].path}"
    return (
        f"set checkpoint.resume={earlier[-1].path}, or delete {path} and checkpoint.resume=auto "
        "goes on from the earlier one"
    )
