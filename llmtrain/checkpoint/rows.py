"""Rows of stored tensors, for readers that take a weight a piece at a time."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from llmtrain.checkpoint.layout import MODEL_PREFIX, entry_name, read_layout
from llmtrain.checkpoint.safefile import Entry, read_header
from llmtrain.checkpoint.tensors import DTYPES, read_box
from llmtrain.errors import CheckpointError


class RowReader:
    """Reads rows of the model's tensors in a checkpoint; nothing is verified here."""

    def __init__(self, path: Path) -> None:
        self._path, self._layout = path, read_layout(path)
        self._headers: dict[str, dict[str, Entry]] = {}

    def __call__(self, name: str, first: int, n: int) -> Tensor:
        """Rows [first, first + n) of the parameter ``name`` in its stored dtype, on the host.

        Raises CheckpointError where the checkpoint has no such parameter.
        """
        key = MODEL_PREFIX + name
        if key not in self._layout:
            raise CheckpointError(f"{self._path} lacks {key}, a weight of this run's model")
        layout = self._layout[key]
        rows = torch.empty(n, *layout.shape[1:], dtype=DTYPES[layout.dtype])
        for chunk in layout.chunks:
            begin = max(first, chunk.offset[0])
            end = min(first + n, chunk.offset[0] + chunk.shape[0])
            if begin >= end:
                continue
            box = rows[begin - first : end - first]
            for axis in range(1, rows.dim()):
                box = box.narrow(axis, chunk.offset[axis], chunk.shape[axis])
            if chunk.file not in self._headers:
                self._headers[chunk.file] = read_header(self._path / chunk.file)
            entry = self._headers[chunk.file][
                entry_name(key, chunk.offset, chunk.shape, layout.shape)
            ]
            place = [begin - chunk.offset[0], *[0] * (rows.dim() - 1)]
            descriptor = os.open(self._path / chunk.file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                read_box(descriptor, entry, place, box, self._path / chunk.file)
            finally:
                os.close(descriptor)
        return rows
