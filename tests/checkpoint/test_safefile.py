"""The safetensors writer and reader against the safetensors package and brute force."""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

from llmtrain.checkpoint.layout import Chunk, TensorLayout
from llmtrain.checkpoint.safefile import (
    BLOCK_BYTES,
    HashingFile,
    build_header,
    hash_file,
    read_header,
)
from llmtrain.checkpoint.tensors import DTYPES, read_box, tensor_bytes
from llmtrain.checkpoint.verify import cover_fault
from llmtrain.errors import CheckpointError


def every_dtype() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        raw = torch.randint(0, 2, (3, 5, dtype.itemsize), generator=generator, dtype=torch.uint8)
        tensors[name] = raw.view(dtype).squeeze(-1)
    return tensors | {"scalar": torch.tensor(-7, dtype=torch.int64), "none": torch.zeros(0, 3)}


def names_of(tensors: dict[str, torch.Tensor]) -> list[tuple[str, str, tuple[int, ...]]]:
    short = {dtype: name for name, dtype in DTYPES.items()}
    return [(name, short[t.dtype], tuple(t.shape)) for name, t in tensors.items()]


def test_the_package_reads_what_we_write(tmp_path: Path) -> None:
    tensors = every_dtype()
    header, entries = build_header(names_of(tensors), {"format": "pt"})
    assert len(header) % 8 == 0
    file = HashingFile(tmp_path / "a.safetensors")
    file.write(header)
    for tensor in tensors.values():
        file.write(tensor_bytes(tensor))
    done = file.finish()
    data = (tmp_path / "a.safetensors").read_bytes()
    assert (done.bytes, done.digest) == (len(data), xxhash.xxh3_64(data).hexdigest())
    assert hash_file(tmp_path / "a.safetensors") == done.digest
    with safe_open(tmp_path / "a.safetensors", framework="pt") as other:
        assert other.metadata() == {"format": "pt"}
        assert set(other.keys()) == set(tensors)
        for name, tensor in tensors.items():
            got = other.get_tensor(name)
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
            assert bytes(tensor_bytes(got)) == bytes(tensor_bytes(tensor))
    assert read_header(tmp_path / "a.safetensors") == {entry.name: entry for entry in entries}


def test_we_read_what_the_package_writes(tmp_path: Path) -> None:
    tensors = every_dtype()
    path = tmp_path / "b.safetensors"
    save_file(tensors, path, {"note": "x"})
    entries = read_header(path)
    assert set(entries) == set(tensors)
    descriptor = os.open(path, os.O_RDONLY)
    for name, tensor in tensors.items():
        target = torch.ones_like(tensor, dtype=tensor.dtype)
        read_box(descriptor, entries[name], [0] * tensor.ndim, target, path)
        assert bytes(tensor_bytes(target)) == bytes(tensor_bytes(tensor)), name
    os.close(descriptor)


@pytest.mark.parametrize("block", [1, 40, BLOCK_BYTES])
def test_boxes_are_cut_out_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Any sub-box into any destination (strided, other dtype), with blocks of one row or many."""
    monkeypatch.setattr("llmtrain.checkpoint.tensors.BLOCK_BYTES", block)
    whole = torch.arange(5 * 4 * 3, dtype=torch.float32).reshape(5, 4, 3)
    path = tmp_path / "c.safetensors"
    save_file({"t": whole}, path)
    entry = read_header(path)["t"]
    descriptor = os.open(path, os.O_RDONLY)
    choices = [[(o, n) for o in range(s) for n in range(1, s - o + 1)] for s in whole.shape]
    for (a, na), (b, nb), (c, nc) in random.Random(1).sample(
        list(itertools.product(*choices)), 200
    ):
        want = whole[a : a + na, b : b + nb, c : c + nc]
        for target in (
            torch.full((na, nb, nc), -1.0),
            torch.full((nc, nb, na), -1.0).permute(2, 1, 0),
            torch.full((na, nb, nc), -1, dtype=torch.int64),
        ):
            read_box(descriptor, entry, (a, b, c), target, path)
            assert torch.equal(target.float(), want)
    os.close(descriptor)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_file_cut_short_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "d.safetensors"
    save_file({"t": torch.ones(30)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"d\.safetensors (is|has)"):
        read_header(path)


def test_other_rubbish_is_named(tmp_path: Path) -> None:
    for text in (
        b"[1]",
        b'{"t": 1}',
        b'{"t": {"dtype": "F99", "shape": [], "data_offsets": [0,0]}}',
        b'{"t": {"dtype": "F32", "shape": [1e999], "data_offsets": [0,0]}}',
        b"[" * 100_000,
    ):
        path = tmp_path / "e.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(CheckpointError, match=r"e\.safetensors has a damaged"):
            read_header(path)
    with pytest.raises(CheckpointError, match=r"absent\.safetensors cannot be read"):
        read_header(tmp_path / "absent.safetensors")


def brute_force_tiles(layout: TensorLayout) -> bool:
    count = np.zeros(layout.shape, dtype=int)
    for chunk in layout.chunks:
        for offset, length, size in zip(chunk.offset, chunk.shape, layout.shape, strict=True):
            if offset + length > size:
                return False
        count[tuple(slice(o, o + n) for o, n in zip(chunk.offset, chunk.shape, strict=True))] += 1
    return bool((count == 1).all())


def test_cover_check_against_counting_every_element() -> None:
    """Random guillotine tilings, and each of them with one box moved, dropped or doubled."""
    rng = random.Random(3)
    verdicts = []
    for _ in range(400):
        shape = tuple(rng.randint(1, 5) for _ in range(rng.randint(0, 3)))
        boxes = [((0,) * len(shape), shape)]
        for _ in range(rng.randint(0, 6)):
            offset, size = boxes.pop(rng.randrange(len(boxes)))
            axes = [d for d, n in enumerate(size) if n > 1]
            if not axes:
                boxes.append((offset, size))
                continue
            axis = rng.choice(axes)
            cut = rng.randint(1, size[axis] - 1)
            first = tuple(cut if d == axis else n for d, n in enumerate(size))
            rest = tuple(n - cut if d == axis else n for d, n in enumerate(size))
            moved = tuple(o + cut if d == axis else o for d, o in enumerate(offset))
            boxes += [(offset, first), (moved, rest)]
        change = rng.choice(["none", "drop", "double", "move", "swap"])
        if change == "drop":
            boxes.pop(rng.randrange(len(boxes)))
        elif change == "double":
            boxes.append(rng.choice(boxes))
        elif change == "move" and shape:
            offset, size = boxes.pop(rng.randrange(len(boxes)))
            boxes.append((tuple(rng.randint(0, s - 1) for s in shape), size))
        elif change == "swap" and len(boxes) > 1:
            # One box replaced by another of the set: the volumes may still sum up.
            boxes[0] = boxes[1]
        rng.shuffle(boxes)
        layout = TensorLayout("F32", shape, tuple(Chunk(o, n, "f") for o, n in boxes))
        expected = brute_force_tiles(layout)
        assert (cover_fault(layout) is None) == expected, (shape, boxes, cover_fault(layout))
        verdicts.append(expected)
    assert 100 < sum(verdicts) < 300
