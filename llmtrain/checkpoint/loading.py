"""Finding, verifying and reading checkpoints, the work shared by the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.layout import (
    META,
    TensorLayout,
    checkpoints_folder,
    known_files,
    parse_step,
    scan,
)
from llmtrain.checkpoint.storage import DTYPES, SafetensorsReader
from llmtrain.checkpoint.verify import cheap_problems, checksum_problems, needed_files
from llmtrain.errors import CheckpointError

_NAMED = 5
_SAME_MODEL = "resume with the model and optimizer it was saved with (see its config.yaml)"


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


def load_checkpoint(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    group: dist.ProcessGroup | None = None,
    *,
    unused: Sequence[str] = (),
    cast: bool = False,
    verify: bool = True,
) -> Path:
    """``Checkpointer.load`` for readers that write nothing (evaluation, generation, branching).

    path: a checkpoint, or a run whose newest good one is taken; returned is the checkpoint. It
    takes no lock, so a run that is still training may be read. group: a gloo group over all
    ranks, None for this process alone. Raises CheckpointError.
    """
    ranks = Ranks(group)
    found = find(ranks, Path(path))[0] if verify else Path(path)
    load_into(ranks, found, tensors, unused, cast)
    return found


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


def load_into(
    ranks: Ranks,
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    unused: Sequence[str],
    cast: bool,
) -> None:
    """Fill ``tensors`` in place from a checkpoint; see ``Checkpointer.load``."""
    reader = SafetensorsReader(path)
    keys = ranks.reduce(lambda: list(tensors), lambda lists: {k for part in lists for k in part})

    def read() -> None:
        metadata = reader.read_metadata()
        check_match(path, reader.tensors, tensors, cast)
        unexpected = [
            key for key in reader.tensors if key not in keys and not key.startswith(tuple(unused))
        ]
        if unexpected:
            raise CheckpointError(
                f"{path} holds tensors this run has not: {_names(unexpected)}; {_SAME_MODEL}"
            )
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        state = {key: value.detach() for key, value in tensors.items()}
        planner.set_up_planner(state, metadata, ranks.is_main)
        plan = planner.finish_plan(planner.create_local_plan())
        reader.read_data(plan, planner).wait()

    ranks.reduce(read, lambda _: None)


def check_match(
    path: Path,
    stored: Mapping[str, TensorLayout],
    tensors: Mapping[str, torch.Tensor],
    cast: bool,
) -> None:
    """Raise CheckpointError naming tensors that are missing, or of another shape or dtype."""
    missing = [key for key in tensors if key not in stored]
    if missing:
        raise CheckpointError(
            f"{path} lacks tensors this run needs: {_names(missing)}; {_SAME_MODEL}"
        )
    wrong = [
        f"{key} (stored {list(stored[key].shape)}, wanted {list(value.shape)})"
        for key, value in tensors.items()
        if tuple(value.shape) != stored[key].shape
    ]
    if wrong:
        raise CheckpointError(f"{path} holds other shapes: {_names(wrong)}; {_SAME_MODEL}")
    other = [
        f"{key} (stored {DTYPES[stored[key].dtype]}, wanted {value.dtype})"
        for key, value in tensors.items()
        if value.dtype != DTYPES[stored[key].dtype]
    ]
    if other and not cast:
        raise CheckpointError(f"{path} holds other dtypes: {_names(other)}; {_SAME_MODEL}")


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
