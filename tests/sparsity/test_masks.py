"""Choosing, packing and selecting masks: exact densities, layout independence, clear errors."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmtrain.config.schema import ModelConfig
from llmtrain.config.sparsity import SparsityConfig, SparsityRule
from llmtrain.errors import ConfigError
from llmtrain.linear import Mask
from llmtrain.methods.rigl import regrown, replaced_share
from llmtrain.methods.slope import density_loss
from llmtrain.model import complete
from llmtrain.sparsity import (
    best_kept,
    block_scores,
    choose,
    cubic_density,
    pack_bits,
    parse_granularity,
    prune_again,
    random_kept,
    sparse_layers,
    unpack_bits,
)
from llmtrain.sparsity.storage import FORMAT, fit_masks, load_masks, write_masks

MODEL = complete(ModelConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, d_ff=48), None, 8)


@pytest.mark.parametrize("text", ["unstructured", "1x2", "4x4", "8x2", "16x16", "2:4", "2:4t"])
def test_density_is_exact_and_rows_drawn_apart_are_those_of_the_whole(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "CHUNK", 300)  # several chunks, not aligned with the cuts
    granularity, shape, label = parse_granularity(text), (96, 64), (3, "blocks.1.mlp.up")
    density = granularity.density(None if granularity.m else 0.3, "sparsity.density")
    kept = random_kept(granularity, density, shape, label)
    down, across = granularity.grid(shape)
    assert kept.shape == (down, across)
    assert int(kept.sum()) == round(density * down * across)
    cuts = [0, 2 * granularity.unit[0] // granularity.block[0], down]
    parts = [random_kept(granularity, density, shape, label, (a, b)) for a, b in pairwise(cuts)]
    assert torch.equal(torch.cat(parts), kept)
    assert not torch.equal(random_kept(granularity, density, shape, (4, label[1])), kept)
    if granularity.m:
        assert (kept.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    if granularity.both:
        assert (kept.unflatten(0, (-1, 4)).sum(1) == 2).all()


@pytest.mark.parametrize("density", [0.0, 0.001, 0.5, 1.0])
def test_any_density_of_an_odd_shape(density: float) -> None:
    granularity = parse_granularity("4x4")
    kept = random_kept(granularity, density, (37, 51), (0, "w"))
    assert int(kept.sum()) == round(density * 10 * 13)


def test_every_place_is_as_likely() -> None:
    granularity = parse_granularity("unstructured")
    masks = [random_kept(granularity, 0.25, (16, 16), (seed, "w")) for seed in range(400)]
    share = torch.stack(masks).double().mean(0)
    assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / 400) ** 0.5


def test_the_90_transposable_patterns_and_larger_tiles() -> None:
    assert len(choose.tile_patterns(2, 4)) == 90
    kept = random_kept(parse_granularity("3:8t"), 3 / 8, (16, 24), (0, "w"))
    assert (kept.unflatten(1, (-1, 8)).sum(-1) == 3).all()
    assert (kept.unflatten(0, (-1, 8)).sum(1) == 3).all()


def test_the_largest_scores_are_kept() -> None:
    weights = torch.randn(9, 13, generator=torch.Generator().manual_seed(0))
    blocks = block_scores(weights, (4, 4))
    assert blocks.shape == (3, 4)
    assert blocks[2, 3] == weights[8, 12].abs()
    torch.testing.assert_close(blocks[0, 1], weights[:4, 4:8].abs().sum())
    kept = best_kept(parse_granularity("4x4"), blocks, 0.25)
    assert kept.sum() == 3 and blocks[kept].min() > blocks[~kept].max()
    scores = torch.rand(8, 8, generator=torch.Generator().manual_seed(1))
    pairs = best_kept(parse_granularity("2:4"), scores, 0.5).view(8, 2, 4)
    grouped = scores.view(8, 2, 4)
    assert (pairs.sum(-1) == 2).all()
    assert (
        torch.where(pairs, grouped, 2).amin(-1) > torch.where(pairs, -1, grouped).amax(-1)
    ).all()
    # The best pattern of a tile by exhaustion.
    tile = best_kept(parse_granularity("2:4t"), scores, 0.5)[:4, 4:]
    sums = [scores[:4, 4:][pattern].sum() for pattern in choose.tile_patterns(2, 4)]
    assert torch.isclose(scores[:4, 4:][tile].sum(), max(sums))
    with pytest.raises(ValueError, match="up to 4"):
        best_kept(parse_granularity("2:8t"), scores, 0.25)


@pytest.mark.parametrize("dim", [0, 1])
def test_bits_round_trip(dim: int) -> None:
    kept = torch.rand(13, 21, generator=torch.Generator().manual_seed(2)) < 0.4
    bits = pack_bits(kept, dim)
    assert bits.shape == ((2, 21) if dim == 0 else (13, 3)) and bits.dtype == torch.uint8
    assert torch.equal(unpack_bits(bits, kept.shape[dim], dim), kept)


@pytest.mark.parametrize(("n", "m", "lost"), [(1, 2, 0.125), (2, 4, 0.09375)])
def test_double_pruning_loses_what_the_theorem_says(n: int, m: int, lost: float) -> None:
    assert density_loss(n, m) == lost
    granularity, shape = parse_granularity(f"{n}:{m}"), (512, 768)
    kept = random_kept(granularity, n / m, shape, (0, "w"))
    again = prune_again(granularity, kept, (0, "w"), 0, (shape[1], 0))
    assert not (again & ~kept).any()
    assert (again.unflatten(0, (-1, m)).sum(1) <= n).all()
    # Nothing is taken that need not be.
    assert torch.equal(
        again.unflatten(0, (-1, m)).sum(1), kept.unflatten(0, (-1, m)).sum(1).clamp(max=n)
    )
    share = 1 - float((kept & ~again).double().mean())
    assert abs((1 - share) - lost) < 0.002
    part = prune_again(granularity, kept[m * 8 :, 100:140], (0, "w"), m * 8, (shape[1], 100))
    assert torch.equal(part, again[m * 8 :, 100:140])


def test_rigl_keeps_the_number_drops_the_smallest_and_grows_the_largest() -> None:
    draw = torch.Generator().manual_seed(3)
    kept = random_kept(parse_granularity("unstructured"), 0.25, (20, 31), (0, "w"))
    weights, growth = (torch.rand(20, 31, generator=draw) for _ in "ab")
    new = regrown(kept, weights * kept, growth, 0.3)
    moved = int(0.3 * int(kept.sum()))
    assert new.sum() == kept.sum()
    ordered = weights[kept].sort().values
    stay = kept & (weights >= ordered[moved])
    assert (new & stay).sum() == stay.sum() == kept.sum() - moved
    assert growth[new & ~stay].min() > growth[~new].max()
    assert regrown(torch.ones_like(kept), weights, growth, 0.5).all()
    assert [replaced_share(0.3, t, 100) for t in (0, 50, 100, 150)] == pytest.approx(
        [0.3, 0.15, 0, 0]
    )


def test_the_cubic_schedule() -> None:
    found = [cubic_density(0.2, t, 100, 300) for t in (0, 100, 200, 300, 400)]
    assert found == pytest.approx([1, 1, 0.2 + 0.8 / 8, 0.2, 0.2])


def _layers(**keys: object) -> dict[str, float]:
    section = SparsityConfig(**keys)  # type: ignore[arg-type]
    return {name: layer.density for name, layer in sparse_layers(MODEL, section).items()}


def test_rules_choose_layers_densities_and_granularities() -> None:
    dense = SparsityRule(["blocks.0.*"], 1.0)
    pairs = SparsityRule(["*.mlp.down"], granularity="2:4")
    found = _layers(density=0.25, rules=[dense, pairs])
    assert found == {
        "blocks.0.mlp.down": 0.5,
        "blocks.1.attention.qkv": 0.25,
        "blocks.1.attention.out": 0.25,
        "blocks.1.mlp.up": 0.25,
        "blocks.1.mlp.down": 0.5,
    }


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, r"sparsity.density: is missing"),
        ({"granularity": "4x"}, r"sparsity.granularity: '4x' is no granularity"),
        ({"granularity": "4:2"}, r"'4:2' is no granularity"),
        ({"granularity": "2:4", "density": 0.25}, r"0.25 cannot be met by 2:4.* 0.5"),
        ({"granularity": "16x16", "density": 0.3}, r"0.3 cannot be met by the 12 blocks .*0.33"),
        ({"granularity": "2:5"}, r"2:5 does not divide the 32 inputs of blocks.0.attention.qkv"),
        ({"granularity": "3:9t"}, r"3:9t does not divide the 96 outputs"),
        ({"density": 1.0}, r"every layer is dense"),
        ({"density": 0.5, "rules": [SparsityRule(["head"], 0.5)]}, r"'head' matches no hidden"),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        _layers(**keys)


def test_files_of_masks_round_trip_and_say_what_does_not_fit(tmp_path: Path) -> None:
    section = SparsityConfig(granularity="4x4", density=0.25)
    sparse = sparse_layers(MODEL, section)
    masks = {
        name: Mask(random_kept(s.granularity, s.density, s.shape, (0, name)), (4, 4), s.shape)
        for name, s in sparse.items()
    }
    file = tmp_path / "masks.safetensors"
    write_masks(file, masks)
    assert file.stat().st_size < 20_000
    for name, kept in fit_masks(load_masks(file), sparse, file).items():
        assert torch.equal(kept, masks[name].kept)
    fine = sparse_layers(MODEL, SparsityConfig(density=0.25))
    assert torch.equal(
        fit_masks(load_masks(file), fine, file)["blocks.0.mlp.up"],
        load_masks(file)["blocks.0.mlp.up"].box((0, 0), (96, 32)),
    )
    wide = complete(ModelConfig(vocab_size=64, d_model=64, n_layers=2, n_heads=4), None, 8)
    for model, other, told in (
        (wide, section, "is for a matrix 96 x 32, and this model's is 192 x 64"),
        (MODEL, SparsityConfig(density=0.5), "of density 0.5 .it keeps 0.25"),
        (MODEL, SparsityConfig(granularity="8x2", density=0.25), "is not 8x2"),
    ):
        with pytest.raises(ConfigError, match=told):
            fit_masks(load_masks(file), sparse_layers(model, other), file)
    write_masks(file, {name: masks[name] for name in list(masks)[1:]})
    with pytest.raises(ConfigError, match=r"has no mask of blocks\.0\.attention\.qkv"):
        fit_masks(load_masks(file), sparse, file)
    (tmp_path / "junk").write_text("junk")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_masks(tmp_path / "junk")
    good = {"shape": [4, 9], "block": [1, 1]}
    for facts, bits in (
        ("{", torch.zeros(4, 2, dtype=torch.uint8)),
        (json.dumps({"w": {"shape": [4, 9]}}), torch.zeros(4, 2, dtype=torch.uint8)),
        (json.dumps({"w": {**good, "block": [0, 1]}}), torch.zeros(4, 2, dtype=torch.uint8)),
        (json.dumps({"w": good}), torch.zeros(4, 1, dtype=torch.uint8)),
        (json.dumps({"w": good}), torch.zeros(4, 2)),
    ):
        save_file({"w": bits}, file, {"format": FORMAT, "masks": facts})
        with pytest.raises(ConfigError, match=r"masks.* is damaged"):
            load_masks(file)
