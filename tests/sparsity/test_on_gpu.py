"""What a GPU has for which masks, the race between its products, and how it reaches the layers.

No GPU: the race runs the references on the CPU, and the device is replaced.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.config.sparsity import SparsityConfig
from llmtrain.errors import ConfigError
from llmtrain.linear import BF16, BLOCKS, BlockMatmul, Linear, MaskedMatmul, SemiMatmul
from llmtrain.methods import sparsity as methods
from llmtrain.model import complete
from llmtrain.sparsity import (
    Case,
    Choice,
    Masks,
    auto,
    cases_of,
    on_gpu,
    parse_granularity,
    pick_products,
    product_lines,
    prune_again,
    random_kept,
    sparse_layers,
)
from llmtrain.sparsity.case import BOTH, FORWARD, semi_of, semi_of_mask
from llmtrain.sparsity.select import Sparse

GPU = torch.device("cuda", 0)
SEMI = Case(1024, 1024, (1, 1), 50, "bfloat16", FORWARD)
TILES = Case(1024, 1024, (64, 64), 10, "bfloat16")


@pytest.mark.parametrize(
    ("text", "double", "semi"),
    [
        ("2:4", False, FORWARD),
        ("2:4", True, BOTH),
        ("2:4t", False, BOTH),
        ("1:2", False, FORWARD),
        ("1:4", False, FORWARD),
        ("4:8", False, ""),
        ("2:6", False, ""),
        ("4x4", False, ""),
        ("unstructured", False, ""),
    ],
)
def test_which_masks_are_two_of_four(text: str, double: bool, semi: str) -> None:
    """By name as by what the masks hold."""
    granularity = parse_granularity(text)
    assert semi_of(granularity, double) == semi
    if granularity.block != (1, 1):
        return
    kept = random_kept(
        granularity, granularity.density(0.5, "x") if not granularity.m else 0, (48, 48), (1, "a")
    )
    back = prune_again(granularity, kept, (1, "a"), 0, (48, 0)) if double else None
    assert semi_of_mask(kept, back) == semi


def test_what_gpus_have_is_said() -> None:
    refused = {
        Case(1024, 1024, (1, 1), 50, "float32", FORWARD): "bfloat16",
        Case(1000, 1024, (1, 1), 50, "bfloat16", FORWARD): "multiples of 64",
        Case(1024, 1024, (1, 1), 25, "bfloat16"): "blocks of 64x64 alone",
        Case(1024, 1024, (64, 32), 25, "bfloat16"): "blocks of 64x64 alone",
        Case(1020, 1024, (64, 64), 25, "bfloat16"): "multiples of 8",
    }
    for case, reason in refused.items():
        assert reason in on_gpu.promise(case) and on_gpu.promise(case).startswith("dense products")
    assert on_gpu.why_never(SEMI) == on_gpu.why_never(TILES) == ""


def test_a_plan_for_a_gpu_elsewhere_says_what_it_has() -> None:
    model = complete(
        ModelConfig(vocab_size=64, d_model=64, n_layers=1, n_heads=4, d_ff=128), None, 8
    )
    lines = {}
    for method in ("static", "slope"):
        cfg = RunConfig(sparsity=SparsityConfig(granularity="2:4", method=method))
        assert cfg.sparsity is not None
        layers = sparse_layers(model, cfg.sparsity)
        lines[method] = product_lines(cfg, layers, torch.bfloat16, False, None)
        dense = RunConfig(sparsity=SparsityConfig(granularity="2:4", products="dense"))
        assert product_lines(dense, layers, torch.bfloat16, False, None) == [
            "products of 4 sparse layers: dense"
        ]
    assert lines["static"][1] == (
        "  blocks.0.attention.qkv (192x64 2:4, 50% kept, bfloat16): on a GPU, 2:4 products by "
        "cuSPARSELt or CUTLASS forward where they are the faster"
    )
    assert "2:4 both ways, 50%" in lines["slope"][1] and "forward and backward" in lines["slope"][1]


@pytest.mark.parametrize("text", ["2:4", "2:4t", "4:8", "unstructured", "4x4"])
def test_masks_are_called_by_their_granularity_on_a_cpu(text: str) -> None:
    model = complete(
        ModelConfig(vocab_size=64, d_model=64, n_layers=1, n_heads=4, d_ff=128), None, 8
    )
    section = SparsityConfig(granularity=text, density=0.5)
    layers = sparse_layers(model, section)
    lines = product_lines(RunConfig(sparsity=section), layers, torch.float32, True, None)
    assert f"(192x64 {text}, 50% kept, float32): dense" in lines[1]
    masks, _ = masks_of(text, "auto", torch.device("cpu"))
    masks.install()
    assert f"a (64x128 {text}, 50% kept, bfloat16): dense" in masks.lines()[0]


def test_the_fastest_wins_the_race(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "TOKENS", 24)
    device, case = torch.device("cpu"), Case(128, 192, (64, 64), 50, "bfloat16")
    times = itertools.count(3, -1)

    def clock(work: Callable[[], object]) -> float:
        work()
        return float(next(times))

    assert on_gpu.race(case, [BLOCKS], device, clock) == Choice(3.0, 2.0, kind=BLOCKS)
    # Two libraries refuse what lies on a CPU.
    semi = Case(128, 192, (1, 1), 50, "bfloat16", BOTH)
    found = on_gpu.race(semi, ["cutlass"], device, clock)
    assert not found.faster and found.reason.startswith("cutlass refuses: ")


def test_choices_are_remembered_with_their_product(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Case] = []
    running = ["cutlass"]

    def measure(case: Case, device: torch.device) -> Choice:
        asked.append(case)
        return Choice(3.0, 2.0, kind=running[0])

    def kinds_of(case: Case, device: torch.device) -> tuple[list[str], str]:
        reason = on_gpu.why_never(case)
        return ([], reason) if reason else (running, "")

    monkeypatch.setattr(on_gpu, "measure", measure)
    monkeypatch.setattr(on_gpu, "kinds_of", kinds_of)
    monkeypatch.setattr(on_gpu, "device_words", lambda device: ("a GPU",))
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path))
    small = Case(64, 64, (1, 1), 50, "bfloat16", BOTH)
    wide = Case(1024, 1024, (1, 1), 50, "float32")
    for _ in range(2):
        found = pick_products([SEMI, small, wide], gpu=GPU)
        assert str(found[SEMI]) == "sparse products (sparse by CUTLASS are 1.50 times as fast)"
        assert found[SEMI].kind == "cutlass" and not found[small].faster
        assert "of bfloat16" in str(found[wide])
    assert asked == [SEMI]
    stored = json.loads(auto.cache_file(GPU).read_text())
    assert stored == {str(SEMI): [3.0, 2.0, "cutlass"]}
    running[0] = "cusparselt"  # the other library is gone: measured again
    assert pick_products([SEMI], gpu=GPU)[SEMI].kind == "cusparselt" and asked == [SEMI, SEMI]


def masks_of(text: str, products: str, device: torch.device = GPU) -> tuple[Masks, Linear]:
    """Masks of one layer on what is taken for ``device``."""
    layer = Linear(128, 64, matmul=BF16)
    world = SimpleNamespace(device=torch.device("cpu"), cpu_group=None)
    model = nn.Module()
    granularity = parse_granularity(text)
    sparse = {"a": Sparse("a", (64, 128), granularity, 0.5)}
    masks = Masks(model, {}, SimpleNamespace(world=world, tensor=None), {})  # type: ignore[arg-type]
    masks.sparse, masks.layers, masks._boxes = sparse, {"a": layer}, {"a": ((0, 0), (64, 128))}
    masks.products = products
    masks.draw(1)
    masks.device = device
    return masks, layer


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [("2:4", "cutlass", SemiMatmul), ("64x64", BLOCKS, BlockMatmul), ("4x4", "", MaskedMatmul)],
)
@pytest.mark.parametrize("products", ["auto", "sparse", "dense"])
def test_layers_get_what_was_chosen(
    text: str, kind: str, expected: type, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``sparse``: the best sparse product even where dense is faster."""
    masks, layer = masks_of(text, products)
    dense_wins = products == "sparse"

    def pick(cases: set[Case], group: object, gpu: torch.device) -> dict[Case, Choice]:
        assert gpu == GPU
        choice = Choice(1.0 if dense_wins else 3.0, 2.0, kind=kind) if kind else Choice(0, 0, "no")
        return dict.fromkeys(cases, choice)

    monkeypatch.setattr("llmtrain.sparsity.masks.pick_products", pick)
    if products == "sparse" and not kind:
        with pytest.raises(ConfigError, match=r"products: sparse: a: GPUs have .* use auto"):
            masks.install()
        return
    masks.install()
    assert type(layer.matmul) is (MaskedMatmul if products == "dense" else expected)
    assert len(masks.lines()) == (products == "auto")
    if products != "dense":
        (case,) = masks.choices
        assert case.semi == (FORWARD if text == "2:4" else "")


def test_a_layer_too_small_to_time_is_sparse_where_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    masks, layer = masks_of("2:4", "sparse")
    monkeypatch.setattr("llmtrain.sparsity.masks.kinds_of", lambda case, gpu: (["cutlass"], ""))
    monkeypatch.setattr(
        "llmtrain.sparsity.masks.pick_products",
        lambda cases, group, gpu: dict.fromkeys(cases, Choice(0, 0, "too small to matter")),
    )
    masks.install()
    assert isinstance(layer.matmul, SemiMatmul)


def test_what_was_asked_for_and_no_gpu_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "pick_device", lambda wanted, rank: GPU)
    bf16 = SimpleNamespace(compute=torch.bfloat16)
    monkeypatch.setattr(methods, "resolve_precision", lambda cfg, device: bf16)
    section = SparsityConfig(density=0.25, products="sparse")
    layers = {"a": Sparse("a", (64, 128), parse_granularity("4x4"), 0.25)}
    with pytest.raises(ConfigError, match=r"sparse: a: GPUs have sparse products for 2:4"):
        methods.check_products(RunConfig(sparsity=section), section, layers)
    free = SparsityConfig(density=0.25)
    methods.check_products(RunConfig(sparsity=free), free, layers)


def test_whole_layers_are_cut_like_their_weights() -> None:
    layers = {
        name: Sparse(name, (256, 128), parse_granularity("2:4t"), 0.5)
        for name in ("blocks.0.mlp.up", "blocks.0.mlp.down")
    }
    cases = cases_of(layers, 2, torch.bfloat16, gpu=True)
    assert cases["blocks.0.mlp.up"] == Case(128, 128, (1, 1), 50, "bfloat16", BOTH)
    assert cases["blocks.0.mlp.down"] == Case(256, 64, (1, 1), 50, "bfloat16", BOTH)
