"""Frozen weights of a decoder that are kept packed: which they are, and how they are filled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from llmtrain.config.schema import ModelConfig
from llmtrain.errors import ConfigError
from llmtrain.linear import Frozen, FrozenMatmul, Linear, Placement
from llmtrain.model.layers import layer_names
from llmtrain.parallel import local_boxes

# Values of a weight that are unpacked at a time while it is filled.
_VALUES = 1 << 22


def freeze_layer(layer: Linear, name: str, form: str) -> None:
    """Keep the frozen weight of ``layer`` packed. Raises ConfigError where a rank's columns do not
    fit the format."""
    tensor = layer.plan.tensor
    ranks = tensor.size if tensor is not None and layer.placement is Placement.ROW else 1
    columns, multiple = layer.in_features // ranks, Frozen(form).columns
    if columns % multiple:
        raise ConfigError(
            f"model.adapters.base: {form} packs blocks of {multiple} in a row, and {name} has "
            f"{columns} columns on each rank; use int8, or another width or parallel.tensor"
        )
    layer.freeze(form)


def packed_layers(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Layers whose weight is packed, by their names in the whole model."""
    for name, layer in model.named_modules():
        if isinstance(layer, Linear) and layer.packed:
            # A stage of a pipeline has the decoder below itself.
            yield name[name.index("blocks.") :], layer


def packed_names(model: nn.Module) -> set[str]:
    """Names of the parameters of ``model`` that are no weights but packed ones."""
    return {
        f"{name}.{leaf}"
        for name, layer in model.named_modules()
        if isinstance(layer, Linear)
        for leaf in layer.packed
    }


def packed_weights(cfg: ModelConfig) -> tuple[str, ...]:
    """Names of the weights of the whole model that are kept packed, as checkpoints name them."""
    if cfg.adapters is None or cfg.adapters.base is None:
        return ()
    return tuple(f"{name}.weight" for name in layer_names(cfg))


def unpacked(cfg: ModelConfig) -> ModelConfig:
    """``cfg`` of the same model with its frozen weights as they are stored."""
    if cfg.adapters is None or cfg.adapters.base is None:
        return cfg
    return replace(cfg, adapters=replace(cfg.adapters, base=None))


@torch.no_grad()
def fill_packed(model: nn.Module, read: Callable[[str, int, int], Tensor]) -> None:
    """Pack the frozen weights of ``model`` in place, each rank its own part.

    read(name, first, n): rows [first, first + n) of a weight of the whole model, [n, in] of any
    float dtype on any device. Rows come whole and a few at a time, as scales are of whole rows.
    """
    for name, layer in packed_layers(model):
        assert isinstance(layer.matmul, FrozenMatmul)
        form, stored = layer.matmul.form, layer.packed_parts()
        codes = layer.get_parameter(layer.packed[0])
        ((local, offset),) = local_boxes(codes)
        per_code = layer.in_features // codes.shape[1]
        columns = (offset[1] * per_code, local.shape[1] * per_code)
        step = max(1, _VALUES // layer.in_features)
        for start in range(0, len(local), step):
            n = min(step, len(local) - start)
            rows = read(f"{name}.weight", offset[0] + start, n).to(local.device)
            for mine, new in zip(stored, form.part(form.pack(rows), *columns), strict=True):
                if mine is not None and new is not None:
                    mine[start : start + n].copy_(new)
