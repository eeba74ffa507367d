"""Layers of two factors: widths, values, gradients, initial sizes, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmtrain.config.adapters import AdapterConfig
from llmtrain.config.factorized import FactorizedConfig
from llmtrain.config.scaling import ScalingConfig
from llmtrain.config.schema import ModelConfig
from llmtrain.errors import ConfigError
from llmtrain.linear import Mask
from llmtrain.model import (
    build_model,
    complete,
    flops_per_token,
    hidden_layers,
    layer_names,
    layer_shape,
    param_counts,
)
from llmtrain.model.layers import inner_width
from llmtrain.sparsity.choose import random_kept
from llmtrain.sparsity.granularity import parse_granularity

SHAPE: dict[str, Any] = {"vocab_size": 61, "d_model": 48, "n_layers": 2, "n_heads": 6}
FORMULAS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x * torch.sigmoid(x),
    "none": lambda x: x,
}


def shape(section: dict[str, Any] | None, **changes: Any) -> ModelConfig:
    factors = None if section is None else FactorizedConfig(**section)
    return complete(ModelConfig(**{**SHAPE, **changes}, factorized=factors), None, 16)


def test_both_factors_keep_as_much_as_the_layer() -> None:
    """Sparse-IFT's widths: of both factors sparse, of U alone, and rounded up."""
    layer = "blocks.0.mlp.down"
    rows, columns = layer_shape(shape(None), layer)
    for density in (0.5, 0.25, 0.1):
        wanted = rows * columns / (density * (rows + columns))
        both = shape({"density_u": density, "density_v": density, "multiple_of": 1})
        assert inner_width(both, layer) == math.ceil(wanted)
        first = shape({"density_u": density, "density_v": 1.0, "multiple_of": 1})
        assert inner_width(first, layer) == math.ceil(rows * columns / (density * columns + rows))
        assert inner_width(shape({"density_u": density, "density_v": density}), layer) == (
            16 * math.ceil(wanted / 16)
        )
    square = shape({"multiple_of": 1}, d_ff=48)
    assert inner_width(square, layer) == 48  # d / (2 (1 - s)) at a half is d


def test_counts_are_those_of_the_model() -> None:
    cfg = shape({"layers": ["*.mlp.*", "blocks.1.attention.out"], "multiple_of": 8}, mlp_bias=True)
    model = build_model(cfg, seed=1, device="cpu", compute_dtype=torch.float32)
    found = dict(hidden_layers(model))
    assert list(found) == layer_names(cfg)
    assert {n: tuple(m.weight.shape) for n, m in found.items()} == {
        name: layer_shape(cfg, name) for name in layer_names(cfg)
    }
    assert "blocks.0.attention.out" in found and "blocks.1.attention.out.v" in found
    assert param_counts(cfg)["total"] == sum(p.numel() for p in model.parameters())
    hidden = sum(m.weight.numel() for m in found.values())
    ends = flops_per_token(cfg, 16, 0.0)
    assert flops_per_token(cfg, 16) - ends == pytest.approx(6 * hidden)
    # At the densities it is made for it costs what the dense model does, but for rounding up.
    wide = shape({"multiple_of": 1})
    assert flops_per_token(wide, 16, 0.5) == pytest.approx(
        flops_per_token(shape(None), 16), rel=0.01
    )


@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("lean", [False, True])
def test_values_and_gradients_are_those_of_the_formula(activation: str, lean: bool) -> None:
    cfg = shape({"activation": activation, "multiple_of": 1, "density_u": 0.3}, mlp_bias=True)
    model = build_model(cfg, seed=2, device="cpu", compute_dtype=torch.float32)
    layer = model.blocks[1].mlp.down
    layer.lean = lean
    with torch.no_grad():
        layer.v.bias.normal_()
    x = torch.randn(3, 5, layer.u.in_features, requires_grad=True)
    upstream = torch.randn(3, 5, 48)
    layer(x).backward(upstream)
    wide = [t.detach().double().requires_grad_() for t in (x, layer.u.weight, layer.v.weight)]
    bias = layer.v.bias.detach().double().requires_grad_()
    y = F.linear(FORMULAS[activation](F.linear(wide[0], wide[1])), wide[2], bias)
    y.backward(upstream.double())
    torch.testing.assert_close(layer(x).double(), y, rtol=1e-5, atol=1e-6)
    ours = (x.grad, layer.u.weight.grad, layer.v.weight.grad, layer.v.bias.grad)
    for grad, reference in zip(ours, (*wide, bias), strict=True):
        torch.testing.assert_close(grad.double(), reference.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", FORMULAS)
def test_under_its_masks_it_begins_as_large_as_the_layer_it_replaces(activation: str) -> None:
    section = {"activation": activation, "density_u": 0.25, "density_v": 0.5}
    plain, factors = (
        build_model(
            shape(given, d_model=256, n_layers=1, n_heads=4, activation="relu", d_ff=1024),
            seed=3, device="cpu", compute_dtype=torch.float32,
        ).blocks[0].mlp
        for given in (None, section)
    )  # fmt: skip
    granularity = parse_granularity("unstructured", "x")
    for layer in (factors.up, factors.down):
        for part, density in ((layer.u, 0.25), (layer.v, 0.5)):
            size = tuple(part.weight.shape)
            kept = random_kept(granularity, density, size, (1, str(size)), (0, size[0]))
            part.set_mask(Mask(kept, (1, 1), size))
    for name in ("up", "down"):
        x = torch.randn(500, getattr(plain, name).in_features)
        dense, ours = (float(getattr(mlp, name)(x).std()) for mlp in (plain, factors))
        assert ours == pytest.approx(dense, rel=0.05), name
        assert float(getattr(factors, name).u(x).std()) == pytest.approx(1.0, rel=0.05)


def test_unit_scaling_begins_with_ones_and_the_multipliers_of_each_factor() -> None:
    cfg = shape(
        {"activation": "none"}, scaling=ScalingConfig(parametrization="mus", residual="sum")
    )
    model = build_model(cfg, seed=4, device="cpu", compute_dtype=torch.float32)
    layer = model.blocks[0].attention.out
    assert float(layer.v.weight.std()) == pytest.approx(1.0, rel=0.05)
    assert layer.u.plan.scale == pytest.approx(layer.u.in_features**-0.5)
    assert layer.v.plan.scale == pytest.approx(layer.v.in_features**-0.5)


@pytest.mark.parametrize(
    ("section", "changes", "told"),
    [
        ({"layers": ["*.mlp.middle"]}, {}, "'*.mlp.middle' matches no hidden linear layer"),
        ({"layers": []}, {}, "model.factorized.layers: is empty"),
    ],
)
def test_what_cannot_be_is_said(
    section: dict[str, Any], changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=r"model\.factorized") as fault:
        shape(section, **changes)
    assert told in str(fault.value)


def test_adapters_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.adapters: .* model\.factorized"):
        shape({}, adapters=AdapterConfig())
