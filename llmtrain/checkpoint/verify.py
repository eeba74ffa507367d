"""Is a checkpoint whole? Sizes, checksums, and every element of every tensor exactly once."""

from __future__ import annotations

import math
import os
from bisect import insort
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llmtrain.checkpoint.layout import (
    TENSORS,
    TensorLayout,
    entry_name,
    known_files,
    read_checksums,
    read_layout,
    size_problems,
)
from llmtrain.checkpoint.safefile import hash_bytes, hash_file, read_header
from llmtrain.errors import CheckpointError

_READERS = 4


def verify(path: Path) -> list[str]:
    """All that is wrong with a checkpoint folder, one sentence each; empty when it is good.

    Reads every byte, also of the base that it refers to. Torch is not needed.
    """
    problems = cheap_problems(path)
    if problems:
        return problems
    return checksum_problems(path, sorted(known_files(path)))


def read_files(path: Path) -> dict[str, bytes]:
    """The small files of a checkpoint by name (meta.json, config.yaml, ...), each verified.

    Raises CheckpointError naming a file that is missing or damaged.
    """
    contents = {}
    for name, entry in read_checksums(path).items():
        if name.endswith(".safetensors") or name == TENSORS:
            continue
        try:
            contents[name] = (path / name).read_bytes()
        except FileNotFoundError as error:
            raise CheckpointError(f"{path / name} is missing") from error
        except OSError as error:
            raise CheckpointError(f"{path / name} cannot be read: {error.strerror}") from error
        if hash_bytes(contents[name]) != entry.digest:
            raise CheckpointError(f"{path / name} is damaged: its checksum is not the recorded one")
    return contents


def cheap_problems(path: Path, prefix: str = "") -> list[str]:
    """What can be said without reading the data: files, sizes, headers, cover of each tensor.

    prefix: look only at what a reader of the tensors of such names reads.
    """
    try:
        sums = known_files(path)
        problems = size_problems(path, {n: sums[n] for n in needed_files(path, prefix)})
        tensors = read_layout(path) if not problems else {}
        return problems or layout_problems(
            path, {key: layout for key, layout in tensors.items() if key.startswith(prefix)}
        )
    except CheckpointError as error:
        return [str(error)]


def needed_files(path: Path, prefix: str) -> list[str]:
    """The files of a checkpoint without those that hold only tensors not named ``prefix*``.

    So that a model can be read whose optimizer is damaged or was deleted. Those of its base come by
    their whole paths. Raises CheckpointError.
    """
    names = set(known_files(path))
    if prefix and TENSORS in names:
        files: dict[bool, set[str]] = {True: set(), False: set()}
        for key, layout in read_layout(path).items():
            files[key.startswith(prefix)].update(chunk.file for chunk in layout.chunks)
        names -= files[False] - files[True]
    return sorted(names)


def checksum_problems(path: Path, names: Sequence[str]) -> list[str]:
    """The files among ``names`` whose bytes are not those that were written."""
    sums = known_files(path)

    def problem(name: str) -> str | None:
        try:
            good = hash_file(path / name) == sums[name].digest
        except OSError as error:
            return f"{path / name} cannot be read: {error.strerror or error}"
        return None if good else f"{path / name} is damaged: its checksum is not the recorded one"

    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as pool:
        return [text for text in pool.map(problem, names) if text is not None]


def layout_problems(path: Path, tensors: dict[str, TensorLayout]) -> list[str]:
    """Tensors whose chunks do not tile them, or that the files' own headers contradict."""
    problems = []
    headers = {
        file: read_header(path / file)
        for file in sorted({chunk.file for layout in tensors.values() for chunk in layout.chunks})
    }
    for key, layout in tensors.items():
        fault = cover_fault(layout)
        if fault is not None:
            problems.append(f"{path}: tensor {key} {fault}")
        for chunk in layout.chunks:
            name = entry_name(key, chunk.offset, chunk.shape, layout.shape)
            entry = headers[chunk.file].get(name)
            if entry is None or (entry.dtype, entry.shape) != (layout.dtype, chunk.shape):
                problems.append(f"{path / chunk.file} does not hold {name} as tensors.json says")
    return problems


def cover_fault(layout: TensorLayout) -> str | None:
    """Why the chunks do not cover the tensor exactly once; None when they do.

    Boxes inside the tensor that do not overlap and whose volumes sum to the tensor's tile it.
    Overlaps are found by a sweep along the longest axis, O(n log n) for n chunks.
    """
    rank = len(layout.shape)
    for chunk in layout.chunks:
        if len(chunk.offset) != rank or len(chunk.shape) != rank:
            return f"has a chunk of {len(chunk.shape)} dimensions instead of {rank}"
        if any(
            offset < 0 or length < 0 or offset + length > size
            for offset, length, size in zip(chunk.offset, chunk.shape, layout.shape, strict=True)
        ):
            return f"has a chunk outside of it (at {list(chunk.offset)})"
    volume = sum(math.prod(chunk.shape) for chunk in layout.chunks)
    if volume != math.prod(layout.shape):
        return f"has {volume} stored elements instead of {math.prod(layout.shape)}"
    boxes = [(c.offset, c.shape) for c in layout.chunks if math.prod(c.shape)]
    if len(boxes) < 2:
        return None
    axis = max(range(rank), key=lambda d: layout.shape[d])
    active: list[tuple[int, int]] = []
    for i in sorted(range(len(boxes)), key=lambda i: boxes[i][0][axis]):
        start = boxes[i][0][axis]
        while active and active[0][0] <= start:
            active.pop(0)
        for _, j in active:
            if _overlap(boxes[i], boxes[j]):
                return f"has overlapping chunks at {list(boxes[i][0])} and {list(boxes[j][0])}"
        insort(active, (start + boxes[i][1][axis], i))
    return None


def _overlap(
    a: tuple[tuple[int, ...], tuple[int, ...]], b: tuple[tuple[int, ...], tuple[int, ...]]
) -> bool:
    return all(ao < bo + bn and bo < ao + an for ao, an, bo, bn in zip(*a, *b, strict=True))
