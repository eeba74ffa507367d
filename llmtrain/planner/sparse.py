"""What sparse layers keep beside their weights, which are stored with their zeros."""

from __future__ import annotations

from collections.abc import Iterable

from llmtrain.planner.blueprint import Part
from llmtrain.planner.setting import Setting
from llmtrain.sparsity import sparse_layers


def mask_memory(setting: Setting, parts: Iterable[Part]) -> dict[str, int]:
    """Bytes of the masks of this rank's tensor-parallel parts, a byte for a block (and for each
    weight of SLoPe's second mask), and, without FSDP2, of float32 copies of the masked weights;
    copies in another dtype are there for dense layers, too."""
    section = setting.cfg.sparsity
    assert section is not None
    sparse = sparse_layers(setting.model, section)
    masks = copies = 0
    for part in parts:
        layer = sparse.get(part.name.removesuffix(".weight"))
        if layer is None:
            continue
        rows, columns = layer.granularity.grid((part.split[0], part.split[1]))
        # Products read the mask's complement.
        masks += 2 * rows * columns
        masks += 2 * part.elements if section.method == "slope" else 0
        copies += part.elements
    found = {"masks": masks}
    if setting.data_ranks == 1 and setting.item == 4:
        found["masked copies"] = setting.item * copies
    return found
