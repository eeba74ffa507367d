"""Initial weights that depend on the seed and the parameter's name only, never on the layout."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from llmtrain.config.schema import ModelConfig
from llmtrain.model.adapters import ADAPTER, MAGNITUDE, clear_unused, set_magnitudes
from llmtrain.model.decoder import Decoder
from llmtrain.model.layers import inner_width, layer_shape, split_factor
from llmtrain.model.packing import packed_names
from llmtrain.model.scaling import init_std
from llmtrain.parallel import local_boxes

# Values drawn at a time: bounds the memory beside the parameter, and fixes the stream of values.
CHUNK_VALUES = 1 << 20

ROLES = ("embedding", "hidden", "norm", "head", "bias", "adapter")


def param_roles(model: nn.Module) -> dict[str, str]:
    """Role of every parameter by name: embedding, hidden, norm, head, bias or adapter.

    A tied head's weight counts as embedding.
    """
    return {name: _role(name) for name, _ in model.named_parameters()}


def _role(name: str) -> str:
    if ADAPTER in name:
        return "adapter"
    owner, _, leaf = name.rpartition(".")
    if leaf == "bias":
        return "bias"
    if owner.endswith("norm"):
        return "norm"
    if owner.endswith("embedding"):
        return "embedding"
    return "head" if owner.startswith("head") else "hidden"


def _std(name: str, role: str, model: Decoder, width: int) -> float:
    """Standard deviation of a weight; of A in an adapter that of Kaiming's uniform values with
    a = sqrt(5), as everybody's adapters begin."""
    if role == "adapter":
        return 0.0 if name.endswith(".b.weight") else 1 / math.sqrt(3 * width)
    layer, factor = split_factor(name.removesuffix(".weight"))
    into_stream = role == "hidden" and layer.endswith(("attention.out", "mlp.down"))
    std = init_std(model.cfg, role, into_stream=into_stream)
    return _factor_std(std, layer, factor, model.cfg) if factor else std


# Mean square of an activation of standard normal values.
_MEAN_SQUARES = {"gelu": 0.4252, "gelu_tanh": 0.4252, "relu": 0.5, "silu": 0.3558, "none": 1.0}


def _factor_std(std: float, layer: str, factor: str, cfg: ModelConfig) -> float:
    """Of a factor in the place of a layer of ``std``, except with muS, where all begin as 1.

    u gives values of variance 1 for inputs of variance 1, so that the activation is at work, and v
    what the layer would give for them; both at the densities that the section names.
    """
    section, inner = cfg.factorized, inner_width(cfg, layer)
    assert section is not None and inner is not None
    if cfg.scaling.parametrization == "mus":
        return std
    _, columns = layer_shape(cfg, f"{layer}.u")
    if factor == "u":
        return 1 / math.sqrt(section.density_u * columns)
    square = _MEAN_SQUARES[section.activation]
    return std * math.sqrt(columns / (section.density_v * inner * square))


def normal_rows(seed: int, name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a float32 tensor ``shape`` of standard normal values.

    The value at an index depends on (seed, name, shape of a row, index) only. Rows are drawn in
    chunks of about ``CHUNK_VALUES`` values, each from its own generator.
    """
    width = math.prod(shape[1:])
    rows = max(1, CHUNK_VALUES // max(1, width))
    out = np.empty((stop - start, width), dtype=np.float32)
    for chunk in range(start // rows, -(-stop // rows)):
        first = chunk * rows
        label = f"{seed}/{name}/{chunk}".encode()
        key = int.from_bytes(hashlib.blake2b(label, digest_size=16).digest(), "little")
        count = min(rows, shape[0] - first)
        generator = np.random.Generator(np.random.Philox(key=key))
        values = generator.standard_normal((count, width), dtype=np.float32)
        low, high = max(start, first), min(stop, first + count)
        out[low - start : high - start] = values[low - first : high - first]
    return torch.from_numpy(out).view(stop - start, *shape[1:])


def _fill_normal(
    local: Tensor,
    offset: tuple[int, ...],
    whole: tuple[int, ...],
    label: tuple[int, str],
    std: float,
) -> None:
    """Fill the box ``local`` of the parameter ``label`` (seed, name) of shape ``whole``."""
    if local.numel() == 0:
        return
    step = max(1, CHUNK_VALUES // max(1, math.prod(whole[1:])))
    for row in range(0, local.shape[0], step):
        stop = min(local.shape[0], row + step)
        rows = normal_rows(*label, whole, offset[0] + row, offset[0] + stop)
        for dim in range(1, rows.dim()):
            rows = rows.narrow(dim, offset[dim], local.shape[dim])
        local[row:stop].copy_(rows.mul_(std))


@torch.no_grad()
def init_weights(model: Decoder, seed: int, state: Mapping[str, Tensor] | None = None) -> None:
    """Fill every parameter in place, on whatever device and layout it lies.

    Weights are normal with the standard deviation of the model's parametrisation (see
    ``model.scaling``), norms one, biases zero. Packed weights are left for ``fill_packed``.
    Every process fills its own part; nothing is communicated. state: tensors to fill instead of
    the model's own parameters, by the same names.
    """
    packed = packed_names(model)
    for name, param in (dict(model.named_parameters()) if state is None else state).items():
        if name in packed:
            continue
        role = _role(name)
        for local, offset in local_boxes(param):
            if role == "norm" or name.endswith(MAGNITUDE):
                local.fill_(1.0)
            elif role == "bias":
                local.zero_()
            else:
                label = (seed, name)
                std = _std(name, role, model, param.shape[-1])
                _fill_normal(local, offset, tuple(param.shape), label, std)
                if role == "adapter":
                    clear_unused(model, name, local, offset[0])
    if state is None and not packed:
        set_magnitudes(model)


def build_model(
    cfg: ModelConfig, *, seed: int, device: torch.device | str, compute_dtype: torch.dtype
) -> Decoder:
    """A decoder of the (resolved) shape ``cfg`` with its initial weights on ``device``."""
    with torch.device("meta"):
        model = Decoder(cfg, compute_dtype)
    model.to_empty(device=device)
    init_weights(model, seed)
    return model
