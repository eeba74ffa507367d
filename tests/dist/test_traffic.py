"""The bytes that real steps move, counted, against the planner's closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.steps import Sent, build, count_step, setting_of, small_run
from torch.distributed.tensor import DTensor

from llmtrain.planner import Setting, Traffic, draw, fake_world, step_traffic


def predicted(setting: Setting, rank: int = 0, stage: int = 0) -> Sent:
    """The closed forms, added up by collective and group; numbers over the world left out."""
    found: Sent = {}
    for t in step_traffic(setting, draw(setting, rank), stage):
        if t.over != "world":
            calls, payload = found.get(key := (t.collective, t.over, t.ranks), (0, 0))
            found[key] = (calls + t.calls, payload + t.payload)
    return found


TENSOR = {"parallel__tensor": 2}
PLAIN = {"parallel__sequence": False}
MICRO = {"train__micro_batch_size": 1}
CONTEXT = {"parallel__context": 2}
RING = {"parallel__context_method": "ring"}
PIPELINE = {"parallel__pipeline": 2} | MICRO
ADAPTERS = {"model__adapters": {"rank": 3}}
FACTORS = {"model__factorized": {"multiple_of": 8}, "model__attention_bias": True}
ZERO_BUBBLE = {"parallel__pipeline_schedule": "zero_bubble", "model__n_layers": 5}
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, TENSOR),
    (2, TENSOR | PLAIN),
    (2, TENSOR | MICRO | {"parallel__keep_gathered": True}),
    (2, {}),
    (2, MICRO | {"parallel__reshard_after_forward": False}),
    (2, {"parallel__replicate": 2}),
    (4, TENSOR | MICRO),
    (4, {"parallel__replicate": 2} | MICRO),
    (4, CONTEXT),
    (4, CONTEXT | RING | MICRO),
    (4, PIPELINE | {"model__tie_embeddings": True}),
    (4, PIPELINE | TENSOR | {"parallel__pipeline_schedule": "gpipe"}),
    (4, PIPELINE | {"parallel__reshard_after_forward": False, "parallel__replicate": 2}),
    (4, PIPELINE | {"parallel__pipeline_schedule": "interleaved", "model__n_layers": 5}),
    (2, ADAPTERS),
    (4, ADAPTERS | TENSOR | MICRO),
    (2, ADAPTERS | TENSOR | PLAIN),
    (2, {"model__adapters": {"targets": ["blocks.1.*", "blocks.2.mlp.up"]}} | TENSOR),
    (2, {"model__adapters": {"rank": 3, "kind": "dora"}} | TENSOR | PLAIN),
    (4, ADAPTERS | TENSOR | PIPELINE | ZERO_BUBBLE),
    (4, PIPELINE | ZERO_BUBBLE),
    (4, PIPELINE | ZERO_BUBBLE | TENSOR),
    (4, PIPELINE | ZERO_BUBBLE | TENSOR | PLAIN),
    (4, PIPELINE | ZERO_BUBBLE | CONTEXT),
    (4, {"parallel__tensor": 4, "model__n_kv_heads": 2, "model__attention_bias": True}),
    (4, FACTORS | TENSOR | MICRO),
]


def named(layouts: list[tuple[int, dict[str, Any]]]) -> list[Any]:
    texts = [", ".join(f"{k.partition('__')[2]} {v}" for k, v in c.items()) for _, c in layouts]
    return [
        pytest.param(world, changes, id=f"{world}: {text or 'fsdp'}")
        for (world, changes), text in zip(layouts, texts, strict=True)
    ]


@pytest.mark.dist
@pytest.mark.parametrize(("world", "changes"), named(LAYOUTS))
def test_a_step_on_real_ranks_moves_what_the_formulas_say(
    world: int, changes: dict[str, Any]
) -> None:
    setting = setting_of(small_run(**changes), world)
    for rank, sent in enumerate(run_ranks(world, count_step, setting)):
        stage = rank // (world // setting.degrees.pipeline)
        assert sent == predicted(setting, rank, stage)


@pytest.mark.dist
def test_a_plan_leaves_nothing_behind_for_a_run_in_the_same_process() -> None:
    """DTensor remembers results by mesh, and meshes of the same ranks are equal."""
    setting = setting_of(small_run(**PIPELINE), 4)
    for rank in range(4):
        draw(setting, rank)

    def body(rank: int) -> int:
        state = build(setting, rank).tensors()
        whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in state.values()]
        return sum(t.numel() for t in whole)

    assert all(count > 0 for count in run_ranks(4, body))


# One rank of many: the collectives do nothing, but the rank makes them all the same.
LARGE: list[tuple[int, dict[str, Any]]] = [
    (64, {"parallel__tensor": 8, "parallel__replicate": 2, "model__n_heads": 8} | MICRO),
    (16, {"parallel__tensor": 4, "model__n_kv_heads": 2, "model__qk_norm": "full"}),
    (16, {"parallel__tensor": 4, "model__n_kv_heads": 1, "model__qk_norm": "head"} | PLAIN),
    (8, TENSOR | {"model__norm": "layernorm", "model__norm_bias": True, "model__mlp_bias": True}),
    (8, TENSOR | {"model__position": "learned", "model__tie_embeddings": True} | MICRO),
    (8, TENSOR | {"train__recompute": "full"} | MICRO),
    (8, TENSOR | PLAIN | {"train__recompute": "full"}),
    (8, TENSOR | {"train__recompute": "selective"}),
    (8, TENSOR | MICRO | {"parallel__reduce_every_micro_batch": True}),
    (8, {"parallel__tensor": 2, "data__seq_len": 23} | MICRO),
    (16, {"parallel__context": 4, "parallel__tensor": 2, "model__n_kv_heads": 2} | MICRO),
    (8, CONTEXT | {"train__recompute": "full"}),
    (16, {"parallel__context": 4} | TENSOR | RING),
    (8, FACTORS | TENSOR | PLAIN),
    (16, FACTORS | {"parallel__tensor": 4, "model__n_kv_heads": 2, "train__recompute": "full"}),
    (
        8,
        {"model__factorized": {"layers": ["blocks.1.*"]}}
        | TENSOR
        | {"parallel__keep_gathered": True},
    ),
    (12, {"parallel__replicate": 4, "model__vocab_size": 130}),
]


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("world", "changes"), named(LARGE))
def test_a_step_of_one_of_many_ranks_moves_what_the_formulas_say(
    world: int, changes: dict[str, Any], compute: torch.dtype
) -> None:
    setting = setting_of(small_run(train__global_batch_size=2 * world, **changes), world, compute)
    with fake_world(0, world):
        sent = count_step(0, setting)
    assert sent == predicted(setting)


def test_what_a_rank_sends_of_a_collective() -> None:
    def sent(collective: str) -> int:
        return Traffic("x", collective, "shard", 4, 3, 1200).sent

    assert sent("all-gather") == sent("reduce-scatter") == 900
    assert sent("all-reduce") == 1800
    assert sent("send") == 1200


def totals(**changes: Any) -> dict[str, int]:
    """Payload in the blocks by collective, for four tensor-parallel ranks."""
    setting = setting_of(small_run(parallel__tensor=4, **changes), 4)
    traffic = step_traffic(setting, draw(setting))
    return {t.collective: t.payload for t in traffic if t.what == "blocks"}


def test_sequence_parallelism_adds_two_gathers_a_layer_and_nothing_else() -> None:
    layers, payload = 3, 8 * 24 * 32 * 4
    plain, split = totals(parallel__sequence=False), totals()
    assert plain == {"all-reduce": layers * (2 + 2) * payload}
    kept = totals(parallel__keep_gathered=True)
    # An all-reduce is a reduce-scatter and an all-gather.
    assert kept == {"all-gather": plain["all-reduce"], "reduce-scatter": plain["all-reduce"]}
    assert split["all-gather"] - kept["all-gather"] == layers * 2 * payload
    assert split["reduce-scatter"] == kept["reduce-scatter"]
