"""Adapters merged into a live model and taken out again, to the bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.adapted import TOKENS, built, merged
from helpers.layout_runs import add_whole, build, case, one_step, rank_batch, whole
from helpers.ranks import run_ranks

from llmtrain.config.adapters import AdapterConfig
from llmtrain.errors import ConfigError
from llmtrain.linear import Linear, Mask, Numbers, fake_matmul
from llmtrain.model import is_merged, merge_adapters, unmerge_adapters
from llmtrain.parallel import local_boxes


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_holds_what_conversion_writes_and_unmerged_what_it_had(kind: str) -> None:
    section = AdapterConfig(kind, rank=3, targets=["q", "v", "gate", "down"])
    model = built(section, attention_bias=True)
    before, plain = bits(model), bits(merged(model))
    with torch.no_grad():
        apart = model(TOKENS)
        assert merge_adapters(model) == 6 and is_merged(model)
        assert merge_adapters(model) == 0  # once is enough
        together = model(TOKENS)
    assert same({name: p for name, p in bits(model).items() if name in plain}, plain)
    assert not torch.equal(together, apart)  # another rounding
    torch.testing.assert_close(together, apart, atol=3e-6, rtol=1e-5)
    assert unmerge_adapters(model) == 6 and not is_merged(model)
    assert same(bits(model), before)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), apart)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_multiplier_of_the_layer_is_taken_into_account(kind: str) -> None:
    model = built(AdapterConfig(kind, rank=3))
    for layer in model.modules():
        if isinstance(layer, Linear) and layer.adapter is not None:
            layer.plan = dataclasses.replace(layer.plan, scale=0.3)
    with torch.no_grad():
        apart = model(TOKENS)
        merge_adapters(model)
        torch.testing.assert_close(model(TOKENS), apart, atol=3e-6, rtol=1e-5)


def test_a_packed_base_is_made_float32_when_asked() -> None:
    model = built(AdapterConfig(rank=3, base="int8"))
    for layer in model.modules():
        if isinstance(layer, Linear) and layer.packed:
            parts = layer.matmul.form.pack(  # type: ignore[attr-defined]
                torch.randn(layer.out_features, layer.in_features) * 0.1
            )
            for leaf, part in zip(layer.packed, parts, strict=False):
                getattr(layer, leaf).data.copy_(part)
    before = bits(model)
    with pytest.raises(ConfigError, match="dequantise=True"):
        merge_adapters(model)
    with torch.no_grad():
        apart = model(TOKENS)
        merge_adapters(model, dequantise=True)
        assert model.get_parameter("blocks.0.mlp.up.weight").dtype == torch.float32
        torch.testing.assert_close(model(TOKENS), apart, atol=3e-6, rtol=1e-5)
        unmerge_adapters(model)
        assert torch.equal(model(TOKENS), apart)
    assert bits(model).keys() == before.keys() and same(bits(model), before)


def _mask(layer: Linear) -> None:
    rows, columns = layer.weight.shape
    kept = torch.ones(rows, columns, dtype=torch.bool)
    layer.set_mask(Mask(kept, (1, 1), (rows, columns)))


def _fake(layer: Linear) -> None:
    layer.set_matmul(fake_matmul(Numbers("int8"), torch.float32))


def _cut(layer: Linear) -> None:
    layer.weight.ds_tensor = layer.weight  # as ZeRO 3 marks what it holds a part of


def test_what_cannot_be_merged_is_refused_before_anything_changes() -> None:
    for change, says in ((_mask, "sparse"), (_fake, "swallow"), (_cut, "ZeRO 3")):
        model = built(AdapterConfig(rank=3))
        change(model.blocks[1].mlp.down)  # type: ignore[union-attr, arg-type]
        before = bits(model)
        with pytest.raises(ConfigError, match=f"blocks.1.mlp.down: .*{says}"):
            merge_adapters(model)
        assert same(bits(model), before)
    model = built(AdapterConfig(rank=3))
    merge_adapters(model, keep=False)
    with pytest.raises(ConfigError, match="keep=False"):
        unmerge_adapters(model)
    model = built(AdapterConfig(rank=3, base="int8"))
    model.blocks[0].mlp.up.adapter.sharded = True  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"blocks.0.mlp.up: .*FSDP2"):
        merge_adapters(model, dequantise=True)


def test_adapters_that_sleep_are_not_merged() -> None:
    model = built(AdapterConfig(rank=3, targets=["out"]))
    model.blocks[0].attention.out.adapter.awake = False  # type: ignore[union-attr]
    before = model.get_parameter("blocks.0.attention.out.weight").clone()
    assert merge_adapters(model) == 1
    assert torch.equal(model.get_parameter("blocks.0.attention.out.weight"), before)


CASE = case(n_layers=2, adapters=AdapterConfig("dora", rank=3), attention_bias=True)


def merged_in_layout(rank: int, world: int, parallel: dict[str, Any]) -> dict[str, Any]:
    module = build(rank, world, CASE, parallel)
    with torch.no_grad():
        for i, (name, param) in enumerate(module.params.items()):
            if name.endswith("adapter.b.weight"):
                draw = torch.Generator().manual_seed(i)
                add_whole(param, 0.1 * torch.randn(param.shape, generator=draw))
            if name.endswith("magnitude.weight"):  # sums over ranks are rounded otherwise
                for values, _ in local_boxes(param):
                    values.fill_(0.2)
    module.weights_changed()
    before = {name: whole(p) for name, p in module.params.items()}

    def loss() -> float:
        with torch.no_grad():
            found = module.loss(rank_batch(module, 0), 1.0)
        part = float(found.loss) if module.layout.counts_losses else 0.0
        return float(module.layout.world.sum([part])[0])

    apart = loss()
    merge_adapters(module.model)
    together, merged = loss(), {name: whole(p) for name, p in module.params.items()}
    unmerge_adapters(module.model)
    after = {name: whole(p) for name, p in module.params.items()}
    assert same(before, after) and loss() == apart
    return {"losses": (apart, together), "merged": merged, "then": one_step(module, 0)}


@pytest.mark.dist
def test_tensor_parallelism_and_fsdp2_merge_to_the_bits_of_one_process() -> None:
    alone = merged_in_layout(0, 1, {})
    for ours in run_ranks(4, lambda rank: merged_in_layout(rank, 4, {"tensor": 2})):
        assert same(ours["merged"], alone["merged"])
        assert ours["losses"] == pytest.approx(alone["losses"], rel=2e-6)
        assert ours["then"] == pytest.approx(alone["then"], rel=1e-5)
    assert alone["losses"][1] == pytest.approx(alone["losses"][0], rel=2e-6)
