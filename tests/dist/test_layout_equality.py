"""A few steps on every layout against one process: losses, gradient norms and final weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.layout_runs import Case, Outcome, alone, assert_same, case, train_steps
from helpers.ranks import run_ranks

from llmtrain.config.factorized import FactorizedConfig

# Tied, fewer key/value heads than some of the layouts have ranks, three layers, an odd number of
# sequences a rank, accumulation.
TIED = case(tie_embeddings=True, n_kv_heads=1)
UNTIED = case(attention_bias=True, qk_norm="head")

# Where a rank has three sequences.
SINGLY = dataclasses.replace(TIED, train=(("micro_batch_size", 1),))

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2": (2, {"replicate": 2}),
    "FSDP2": (2, {}),
    "FSDP4": (4, {}),
    "HSDP2x2": (4, {"replicate": 2}),
    "FSDP2, three blocks ahead": (2, {"prefetch": 3}),
    "ZeRO-2": (2, {"reshard_after_forward": False, "reduce_every_micro_batch": True}),
    "TP2": (2, {"tensor": 2, "sequence": False}),
    "TP2+SP": (2, {"tensor": 2}),
    "TP4+SP": (4, {"tensor": 4}),
    "TP2+SP+FSDP2": (4, {"tensor": 2}),
    "TP2+SP+DP2": (4, {"tensor": 2, "replicate": 2}),
}


def _compare(layout: str, what: Case) -> None:
    world, parallel = LAYOUTS[layout]
    for ours in run_ranks(world, lambda rank: train_steps(rank, world, what, parallel)):
        assert_same(ours, alone(what))


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_few_steps(layout: str) -> None:
    _compare(layout, SINGLY if layout == "FSDP4" else TIED)


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["FSDP2", "TP2+SP", "TP2+SP+FSDP2"])
def test_a_few_steps_with_a_head_of_its_own(layout: str) -> None:
    _compare(layout, UNTIED)


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["FSDP2", "TP2", "TP4+SP", "TP2+SP+FSDP2"])
def test_a_few_steps_with_factors(layout: str) -> None:
    """The factor towards the stream is whole on every rank, which sees its own tokens alone."""
    section = FactorizedConfig(activation="silu", density_u=0.3, multiple_of=1)
    recompute = "selective" if layout == "TP4+SP" else "none"
    what = case(factorized=section, attention_bias=True, attention_out_bias=True, mlp_bias=True)
    _compare(layout, dataclasses.replace(what, train=(*what.train, ("recompute", recompute))))


@pytest.mark.dist
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_parallel_branches_and_heads_that_turn_in_part(recompute: str) -> None:
    """GPT-NeoX: both branches read the same stream."""
    what = case(
        steps=3, parallel_residual=True, rope_fraction=0.5, norm="layernorm", norm_bias=True,
        mlp_bias=True, dropout=0.1,
    )  # fmt: skip
    expected = alone(what)
    assert expected.losses != alone(case(steps=3)).losses
    what = dataclasses.replace(what, train=(("micro_batch_size", 3), ("recompute", recompute)))
    for ours in run_ranks(2, lambda rank: train_steps(rank, 2, what, {"tensor": 2})):
        assert_same(ours, expected)


@pytest.mark.dist
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_dropout_masks_do_not_depend_on_the_layout(recompute: str) -> None:
    what = case(dropout=0.2, steps=3)
    expected = alone(what)
    assert expected.losses != alone(case(steps=3)).losses
    what = dataclasses.replace(what, train=(("micro_batch_size", 3), ("recompute", recompute)))
    for ours in run_ranks(4, lambda rank: train_steps(rank, 4, what, {"tensor": 2})):
        assert_same(ours, expected)


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["FSDP2", "TP2", "TP2+SP"])
def test_bf16_differs_no_more_than_its_own_noise(layout: str) -> None:
    """Two bf16 runs of one layout each differ as either differs from float32: by rounding."""
    what = dataclasses.replace(UNTIED, compute=torch.bfloat16)
    twin, exact = alone(what), alone(UNTIED)
    world, parallel = LAYOUTS[layout]
    ours = run_ranks(world, lambda rank: train_steps(rank, world, what, parallel))[0]
    for name in ("losses", "norms"):
        a, b, c = (torch.tensor(getattr(run, name)) for run in (ours, twin, exact))
        noise = (b - c).norm()
        assert 0 < (a - b).norm() < 2 * noise and (a - c).norm() < 2 * noise, name


@pytest.mark.dist
def test_deterministic_runs_are_the_same_to_the_bit() -> None:
    what = dataclasses.replace(TIED, steps=2)

    def body(rank: int) -> Outcome:
        torch.use_deterministic_algorithms(True)
        return train_steps(rank, 4, what, {"tensor": 2})

    first, second = (run_ranks(4, body)[0] for _ in range(2))
    assert first.losses == second.losses and first.norms == second.norms
    for name, value in first.weights.items():
        assert torch.equal(value, second.weights[name]), name


@pytest.mark.dist
@pytest.mark.slow
def test_compiled_blocks_under_tensor_parallelism() -> None:
    import torch._inductor.compile_fx  # noqa: F401 ranks are forked: they need not import it

    what = case(steps=2, n_layers=1)
    expected = alone(what)
    what = dataclasses.replace(what, train=(("micro_batch_size", 3), ("compile", True)))
    for ours in run_ranks(2, lambda rank: train_steps(rank, 2, what, {"tensor": 2}), timeout=240):
        assert_same(ours, expected)
