"""A model folder as ``transformers`` saves it: config.json and safetensors, sharded or not."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.checkpoint.layout import read_json
from llmtrain.checkpoint.safefile import Entry, read_header
from llmtrain.checkpoint.tensors import DTYPES, read_box
from llmtrain.errors import CheckpointError

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Files that belong to tokenizer and generation, and go along with the weights.
CARRIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json", "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class ModelFolder:
    """An opened folder. entries: tensor -> (file, its place there)."""

    path: Path
    config: dict[str, Any]
    entries: dict[str, tuple[Path, Entry]]

    def files(self) -> dict[str, bytes]:
        """The small files that go along."""
        present = (self.path / name for name in CARRIED)
        return {path.name: path.read_bytes() for path in present if path.is_file()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; CheckpointError when it is missing."""
        if name not in self.entries:
            raise CheckpointError(
                f"{self.path} has no tensor {name}, which its {CONFIG} calls for; the download "
                "may be incomplete"
            )
        return self.entries[name][1].shape

    def dtype(self) -> torch.dtype:
        """The dtype most of the weights' bytes have."""
        sizes: dict[str, int] = {}
        for _, entry in self.entries.values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.end - entry.begin
        return DTYPES[max(sizes, key=lambda kind: sizes[kind])]

    def read(self, name: str, first: int = 0, n_rows: int | None = None) -> Tensor:
        """A tensor, or so many of its rows, in the dtype it is stored in."""
        self.shape(name)
        file, entry = self.entries[name]
        if entry.dtype not in FLOATS:
            raise CheckpointError(
                f"{file}: {name} is stored as {entry.dtype}, a quantised format; convert from the "
                "original weights"
            )
        shape = entry.shape if n_rows is None else (n_rows, *entry.shape[1:])
        out = torch.empty(shape, dtype=DTYPES[entry.dtype])
        with _opened(file) as descriptor:
            read_box(descriptor, entry, [first, *[0] * (len(shape) - 1)][: len(shape)], out, file)
        return out


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_folder(path: Path) -> ModelFolder:
    """Open a folder. Raises CheckpointError naming what is missing or damaged."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; give the folder that holds {CONFIG}")
    if not (path / CONFIG).exists():
        raise CheckpointError(f"{path} has no {CONFIG}; give a folder as transformers saves it")
    config = read_json(path / CONFIG)
    if "quantization_config" in config:
        raise CheckpointError(
            f"{path / CONFIG} says the weights are quantised (quantization_config); convert from "
            "the original weights"
        )
    entries = {}
    for file in _weight_files(path):
        for name, entry in read_header(file).items():
            entries[name] = (file, entry)
    return ModelFolder(path, config, entries)


def _weight_files(path: Path) -> list[Path]:
    if (path / INDEX).exists():
        names = {str(name) for name in read_json(path / INDEX).get("weight_map", {}).values()}
        outside = [name for name in names if Path(name).name != name]
        if outside or not names:
            raise CheckpointError(f"{path / INDEX} is damaged: it names no files of this folder")
        missing = sorted(name for name in names if not (path / name).exists())
        if missing:
            raise CheckpointError(
                f"{path / missing[0]} is missing ({len(missing)} of {len(names)} shards that "
                f"{INDEX} names); download it again"
            )
        return [path / name for name in sorted(names)]
    if (path / SINGLE).exists():
        return [path / SINGLE]
    others = sorted(p.name for p in path.glob("*.bin")) + sorted(p.name for p in path.glob("*.pt"))
    if others:
        raise CheckpointError(
            f"{path} holds {others[0]}, a pickle that is not opened here; save it as safetensors "
            "with transformers: model.save_pretrained(folder)"
        )
    raise CheckpointError(f"{path} holds neither {SINGLE} nor {INDEX}")


def write_index(places: dict[str, str], total_bytes: int) -> bytes:
    """Content of the index of a sharded model: tensor -> file."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": places}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
