"""Low-rank adapters: their function, what trains, layouts, and errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.adapted import TOKENS, built, merged, shape
from helpers.layout_runs import Case, alone, assert_same, case, train_steps
from helpers.memory import allocated
from helpers.ranks import run_ranks

from llmtrain.config.adapters import AdapterConfig
from llmtrain.errors import ConfigError
from llmtrain.model import Decoder, adapted_parts, build_model, merge_adapters


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        (AdapterConfig(rank=3), {}),
        (AdapterConfig(rank=4, kind="rslora", alpha=5.0), {"n_kv_heads": 1}),
        (AdapterConfig(rank=2, targets=["q", "v", "down"]), {}),
        (AdapterConfig(rank=2, targets=["k", "gate"]), {"attention_bias": True}),
        (AdapterConfig(rank=2, targets=["up", "out"]), {"activation": "gelu"}),
        (AdapterConfig(rank=2, targets=["blocks.1.*"]), {}),
        (AdapterConfig("dora", rank=3), {"attention_bias": True, "mlp_bias": True}),
        (AdapterConfig("rsdora", rank=2, targets=["k", "gate", "blocks.1.attention.qkv.q"]), {}),
        (AdapterConfig(rank=2, rank_pattern={"k": 4, "down": 1}, alpha_pattern={"v": 9.0}), {}),
    ],
)
def test_merged_is_unmerged(section: AdapterConfig, changes: dict[str, Any]) -> None:
    model = built(section, **changes)
    plain = merged(model)
    with torch.no_grad():
        ours, theirs = model(TOKENS), plain(TOKENS)
        untouched = build_model(plain.cfg, seed=1, device="cpu", compute_dtype=torch.float32)
        assert (ours - untouched(TOKENS)).abs().max() > 1e-2
    torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=1e-5)


def test_scales() -> None:
    def scale(section: AdapterConfig, layer: str = "blocks.0.mlp.down") -> float:
        return adapted_parts(shape(section), layer)[0].scale

    assert scale(AdapterConfig(rank=8)) == 2.0
    assert scale(AdapterConfig(rank=16, alpha=8.0)) == 0.5
    assert scale(AdapterConfig(kind="rslora", rank=16, alpha=8.0)) == 2.0
    own = AdapterConfig(rank=16, alpha=8.0, rank_pattern={"mlp": 4, "blocks.1.*": 2})
    assert [scale(own), scale(own, "blocks.1.mlp.down")] == [2.0, 4.0]


def test_ranks_of_their_own() -> None:
    """A smaller rank is a larger one whose last rows are zero, and stay so."""
    section = AdapterConfig(rank=4, rank_pattern={"q": 2, "gate": 1})
    model = build_model(shape(section), seed=1, device="cpu", compute_dtype=torch.float32)
    side = model.blocks[0].attention.qkv.adapter  # type: ignore[union-attr]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(TOKENS).float().square().mean().backward()
        optimizer.step()
    assert side.a.weight[:2].abs().min() > 0 and not side.a.weight[2:4].any()
    rows = torch.tensor(side.pattern).repeat(32 * 2 // len(side.pattern)) == 0
    assert side.b.weight[rows][:, :2].abs().min() > 0 and not side.b.weight[rows][:, 2:].any()
    assert side.a.weight[4:].abs().min() > 0 and side.b.weight[~rows].abs().min() > 0


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_new_adapter_changes_nothing_and_only_it_trains(kind: str) -> None:
    cfg = shape(AdapterConfig(kind, rank=3))
    model = build_model(cfg, seed=1, device="cpu", compute_dtype=torch.float32)
    plain = build_model(
        dataclasses.replace(cfg, adapters=None), seed=1, device="cpu", compute_dtype=torch.float32
    )
    with torch.no_grad():
        assert torch.equal(model(TOKENS), plain(TOKENS))
    model(TOKENS).float().square().mean().backward()
    for name, param in model.named_parameters():
        assert (param.grad is not None) == (".adapter." in name), name
    a = model.blocks[0].attention.qkv.adapter.a.weight  # type: ignore[union-attr]
    assert a.shape == (9, 32)
    assert float(a.detach().std()) == pytest.approx(1 / (3 * 32) ** 0.5, rel=0.1)


def test_lengths_are_computed_once_until_something_changes() -> None:
    model = built(AdapterConfig("dora", rank=3))
    plain = merged(model)
    side = model.blocks[0].mlp.down.adapter  # type: ignore[union-attr]
    runs: list[int] = []
    lengths = side.lengths
    side.lengths = lambda *args: runs.append(1) or lengths(*args)
    with torch.no_grad():
        for _ in range(3):
            model(TOKENS)
        assert len(runs) == 1
        side.b.weight.mul_(2.0)
        torch.testing.assert_close(model(TOKENS), merged(model)(TOKENS), atol=3e-6, rtol=1e-5)
        assert len(runs) == 2
        assert (plain(TOKENS) - model(TOKENS)).abs().max() > 1e-3


def test_a_row_of_zeros_stays_zero_under_dora() -> None:
    model = built(AdapterConfig("dora", rank=3))
    layer = model.blocks[0].mlp.down  # type: ignore[union-attr]
    with torch.no_grad():
        for rows in (layer.weight, layer.adapter.b.weight, layer.adapter.magnitude.weight):
            rows[3] = 0.0  # type: ignore[index]
    y = model(TOKENS)
    y.square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in grads)
    assert layer.adapter.magnitude.weight.grad[3] == 0  # type: ignore[union-attr, index]
    merge_adapters(model)
    torch.testing.assert_close(model(TOKENS), y, atol=3e-6, rtol=1e-5)


def test_frozen_weights_save_no_inputs() -> None:
    """What forward keeps for backward shrinks by the inputs of the layers without an adapter."""

    def kept(adapters: AdapterConfig | None) -> int:
        model = built(adapters, n_layers=4)
        return allocated(lambda: model(TOKENS)).kept

    everything, few = kept(None), kept(AdapterConfig(rank=1, targets=["blocks.3.mlp.down"]))
    assert few < 0.4 * everything


def adapted(**changes: Any) -> Case:
    """eps: where a gradient is round-off alone, Adam would make a whole step of it."""
    section = AdapterConfig(**{"rank": 3, **changes})
    what = case(n_layers=3, adapters=section, attention_bias=True)
    return dataclasses.replace(
        what, optim=(("lr", 1e-2), ("eps", 1e-5), ("decay_roles", ["adapter"]))
    )


ALL = adapted()
# Rows of q and gate are not adapted, and a shard of FSDP2 begins within the pattern of q, k and v.
SOME = ["k", "v", "out", "up", "down"]
DORA = adapted(kind="dora", targets=SOME, rank_pattern={"v": 2}, alpha_pattern={"up": 3.0})
LAYOUTS: dict[str, tuple[int, dict[str, Any], Case]] = {
    "DP2": (2, {"replicate": 2}, ALL),
    "FSDP2": (2, {}, ALL),
    "TP2": (2, {"tensor": 2, "sequence": False}, ALL),
    "TP2+SP": (2, {"tensor": 2}, ALL),
    "TP2+SP+FSDP2": (4, {"tensor": 2}, ALL),
    "PP2": (2, {"pipeline": 2}, ALL),
    "DoRA TP2+SP+FSDP2": (4, {"tensor": 2}, DORA),
    "DoRA PP2+TP2 zero bubble": (
        4,
        {"pipeline": 2, "tensor": 2, "pipeline_schedule": "zero_bubble"},
        dataclasses.replace(DORA, model=(*DORA.model, ("n_layers", 4))),
    ),
    "CP2": (2, {"context": 2}, ALL),
}


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_is_the_same_run(layout: str) -> None:
    world, parallel, what = LAYOUTS[layout]
    for ours in run_ranks(world, lambda rank: train_steps(rank, world, what, parallel)):
        assert_same(ours, alone(what))


@pytest.mark.parametrize(
    ("targets", "changes", "says"),
    [
        (["blocks.7.*"], {}, "'blocks.7.*' matches no layer; they are blocks.0.attention.qkv to"),
        (["wq"], {}, "'wq' is no matrix of this model; there are attention, down"),
        (["gate"], {"activation": "gelu"}, "'gate' is no matrix"),
        ([], {}, "is empty"),
    ],
)
def test_targets_that_are_none(targets: list[str], changes: dict[str, Any], says: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError) as caught:
        Decoder(shape(AdapterConfig(targets=targets), **changes))
    assert str(caught.value).startswith("model.adapters.targets: ") and says in str(caught.value)
