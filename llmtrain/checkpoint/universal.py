"""Checkpoints as DeepSpeed's *universal* ones, and back.

A universal checkpoint is what ``python -m deepspeed.checkpoint.ds_to_universal`` makes and what
``"checkpoint": {"load_universal": true}`` loads under any ZeRO stage and number of ranks::

    DST/latest_universal                        the name of the folder below
    DST/step-00000100/
      zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt    whole tensors, float32
      zero/optimizer_state.pt                   the step count again
      {mp,zero_pp_rank_0_mp}_rank_00_model_states.pt        counters
      llmtrain/                                 config.yaml, tensors.json, ... for the way back

The .pt files are pickles, the one format DeepSpeed reads: they are written from plain tensors and
numbers only, and read with ``weights_only=True``. DeepSpeed is not needed for either.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Shard

from llmtrain.checkpoint.checkpointer import Checkpointer
from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.finding import find
from llmtrain.checkpoint.layout import BASE, META, TENSORS, TensorLayout, parse_step, read_layout
from llmtrain.checkpoint.store import explain
from llmtrain.checkpoint.tensors import DTYPES, read_tensor
from llmtrain.checkpoint.verify import read_files
from llmtrain.config import load_config
from llmtrain.config.upkeep import CheckpointConfig
from llmtrain.errors import CheckpointError
from llmtrain.model import Decoder, resolve_model, tensor_placements

LATEST = "latest_universal"
OURS = "llmtrain"
# The version whose files these are, which DeepSpeed asks for when it loads.
_DS_VERSION = "0.19.8"
_STATES = ("exp_avg", "exp_avg_sq")


def to_deepspeed(source: Path, dst: Path) -> Path:
    """Write a checkpoint (or a run's newest good one) as a universal checkpoint.

    dst: a new folder; it appears by one rename, complete. At most one tensor is in memory.
    Returns the folder of the step. Raises CheckpointError naming what is wrong.
    """
    path = find(Ranks(None), Path(source))[0]
    layout, files = read_layout(path), read_files(path)
    if BASE in files:
        raise CheckpointError(
            f"{path} leaves out the frozen weights, which a universal checkpoint must hold; a run "
            "with parallel.engine=deepspeed resumes from it directly"
        )
    names = [key.removeprefix("model.") for key in layout if key.startswith("model.")]
    row_parallel = _split_along_columns(path, files)
    dst = Path(dst)
    temporary = dst.parent / f".tmp-{dst.name}-{secrets.token_hex(4)}"
    with explain(f"{dst} cannot be written"):
        if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
            raise CheckpointError(f"{dst} exists and is not empty; choose another folder")
        folder = temporary / path.name
        (folder / "zero").mkdir(parents=True)
        try:
            step = torch.zeros(())
            for name in names:
                extra = {"cat_dim": 1} if name in row_parallel else {}
                step = _write_parameter(path, layout, name, folder / "zero" / name, extra)
            _write_counters(folder, step, len(names), json.loads(files[META]))
            _write_ours(folder / OURS, files, (path / TENSORS).read_bytes())
            (temporary / LATEST).write_text(folder.name)
            temporary.rename(dst)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return dst / folder.name


def _split_along_columns(path: Path, files: Mapping[str, bytes]) -> set[str]:
    """Parameters that tensor parallelism splits along dimension 1; DeepSpeed assumes 0."""
    cfg = load_config(path / "config.yaml")
    vocab = int(json.loads(files["data.json"])["vocab_size"])
    with torch.device("meta"):
        model = Decoder(resolve_model(cfg, vocab))
    places = tensor_placements(model)
    return {n for n, place in places.items() if isinstance(place, Shard) and place.dim == 1}


def _write_parameter(
    path: Path, layout: Mapping[str, TensorLayout], name: str, folder: Path, extra: dict[str, int]
) -> Tensor:
    """Write the files of one parameter; returns the optimizer's step count."""
    folder.mkdir()
    keys = {"fp32": f"model.{name}", **{s: f"optim.{name}.{s}" for s in _STATES}}
    for state, key in keys.items():
        if key in layout:
            value = {"param": read_tensor(path, key, layout[key]), **extra}
            torch.save(value, folder / f"{state}.pt")
    key = f"optim.{name}.step"
    step = read_tensor(path, key, layout[key]) if key in layout else torch.zeros(())
    torch.save(step, folder / "step.pt")
    return step


def _write_counters(folder: Path, step: Tensor, groups: int, meta: Mapping[str, Any]) -> None:
    # Hyperparameters stay the reader's own: DeepSpeed copies what a group holds here over them.
    # ZeRO 1 and 2 want a group here for each of theirs, of which there are at most ``groups``.
    empty: list[dict[str, Any]] = [{"params": []} for _ in range(groups)]
    state = {
        "ds_version": _DS_VERSION,
        "param_groups": empty,
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": empty[:1]},
    }
    torch.save(state, folder / "zero" / "optimizer_state.pt")
    counters: dict[str, Any] = {
        "module": {},
        "optimizer": None,
        "lr_scheduler": None,
        "global_steps": int(meta["step"]),
        "global_samples": int(meta["samples"]),
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": _DS_VERSION,
    }
    for name in ("mp_rank_00", "zero_pp_rank_0_mp_rank_00"):
        torch.save(counters, folder / f"{name}_model_states.pt")


def _write_ours(folder: Path, files: Mapping[str, bytes], tensors: bytes) -> None:
    folder.mkdir()
    for name, data in {**files, TENSORS: tensors}.items():
        (folder / name).write_bytes(data)


def from_deepspeed(
    source: Path, run: Path, *, like: Path | None = None, step: int | None = None
) -> Path:
    """Turn a universal checkpoint into one of ours, in the folder of a run.

    source: the folder that holds ``latest_universal``, or that of a step. run: a run's folder,
    made if need be; the checkpoint lands in its ``checkpoints``. like: a checkpoint (or run) of
    ours with the same model, for config, data plan and shapes; not needed for what
    ``to_deepspeed`` wrote. step: updates made, where the files do not say. Tensors are mapped
    from the files, not read into memory first. Raises CheckpointError naming what does not fit.
    """
    folder = _step_folder(Path(source))
    model = find(Ranks(None), Path(like))[0] if like is not None else folder / OURS
    if not (model / TENSORS).exists():
        raise CheckpointError(
            f"{folder} was not written by llmtrain: give a checkpoint of a run with the same "
            "model as --like, for its config and data plan"
        )
    layout = read_layout(model)
    _check_names(folder, layout)
    reader = _Reader(folder / "zero", step)
    tensors = {key: reader.tensor(key, entry) for key, entry in layout.items()}
    files = {
        name: (model / name).read_bytes()
        for name in ("config.yaml", "data.json", "extra.json", "tokenizer.json")
        if (model / name).exists()
    }
    cfg = load_config(model / "config.yaml")
    updates = reader.step(next(iter(layout)))
    samples = updates * cfg.train.global_batch_size
    meta = {"samples": samples, "tokens": samples * cfg.data.seq_len, "origin": None}
    root = Path(run) / "checkpoints"
    with Checkpointer(root, CheckpointConfig(asynchronous=False)) as checkpointer:
        checkpointer.save(updates, tensors, files, meta=meta, permanent=True)
        saved = checkpointer.wait()
    assert saved is not None
    return saved.path


def _step_folder(source: Path) -> Path:
    folder = source
    if (source / LATEST).is_file():
        folder = source / (source / LATEST).read_text().strip()
    if not (folder / "zero").is_dir():
        raise CheckpointError(
            f"{source} is not a universal checkpoint (no {LATEST}, no zero/); make one with "
            "python -m deepspeed.checkpoint.ds_to_universal"
        )
    return folder


def _check_names(folder: Path, layout: Mapping[str, TensorLayout]) -> None:
    wanted = {key.removeprefix("model.") for key in layout if key.startswith("model.")}
    present = {p.name for p in (folder / "zero").iterdir() if p.is_dir()}
    for names, what in ((wanted - present, "lacks"), (present - wanted, "holds unknown")):
        if names:
            raise CheckpointError(
                f"{folder} {what} parameters: {', '.join(sorted(names)[:5])}; it is of another "
                "model"
            )


class _Foreign:
    """Stands in for DeepSpeed's own objects in a file (loss scalers and the like)."""

    def __init__(self, *args: Any) -> None:
        pass


class _Reader:
    """Reads the files of a universal checkpoint. given: the step count, or None."""

    def __init__(self, zero: Path, given: int | None) -> None:
        self.zero, self._step = zero, given

    def tensor(self, key: str, entry: TensorLayout) -> Tensor:
        """The tensor that is named ``key`` in a checkpoint of ours, in its shape and dtype."""
        group, _, rest = key.partition(".")
        name, state = (rest, "fp32") if group == "model" else rest.rsplit(".", 1)
        dtype = DTYPES[entry.dtype]
        if state == "step":
            return torch.tensor(float(self.step(key)), dtype=dtype)
        path = self.zero / name / f"{state}.pt"
        value = self._load(path)
        value = value["param"] if isinstance(value, dict) else value
        # ZeRO 3 checkpoints are merged flat.
        if value.numel() != torch.Size(entry.shape).numel():
            raise CheckpointError(
                f"{path} holds {value.numel()} values where {list(entry.shape)} is wanted; "
                "it is of another model"
            )
        out: Tensor = value.reshape(entry.shape).to(dtype)
        return out

    def step(self, key: str) -> int:
        """Updates made: as given, of the parameter that ``key`` belongs to, or of the optimizer."""
        if self._step is None:
            self._step = self._find_step(key)
        return self._step

    def _find_step(self, key: str) -> int:
        name = key.partition(".")[2]
        for path in (self.zero / name / "step.pt", self.zero / "optimizer_state.pt"):
            if not path.is_file():
                continue
            value = self._load(path)
            if isinstance(value, dict):
                states: dict[Any, Any] = value.get("optimizer_state_dict", {}).get("state", {})
                first: dict[str, Any] = next(iter(states.values()), {})
                value = first.get("step")
            if value is not None and float(value) > 0:
                return int(value)
        number = parse_step(self.zero.parent.name)
        if number is None:
            raise CheckpointError(f"{self.zero.parent} does not say its step; give it as --step")
        return number

    def _load(self, path: Path) -> Any:
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
            stands: list[Any] = [(_Foreign, n) for n in names if n.startswith("deepspeed.")]
            with torch.serialization.safe_globals(stands):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing") from error
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise CheckpointError(f"{path} cannot be read: {reason}") from error
