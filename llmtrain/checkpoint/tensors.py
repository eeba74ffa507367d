"""Stored tensors as torch's: dtypes, bytes, boxes and whole ones, by one process alone.

Nothing here loads torch.distributed.checkpoint, which takes longer than a small merge.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from llmtrain.checkpoint.layout import TensorLayout, entry_name
from llmtrain.checkpoint.safefile import BLOCK_BYTES, ITEMSIZE, Entry, read_header, read_into
from llmtrain.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype, key: str) -> str:
    """safetensors' name of a dtype; CheckpointError naming the tensor when it has none."""
    if dtype not in _NAMES:
        raise CheckpointError(f"tensor {key} has dtype {dtype}, which checkpoints cannot hold")
    return _NAMES[dtype]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The row-major bytes of a tensor on the host; copies only when it must."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def read_box(
    descriptor: int, entry: Entry, offset: Sequence[int], target: torch.Tensor, path: Path
) -> None:
    """Fill ``target`` with the box of the stored tensor that begins at ``offset``.

    The rows (first dimension) the box needs are read in blocks and cut to size.
    """
    dtype = DTYPES[entry.dtype]
    if target.numel() == 0:
        return
    if not entry.shape:
        scalar = torch.empty((), dtype=dtype)
        read_into(descriptor, _writable(scalar), entry.begin, path)
        target.copy_(scalar)
        return
    row_shape = entry.shape[1:]
    row_bytes = math.prod(row_shape) * ITEMSIZE[entry.dtype]
    whole_rows = tuple(target.shape[1:]) == row_shape
    direct = (
        whole_rows
        and target.is_contiguous()
        and target.dtype == dtype
        and target.device.type == "cpu"
    )
    start = entry.begin + offset[0] * row_bytes
    if direct:
        read_into(descriptor, _writable(target), start, path)
        return
    rows = max(1, BLOCK_BYTES // row_bytes)
    block = torch.empty((min(rows, target.shape[0]), *row_shape), dtype=dtype)
    for first in range(0, target.shape[0], rows):
        part = block[: min(rows, target.shape[0] - first)]
        read_into(descriptor, _writable(part), start + first * row_bytes, path)
        for axis, begin in enumerate(offset[1:], 1):
            part = part.narrow(axis, begin, target.shape[axis])
        target[first : first + part.shape[0]].copy_(part)


def _writable(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_tensor(path: Path, key: str, layout: TensorLayout) -> torch.Tensor:
    """One whole stored tensor, put together from its chunks."""
    whole = torch.empty(layout.shape, dtype=DTYPES[layout.dtype])
    for chunk in layout.chunks:
        file = path / chunk.file
        name = entry_name(key, chunk.offset, chunk.shape, layout.shape)
        entry = read_header(file)[name]
        box = whole
        for axis, (begin, length) in enumerate(zip(chunk.offset, chunk.shape, strict=True)):
            box = box.narrow(axis, begin, length)
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            read_box(descriptor, entry, [0] * len(chunk.shape), box, file)
        finally:
            os.close(descriptor)
    return whole
