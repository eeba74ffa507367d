"""Reading checkpoints into the tensors of a run, the work shared by the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.finding import find
from llmtrain.checkpoint.layout import TensorLayout
from llmtrain.checkpoint.storage import SafetensorsReader
from llmtrain.checkpoint.tensors import DTYPES
from llmtrain.errors import CheckpointError

_NAMED = 5
_SAME_MODEL = "resume with the model and optimizer it was saved with (see its config.yaml)"


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
