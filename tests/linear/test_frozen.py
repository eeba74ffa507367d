"""Packed frozen weights: the published code in float64, the same function, any layout."""

from __future__ import annotations

import dataclasses
from statistics import NormalDist
from typing import Any

import pytest
import torch
from helpers.layout_runs import Case, Outcome, assert_same, build, case, one_step, outcome
from helpers.memory import allocated
from helpers.ranks import run_ranks
from torch import Tensor

from llmtrain.config.adapters import AdapterConfig
from llmtrain.linear import Frozen, Linear
from llmtrain.linear.frozen import BLOCK, FORMATS, NF4
from llmtrain.model import fill_packed, packed_layers, set_magnitudes

# Bits of a weight [*, 256] with all that belongs to it.
BITS = {"bf16": 16, "fp8": 8.125, "int8": 8.125, "nf4": 4.5, "nf4_double": 4.25}


def weight(n: int = 24, k: int = 256) -> Tensor:
    """Rows of very different lengths, one block and one row of zeros."""
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(n, k, generator=draw) * 10 ** torch.linspace(-4, 1, n)[:, None]
    w[1], w[2, BLOCK : 2 * BLOCK] = 0.0, 0.0
    return w


def test_nf4_is_the_table_of_the_paper() -> None:
    """Quantiles of both halves with one zero, by the mean of the two offsets (appendix E)."""
    quantile = NormalDist().inv_cdf
    top = 1 - (1 / 30 + 1 / 32) / 2
    positive = [quantile(0.5 + (top - 0.5) * i / 8) for i in range(1, 9)]
    negative = [-quantile(0.5 + (top - 0.5) * i / 7) for i in range(1, 8)]
    found = sorted([*negative, 0.0, *positive])
    scaled = [x / max(positive) for x in found]
    assert len(NF4) == 16 and max(abs(a - b) for a, b in zip(scaled, NF4, strict=True)) < 2e-6


def nearest(x: Tensor, numbers: Tensor) -> Tensor:
    return numbers[(x[..., None] - numbers).abs().argmin(-1)]


def published(w: Tensor, name: str) -> Tensor:
    """What a format makes of a weight, in float64 from its definition."""
    w = w.double()
    row = w.abs().amax(1, keepdim=True)
    row[row == 0] = 1
    if name == "bf16":
        return w.bfloat16().double()
    if name == "int8":
        return (w / row * 127).round() * row / 127
    if name == "fp8":
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        return nearest(w / row * 448, every[every.isfinite()]) * row / 448
    blocks = w.unflatten(1, (-1, BLOCK))
    largest = blocks.abs().amax(2, keepdim=True)
    if name == "nf4_double":
        top = largest.amax(1, keepdim=True)
        top[top == 0] = 1
        largest = (largest / top * 255).round() / 255 * top
    divisor = torch.where(largest > 0, largest, 1.0)
    return (nearest(blocks / divisor, torch.tensor(NF4).double()) * largest).flatten(1)


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_those_of_the_definition(name: str) -> None:
    w, form = weight(), Frozen(name)
    parts = form.pack(w)
    found, expected = form.unpack(parts, torch.float32), published(w, name)
    # A number halfway between two codes may go either way.
    apart = (found - expected).abs() > 1e-6 * expected.abs().clamp(min=1e-9)
    assert apart.double().mean() < 2e-4
    size = sum(p.numel() * p.element_size() for p in parts if p is not None)
    assert size * 8 == BITS[name] * w.numel()
    for mine, empty in zip(parts, form.empty(*w.shape), strict=True):
        assert (mine is None) == (empty is None)
        if mine is not None and empty is not None:
            assert (mine.shape, mine.dtype) == (empty.shape, empty.dtype)
    columns = form.part(parts, 2 * BLOCK, BLOCK)
    assert torch.equal(form.unpack(columns, torch.float32), found[:, 2 * BLOCK : 3 * BLOCK])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_unpacked_weight(name: str, dtype: torch.dtype) -> None:
    from llmtrain.linear import matmul_for

    plain = Linear(256, 24, bias=True, matmul=matmul_for(dtype), scale=0.5)
    packed = Linear(256, 24, bias=True, matmul=matmul_for(dtype), scale=0.5)
    packed.freeze(name)
    with torch.no_grad():
        torch.nn.init.normal_(plain.bias)
        packed.bias.copy_(plain.bias)
        for mine, new in zip(packed.packed_parts(), Frozen(name).pack(weight()), strict=True):
            if mine is not None and new is not None:
                mine.copy_(new)
        plain.weight.copy_(packed.rows())
    plain.weight.requires_grad_(False)
    x = torch.randn(7, 256, dtype=dtype)
    up = torch.randn(7, 24, dtype=dtype)
    results = []
    for layer in (plain, packed):
        inner = x.clone().requires_grad_()
        y = layer(inner)
        y.backward(up)
        results += [y, inner.grad]
    for one, other in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_nothing_unpacked_is_kept() -> None:
    layer = Linear(512, 512)
    layer.freeze("int8")
    x = torch.randn(4, 512, requires_grad=True)
    found = allocated(lambda: layer(x))
    assert found.kept <= 4 * 512 * 4 + 1024
    assert found.peak > 512 * 512 * 4


def packed_case(base: str | None, **adapters: Any) -> Case:
    section = AdapterConfig(rank=3, base=base, **adapters)
    shape = {"d_model": 128, "d_ff": 128, "n_layers": 2}
    what = case(steps=2, adapters=section, attention_bias=True, **shape)
    return dataclasses.replace(what, optim=(("lr", 1e-2), ("eps", 1e-5)))


def stored(what: Case) -> dict[str, Tensor]:
    """The unpacked weights that a run of ``what`` begins with."""
    model = dict(what.model)
    model["adapters"] = dataclasses.replace(model["adapters"], base=None)
    plain = dataclasses.replace(what, model=tuple(model.items()))
    return {name: p.detach().clone() for name, p in build(0, 1, plain, {}).params.items()}


def steps(rank: int, world: int, what: Case, parallel: dict[str, Any]) -> Outcome:
    module, whole = build(rank, world, what, parallel), stored(what)
    fill_packed(module.model, lambda name, first, n: whole[name][first : first + n])
    set_magnitudes(module.model)
    return outcome(module, [one_step(module, step) for step in range(what.steps)])


def test_a_run_is_that_of_the_unpacked_weights() -> None:
    what = packed_case("nf4")
    packed = build(0, 1, what, {})
    whole = stored(what)
    fill_packed(packed.model, lambda name, first, n: whole[name][first : first + n])
    plain = build(0, 1, packed_case(None), {})
    with torch.no_grad():
        for name, layer in packed_layers(packed.model):
            plain.params[f"{name}.weight"].copy_(layer.rows())
    ours = outcome(packed, [one_step(packed, step) for step in range(2)])
    theirs = outcome(plain, [one_step(plain, step) for step in range(2)])
    theirs.weights = {name: theirs.weights[name] for name in ours.weights}
    assert_same(ours, theirs, rel=1e-6)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("what", "parallel"),
    [
        (packed_case("nf4_double", kind="dora"), {"tensor": 2}),
        (packed_case("int8"), {"tensor": 2, "pipeline": 2, "sequence": False}),
    ],
)
def test_any_layout_is_the_same_run(what: Case, parallel: dict[str, Any]) -> None:
    """4 ranks: tensor, sequence and sharded data parallel; tensor and pipeline."""
    alone = steps(0, 1, what, {})
    for ours in run_ranks(4, lambda rank: steps(rank, 4, what, parallel)):
        assert_same(ours, alone)
