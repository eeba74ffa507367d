"""Merging model folders, tensor by tensor and block by block, into a new folder.

Memory is a few blocks per model whatever the models' size. The result is written under a
temporary name and appears by one rename: complete, or not at all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import llmtrain
from llmtrain.checkpoint.layout import (
    CHECKSUMS,
    META,
    MODEL_PREFIX,
    TENSORS,
    Chunk,
    TensorLayout,
    checksums_text,
    layout_text,
)
from llmtrain.checkpoint.safefile import FileSum, HashingFile, build_header, write_small
from llmtrain.checkpoint.store import new_folder
from llmtrain.checkpoint.tensors import dtype_name, tensor_bytes
from llmtrain.config.dump import to_dict
from llmtrain.errors import CheckpointError
from llmtrain.merge.blocks import Inputs, Workers
from llmtrain.merge.methods import RULES, Rule
from llmtrain.merge.recipe import MergeRecipe
from llmtrain.merge.sources import ADAPTERS, INDEX, Source, check_alike, is_finite, open_source

RECIPE = "merge.yaml"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Small files of a checkpoint that stay true for a merged model.
_KEPT = ("config.yaml", "data.json", "tokenizer.json", META)


@dataclass(frozen=True)
class Merged:
    """A finished merge: its folder, files of tensors, and their size in bytes."""

    path: Path
    files: list[Path]
    bytes: int


@dataclass(frozen=True)
class _Models:
    """The opened inputs; fishers only for the method that needs them."""

    base: Source | None
    models: list[Source]
    fishers: list[Source]

    @property
    def first(self) -> Source:
        """The model whose small files and dtypes the result takes."""
        return self.base or self.models[0]

    @property
    def every(self) -> list[Source]:
        """All of them, the base first."""
        return [*([self.base] if self.base else []), *self.models, *self.fishers]


def merge_models(
    recipe: MergeRecipe,
    out: Path,
    fishers: Sequence[Path] = (),
    warn: Callable[[str], None] | None = None,
) -> Merged:
    """Merge as ``recipe`` says into the new folder ``out``.

    fishers: folders of the models' Fisher information where the recipe does not name them.
    warn: told of each damaged checkpoint of a run in place of which an older one is merged.
    Raises CheckpointError when models do not fit together, are damaged, or ``out`` cannot be
    written; then nothing is left behind.
    """
    models = _open(recipe, fishers)
    if warn is not None:
        for source in models.every:
            source.tell(warn)
        if any(ADAPTERS in name for name in models.first.shapes):
            warn(
                "A and B of adapters are merged each by itself, which is another model than their "
                "products merged; for that, convert to-hf and from-hf each model first"
            )
    with new_folder(out) as temporary, Workers() as workers:
        sums = _write(recipe, models, temporary, workers)
    weights = [s for s in sums if s.name.endswith(".safetensors")]
    return Merged(out, [out / s.name for s in weights], sum(s.bytes for s in weights))


def _open(recipe: MergeRecipe, fishers: Sequence[Path]) -> _Models:
    base = open_source(recipe.base_model) if recipe.base_model else None
    models = [open_source(m.path) for m in recipe.models]
    every = [*([base] if base else []), *models]
    check_alike(every)
    if recipe.align:
        # The decoder's modules, which take longer to load than a small merge.
        from llmtrain.merge.align import moves

        for model in every[1:]:
            model.moves = moves(every[0], model)
    found: list[Source] = []
    if recipe.method == "fisher":
        paths = [m.fisher or str(f) for m, f in zip(recipe.models, fishers, strict=True)]
        found = [open_source(path) for path in paths]
        for model, fisher in zip(models, found, strict=True):
            lacking = [n for n, s in model.shapes.items() if fisher.shapes.get(n) != s]
            if lacking:
                raise CheckpointError(
                    f"{fisher.path} lacks the Fisher information of {lacking[0]} in the shape "
                    f"{model.path} has it; estimate it from that model"
                )
    return _Models(base, models, found)


def _write(recipe: MergeRecipe, models: _Models, folder: Path, workers: Workers) -> list[FileSum]:
    """All files of the result."""
    first = models.first
    names = sorted(first.shapes)
    target = {name: _target(first.dtypes[name], recipe.dtype) for name in names}
    shards = _split([(n, _size(first, n) * target[n].itemsize) for n in names], recipe.shard_bytes)
    prefix = MODEL_PREFIX if first.ours else ""
    sums, tensors, places = [], {}, {}
    rule = RULES[recipe.method](recipe)
    for i, members in enumerate(shards):
        # Wide dtypes first, so that every tensor is aligned for readers that map the file.
        shard = sorted(members, key=lambda name: -target[name].itemsize)
        file = folder / _shard_name(i, len(shards), first.ours)
        wanted = [(n, target[n]) for n in shard]
        sums.append(_write_shard(rule, models, file, wanted, prefix, workers))
        for name in shard:
            shape = first.shapes[name]
            kind = dtype_name(target[name], name)
            chunk = Chunk((0,) * len(shape), shape, file.name)
            tensors[prefix + name] = TensorLayout(kind, shape, (chunk,))
            places[name] = file.name
    small = _small_files(recipe, models)
    if first.ours:
        small[TENSORS] = layout_text(tensors)
    elif len(shards) > 1:
        size = sum(_size(first, n) * target[n].itemsize for n in names)
        index = {"metadata": {"total_size": size}, "weight_map": places}
        small[INDEX] = json.dumps(index, indent=1).encode()
    sums += [write_small(folder / name, data) for name, data in small.items()]
    if first.ours:
        write_small(folder / CHECKSUMS, checksums_text(sums))
    return sums


def _size(source: Source, name: str) -> int:
    return math.prod(source.shapes[name])


def _target(own: torch.dtype, wanted: str | None) -> torch.dtype:
    return _DTYPES[wanted] if wanted is not None and own.is_floating_point else own


def _split(sizes: Iterable[tuple[str, int]], limit: int) -> list[list[str]]:
    """Names in files of at most ``limit`` bytes, a larger tensor in one of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes:
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _shard_name(index: int, count: int, ours: bool) -> str:
    if ours:
        return f"model-{index:05d}-of-{count:05d}.safetensors"
    if count == 1:
        return "model.safetensors"
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _small_files(recipe: MergeRecipe, models: _Models) -> dict[str, bytes]:
    """Files that go with the first model, and the recipe."""
    first = models.first
    absolute = _recorded(recipe, models)
    text = yaml.safe_dump(to_dict(absolute), sort_keys=False)
    files = {n: d for n, d in first.files.items() if not first.ours or n in _KEPT}
    files[RECIPE] = f"# Made by llmtrain {llmtrain.__version__}.\n{text}".encode()
    if first.ours:
        meta = json.loads(first.files[META])
        meta.update(permanent=True, world_size=1, merged_by=recipe.method)
        files[META] = json.dumps(meta, indent=1).encode()
    return files


def _recorded(recipe: MergeRecipe, models: _Models) -> MergeRecipe:
    """The recipe with the checkpoints that were merged, where it names runs."""

    def place(source: Source) -> str:
        return str(source.path.resolve())

    # An estimate of the Fisher information is gone afterwards, so only named ones are recorded.
    fishers: dict[int, Source] = dict(enumerate(models.fishers))
    entries = [
        replace(m, path=place(source), fisher=place(fishers[i]) if m.fisher is not None else None)
        for i, (m, source) in enumerate(zip(recipe.models, models.models, strict=True))
    ]
    base = None if models.base is None else place(models.base)
    return replace(recipe, base_model=base, models=entries)


def _write_shard(
    rule: Rule,
    models: _Models,
    path: Path,
    tensors: list[tuple[str, torch.dtype]],
    prefix: str,
    workers: Workers,
) -> FileSum:
    first = models.first
    header = [(prefix + n, dtype_name(d, n), first.shapes[n]) for n, d in tensors]
    file = HashingFile(path)
    try:
        file.write(build_header(header, {"format": "pt"})[0])
        for block, done in workers.ordered(_work(rule, models, tensors, workers)):
            file.write(tensor_bytes(block))
            if done is not None:
                done.close()
        return file.finish()
    finally:
        file.close()


def _work(
    rule: Rule, models: _Models, tensors: list[tuple[str, torch.dtype]], workers: Workers
) -> Iterator[Callable[[], tuple[Tensor, Inputs | None]]]:
    """The blocks of all tensors in order, as functions that make them."""
    for name, dtype in tensors:
        inputs = _inputs(models, name, workers)
        measured = rule.measure(inputs) if inputs.dtype.is_floating_point else None
        for begin, end in inputs.ranges():
            yield partial(_block, rule, inputs, measured, dtype, begin, end)


def _block(
    rule: Rule, inputs: Inputs, measured: Any, dtype: torch.dtype, begin: int, end: int
) -> tuple[Tensor, Inputs | None]:
    """A merged block, and with a tensor's last one the inputs, which are done with then."""
    done = inputs if end == inputs.numel else None
    if inputs.dtype.is_floating_point:
        block = rule.combine(inputs, begin, end, measured).to(dtype)
        if not is_finite(block):
            raise CheckpointError(
                f"{inputs.name} is NaN or infinite in the merged model as {dtype}; "
                "give smaller weights or scale, or dtype=fp32"
            )
        return block, done
    return _agreed(inputs, begin, end), done


def _inputs(models: _Models, name: str, workers: Workers) -> Inputs:
    """Readers of one tensor."""
    dtypes = [s.dtypes[name] for s in models.models]
    dtype = dtypes[0]
    if dtype.is_floating_point:
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return Inputs(
        name,
        _size(models.first, name),
        dtype,
        models.base.reader(name) if models.base is not None else None,
        [source.reader(name) for source in models.models],
        [source.reader(name) for source in models.fishers],
        workers,
    )


def _agreed(inputs: Inputs, begin: int, end: int) -> Tensor:
    """A block of a tensor of whole numbers, in which the models must agree."""
    first, *others = inputs.blocks(begin, end)
    if not all(torch.equal(first, other) for other in others):
        raise CheckpointError(
            f"{inputs.name} holds whole numbers that differ between the models; such "
            "tensors cannot be averaged"
        )
    return first
