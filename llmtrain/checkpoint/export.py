"""The model alone, as safetensors that any tool reads.

One ``model.safetensors``, or ``model-00001-of-0000N.safetensors`` with the usual
``model.safetensors.index.json`` when it is larger than a shard; names without the ``model.``
prefix, besides them the checkpoint's config.yaml, tokenizer files and meta.json.
"""

from __future__ import annotations

import json
import math
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.finding import find
from llmtrain.checkpoint.layout import META, TensorLayout, read_layout
from llmtrain.checkpoint.safefile import ITEMSIZE, HashingFile, build_header
from llmtrain.checkpoint.store import explain, sync
from llmtrain.checkpoint.tensors import DTYPES, dtype_name, read_tensor, tensor_bytes
from llmtrain.checkpoint.verify import read_files
from llmtrain.errors import CheckpointError
from llmtrain.parallel import whole

COPIED = (
    *("config.yaml", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    META,
)
SHARD_BYTES = 5 << 30


@dataclass(frozen=True)
class _Item:
    """A tensor to export: dtype name, shape, and how to get its values on the host."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    fetch: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


def export_model(
    source: Path | Mapping[str, torch.Tensor],
    dst: Path,
    *,
    files: Mapping[str, bytes] | None = None,
    dtype: torch.dtype | None = None,
    prefix: str = "model.",
    shard_bytes: int = SHARD_BYTES,
    group: dist.ProcessGroup | None = None,
    warn: Callable[[str], None] | None = None,
) -> list[Path]:
    """Write the tensors whose names begin with ``prefix`` to the new folder ``dst``.

    source: a checkpoint (verified first) or a run, whose newest good one is taken, by one process;
    or live tensors, then all ranks of ``group`` call this and the main one writes. warn: is told
    the fault of each newer checkpoint passed over. files: small files to put beside; those of a
    checkpoint are taken by themselves. dtype: cast floating-point
    tensors to it; None keeps them. At most one whole tensor is in memory. ``dst`` appears by one
    rename, complete. Returns the files of tensors. Raises CheckpointError naming what is wrong.
    """
    ranks = Ranks(group if isinstance(source, Mapping) else None)
    if isinstance(source, Mapping):
        items = [_live(k, v, dtype) for k, v in sorted(source.items()) if k.startswith(prefix)]
    else:
        path, skipped = find(ranks, Path(source), prefix)
        for fault in skipped:
            (warn or _ignore)(f"{fault}; {path.name} is exported instead")
        stored = {k: v for k, v in read_layout(path).items() if k.startswith(prefix)}
        items = [_stored(path, k, v, dtype) for k, v in sorted(stored.items())]
        kept = {n: data for n, data in read_files(path).items() if n in COPIED}
        files = {**kept, **(files or {})}
    if not items:
        raise CheckpointError(f"nothing to export: no tensor is named {prefix}*")
    shards = _split(items, shard_bytes)
    dst = Path(dst)
    temporary = dst.parent / f".tmp-{dst.name}-{secrets.token_hex(4)}"
    ranks.on_main(lambda: _prepare(dst, temporary))
    try:
        for index, shard in enumerate(shards):
            _write_shard(ranks, shard, temporary / _shard_name(index, len(shards)), prefix)
        return ranks.on_main(lambda: _finish(shards, temporary, dst, prefix, files or {}))
    except BaseException:
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _ignore(text: str) -> None:
    """Nobody wants to know."""


def _live(key: str, value: torch.Tensor, dtype: torch.dtype | None) -> _Item:
    target = _target(value.dtype, dtype)

    def fetch() -> torch.Tensor:
        return whole(value.detach()).to(target)

    return _Item(key, dtype_name(target, key), tuple(value.shape), fetch)


def _stored(path: Path, key: str, layout: TensorLayout, dtype: torch.dtype | None) -> _Item:
    target = _target(DTYPES[layout.dtype], dtype)
    return _Item(
        key,
        dtype_name(target, key),
        layout.shape,
        lambda: read_tensor(path, key, layout).to(target),
    )


def _target(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own.is_floating_point else own


def _split(items: list[_Item], shard_bytes: int) -> list[list[_Item]]:
    shards: list[list[_Item]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + item.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.bytes
    # Wide dtypes first, so that every tensor is aligned for readers that map the file.
    return [sorted(shard, key=lambda item: -ITEMSIZE[item.dtype]) for shard in shards]


def _shard_name(index: int, count: int) -> str:
    return (
        "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
    )


def _prepare(dst: Path, temporary: Path) -> None:
    with explain(f"{dst} cannot be written"):
        if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
            raise CheckpointError(f"{dst} exists and is not empty; choose another folder")
        temporary.mkdir(parents=True)


def _write_shard(ranks: Ranks, shard: list[_Item], path: Path, prefix: str) -> None:
    """All ranks fetch every tensor together; the main one writes it."""
    files: list[HashingFile] = []

    def begin() -> None:
        names = [(item.name.removeprefix(prefix), item.dtype, item.shape) for item in shard]
        with explain(f"{path} cannot be written"):
            files.append(HashingFile(path))
            files[0].write(build_header(names, {"format": "pt"})[0])

    ranks.on_main(begin)
    try:
        for item in shard:
            ranks.on_main(partial(_append, files, item.fetch()))
        ranks.on_main(lambda: _close(files[0]))
    finally:
        for file in files:
            file.close()


def _append(files: list[HashingFile], value: torch.Tensor) -> None:
    with explain(f"{files[0].path} cannot be written"):
        files[0].write(tensor_bytes(value))


def _close(file: HashingFile) -> None:
    with explain(f"{file.path} cannot be written"):
        file.finish()


def _finish(
    shards: list[list[_Item]],
    temporary: Path,
    dst: Path,
    prefix: str,
    files: Mapping[str, bytes],
) -> list[Path]:
    names = [_shard_name(index, len(shards)) for index in range(len(shards))]
    with explain(f"{dst} cannot be written"):
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(i.bytes for shard in shards for i in shard)},
                "weight_map": {
                    item.name.removeprefix(prefix): name
                    for name, shard in zip(names, shards, strict=True)
                    for item in shard
                },
            }
            (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        for name, data in files.items():
            (temporary / name).write_bytes(data)
        sync(temporary)
        temporary.rename(dst)
        sync(dst.parent)
    return [dst / name for name in names]
