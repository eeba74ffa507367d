"""What sparse layers keep beside their weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from llmtrain.ops.sparse import count_runs
from llmtrain.planner.blueprint import Part
from llmtrain.planner.setting import FLOAT, Setting
from llmtrain.sparsity import SMALLEST_SPARSE, Sparse, sparse_layers

INT = 4  # bytes of an int32


def mask_memory(setting: Setting, parts: Iterable[Part]) -> dict[str, int]:
    """Bytes that stand all the time. masks: of this rank's tensor-parallel parts, a byte for a
    block, and for each weight of SLoPe's second mask. Of weights with zeros, without FSDP2, float32
    copies of the masked weights; copies in another dtype are there for dense layers, too. Of kept
    weights alone where they lie, and for sparse products a transposed copy."""
    section = setting.cfg.sparsity
    assert section is not None
    masks = copies = turned = places = 0
    for part, layer in _sparse_parts(setting, parts):
        rows, columns = layer.granularity.grid((part.split[0], part.split[1]))
        # Products of weights with zeros read the mask's complement, too.
        masks += (1 if part.kept < 1 else 2) * rows * columns
        masks += 2 * math.prod(part.split) if section.method == "slope" else 0
        if part.kept == 1:
            copies += part.elements
        elif _tiled(setting, part):
            high, wide = (math.gcd(n, 4) for n in layer.granularity.block)
            turned += part.elements
            places += 3 * INT * part.elements // (high * wide)
            out, into = part.split
            runs = count_runs(out, into, high) + count_runs(into, out, wide)
            places += INT * (runs + 2)
        else:
            places += INT * round(part.kept * rows * columns)
    found = {"masks": masks}
    if places:
        found |= {"places of kept weights": places, "transposed copies": FLOAT * turned}
    if copies and setting.data_ranks == 1 and setting.item == FLOAT:
        found["masked copies"] = FLOAT * copies
    return found


def spread_memory(setting: Setting, parts: Iterable[Part]) -> int:
    """Bytes of the largest layer's dense weight and gradient, where products are dense and kept
    weights are spread out for them."""
    spread = [
        math.prod(part.split)
        for part, _ in _sparse_parts(setting, parts)
        if part.kept < 1 and not _tiled(setting, part)
    ]
    return 2 * FLOAT * max(spread, default=0)


def _sparse_parts(setting: Setting, parts: Iterable[Part]) -> Iterator[tuple[Part, Sparse]]:
    section = setting.cfg.sparsity
    sparse = {} if section is None else sparse_layers(setting.model, section)
    for part in parts:
        layer = sparse.get(part.name.removesuffix(".weight"))
        if layer is not None:
            yield part, layer


def _tiled(setting: Setting, part: Part) -> bool:
    """Whether a part has sparse products. ``auto`` times them; where it may choose them, they
    count, since they hold more."""
    section = setting.cfg.sparsity
    assert section is not None
    if section.products == "dense" or section.method == "slope" or not setting.fused:
        return False
    return section.products == "sparse" or math.prod(part.split) >= SMALLEST_SPARSE
