"""DeepSpeed as the engine: the run of one native process, under every ZeRO stage."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch
from helpers.layout_runs import (
    Case,
    Outcome,
    alone,
    assert_same,
    build,
    case,
    one_step,
    outcome,
    rank_batch,
    train_steps,
)
from helpers.ranks import run_ranks

from llmtrain.config.adapters import AdapterConfig
from llmtrain.errors import EnvironmentFault
from llmtrain.parallel.zero import import_deepspeed

pytestmark = pytest.mark.dist

TIED = case(tie_embeddings=True, n_kv_heads=1, position="learned")
# All kinds of vectors and placements: biases of either side, norms with biases, head norms.
# eps: where a gradient is round-off alone, Adam would make a whole step of it.
RICH = dataclasses.replace(
    case(
        micro=2, norm="layernorm", norm_bias=True, activation="gelu", attention_bias=True,
        attention_out_bias=True, mlp_bias=True, qk_norm="head",
    ),
    optim=(("eps", 1e-6),),
)  # fmt: skip
LION = dataclasses.replace(
    case(qk_norm="full", norm_placement="post_branch"),
    train=(("micro_batch_size", 2), ("recompute", "full")),
    optim=(("name", "lion"), ("lr", 3e-4), ("decoupled", "fully"), ("weight_decay", 0.02),
           ("lr_factors", {"embedding": 0.3, "norm": 2.0})),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Ranks are forked: what is imported here they need not import."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import_deepspeed(torch.device("cpu"))


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"engine": "deepspeed", "zero_stage": stage, **more}


RUNS: dict[str, tuple[Case, int, dict[str, Any]]] = {
    "ZeRO-1": (TIED, 2, zero(1)),
    "ZeRO-2": (TIED, 2, zero(2)),
    "ZeRO-3": (TIED, 2, zero(3)),
    "ZeRO-3 on 3 ranks": (RICH, 3, zero(3)),
    "ZeRO-2 offloaded, Lion": (LION, 2, zero(2, offload_optimizer=True)),
    "ZeRO-3 offloaded, Lion": (LION, 2, zero(3, offload_optimizer=True)),
    "ZeRO-1 x TP2+SP": (TIED, 4, zero(1, tensor=2)),
    "ZeRO-2 x TP2": (RICH, 4, zero(2, tensor=2, sequence=False)),
    "ZeRO-3 x TP2+SP": (RICH, 4, zero(3, tensor=2)),
}

ADAPTED = dataclasses.replace(
    case(2, tie_embeddings=True, adapters=AdapterConfig(rank=3, rank_pattern={"v": 2})),
    optim=(("lr", 1e-2), ("eps", 1e-5), ("decay_roles", ["adapter"])),
)
DORA = dataclasses.replace(
    ADAPTED,
    model=(
        *case(2, adapters=AdapterConfig("dora", rank=3, targets=["k", "v", "out", "mlp"])).model,
    ),
)
RUNS |= {
    "DoRA, ZeRO-2": (DORA, 2, zero(2)),
    "DoRA, ZeRO-3 x TP2+SP": (DORA, 4, zero(3, tensor=2)),
    "adapters, ZeRO-1": (ADAPTED, 2, zero(1)),
    "adapters, ZeRO-2": (ADAPTED, 2, zero(2)),
    "adapters, ZeRO-3 x TP2+SP": (ADAPTED, 4, zero(3, tensor=2)),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_few_steps(run: str) -> None:
    what, world, parallel = RUNS[run]
    for ours in run_ranks(world, lambda rank: train_steps(rank, world, what, parallel)):
        # Frozen weights are no state of the engine.
        expected = alone(what)
        kept = {name: expected.weights[name] for name in ours.weights}
        assert ours.weights and (what in (ADAPTED, DORA) or kept.keys() == expected.weights.keys())
        assert_same(ours, dataclasses.replace(expected, weights=kept))


def interrupted(rank: int, world: int, parallel: dict[str, Any], compute: torch.dtype) -> Outcome:
    """Steps of which the guard drops one, with an evaluation in between."""
    what = dataclasses.replace(TIED, compute=compute)
    module = build(rank, world, what, parallel)
    steps = [one_step(module, 0)]
    module.forward_backward(rank_batch(module, 7), 3.0, 2)
    module.gradient_norm()
    module.drop_gradients()
    steps.append(one_step(module, 1))
    module.model.eval()
    with torch.no_grad():
        evaluated = float(module.loss(rank_batch(module, 8), 3.0).loss)
    module.model.train()
    evaluated = module.layout.world.sum([evaluated / module.layout.degrees.tensor])[0]
    return outcome(module, [*steps, (evaluated, 0.0), one_step(module, 2)])


@pytest.mark.parametrize(
    ("stage", "offload"), [(1, False), (2, False), (3, False), (2, True), (3, True)]
)
def test_a_dropped_step_and_an_evaluation_leave_no_trace(stage: int, offload: bool) -> None:
    expected = interrupted(0, 1, {}, torch.float32)
    parallel = zero(stage, offload_optimizer=offload)
    for ours in run_ranks(2, lambda rank: interrupted(rank, 2, parallel, torch.float32)):
        assert_same(ours, expected)


def test_bf16_is_the_same_under_every_stage_and_close_to_fsdp2() -> None:
    """Masters stay float32, and the reduction too; products are the same bf16 ones."""
    native = run_ranks(2, lambda rank: interrupted(rank, 2, {}, torch.bfloat16))[0]
    runs = []
    for stage, offload in ((1, False), (2, False), (2, True), (3, True)):
        parallel = zero(stage, offload_optimizer=offload)
        ranks = run_ranks(2, lambda rank, p=parallel: interrupted(rank, 2, p, torch.bfloat16))
        runs.append(ranks[0])
    for ours in runs[1:]:
        assert_same(ours, runs[0], rel=1e-6, atol=1e-6)
    assert_same(runs[0], native, rel=3e-3, atol=3e-3)
    assert any(not torch.equal(w, w.bfloat16().float()) for w in runs[0].weights.values())


def kept_weights(rank: int) -> list[list[int]]:
    """Elements of the weights that products keep between forward and backward."""
    module = build(rank, 2, case(), zero(3))
    seen: set[Any] = set()
    found = []

    def walk(node: Any) -> None:
        if node is None or node in seen:
            return
        seen.add(node)
        if "Linear" in node.name():
            found.append([t.numel() for t in node.saved_tensors[1:] if t is not None])
        for child, _ in node.next_functions:
            walk(child)

    walk(module.loss(rank_batch(module, 0), 1.0).loss.grad_fn)
    return found


def test_zero_3_keeps_no_whole_weight_between_forward_and_backward() -> None:
    found = run_ranks(2, kept_weights)[0]
    assert len(found) == 3 * 4
    assert all(sizes == [0] for sizes in found)


def test_no_compiler_is_loaded_for_what_is_not_used() -> None:
    from deepspeed.runtime.zero.muon import original_muon

    assert not hasattr(original_muon.muon_update, "_torchdynamo_orig_callable")


def test_without_deepspeed_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import deepspeed

    monkeypatch.setattr(deepspeed, "__version__", "0.14.0")
    with pytest.raises(EnvironmentFault, match=r"0\.14\.0 is installed.*pip install"):
        import_deepspeed(torch.device("cpu"))
    monkeypatch.setitem(__import__("sys").modules, "deepspeed", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'llmtrain\[deepspeed\]'") as caught:
        import_deepspeed(torch.device("cpu"))
    assert caught.value.exit_code == 2
