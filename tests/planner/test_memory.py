"""The memory of real steps, from the allocator's records, against the planner's estimate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.memory import allocated
from helpers.steps import batch_of, build, setting_of, small_run, step

from llmtrain import ops
from llmtrain.merge.copies import empty_copy
from llmtrain.planner import Setting, draw, fake_world, memory_estimate

pytestmark = pytest.mark.skipif(
    not ops.native_loaded(), reason="the compiled kernels are not built"
)

SHAPE: dict[str, Any] = {
    "model__d_model": 128,
    "model__d_ff": 352,
    "model__vocab_size": 1000,
    "data__seq_len": 96,
    "loss__chunk_tokens": 256,
}
# Few tokens: gradients and gathered weights matter most.
DEEP = SHAPE | {"model__n_layers": 8, "data__seq_len": 16, "model__d_model": 160}
WIDE = SHAPE | {"model__vocab_size": 9000, "data__seq_len": 24, "loss__chunk_tokens": 64}
SELECTIVE, FULL = {"train__recompute": "selective"}, {"train__recompute": "full"}
MICRO = {"train__micro_batch_size": 1}
TIED = {"model__tie_embeddings": True}
TENSOR = {"parallel__tensor": 2}
FACTORS: dict[str, Any] = {"model__factorized": {"multiple_of": 8}}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, SHAPE),
    "selective": (1, SHAPE | SELECTIVE),
    "full": (1, SHAPE | FULL),
    "lion, micro-batches": (1, DEEP | MICRO | {"optim__name": "lion"}),
    "documents": (1, SHAPE | {"data__document_mask": True}),
    "words": (1, WIDE),
    "words, tied, micro-batches": (1, WIDE | TIED | {"train__micro_batch_size": 2}),
    "fsdp": (2, SHAPE),
    "fsdp, selective": (2, SHAPE | SELECTIVE),
    "fsdp, full": (2, DEEP | FULL),
    "fsdp, micro-batches": (2, DEEP | MICRO),
    "fsdp, each reduced": (2, DEEP | MICRO | {"parallel__reduce_every_micro_batch": True}),
    "fsdp, kept": (2, DEEP | {"parallel__reshard_after_forward": False}),
    "fsdp, words": (2, WIDE),
    "replicas": (2, SHAPE | TIED | {"parallel__replicate": 2}),
    "tensor": (2, SHAPE | TENSOR),
    "tensor, plain": (2, SHAPE | TENSOR | {"parallel__sequence": False}),
    "tensor, full": (2, SHAPE | TENSOR | FULL),
    "tensor, selective, tied": (2, DEEP | TENSOR | SELECTIVE | TIED),
    "context": (4, SHAPE | {"parallel__context": 2}),
    "ring": (2, SHAPE | {"parallel__context": 2, "parallel__context_method": "ring"}),
    "tensor, fsdp": (4, SHAPE | TENSOR | MICRO),
    "factors": (1, SHAPE | FACTORS),
    "factors, tensor, fsdp": (4, SHAPE | FACTORS | TENSOR),
    "factors, full": (1, SHAPE | FACTORS | FULL),
    "factors, selective": (2, SHAPE | FACTORS | TENSOR | SELECTIVE),
}


def measured(setting: Setting) -> tuple[int, int]:
    """Bytes that rank 0 holds between steps, and the most in two steps."""
    with fake_world(0, setting.degrees.world):
        made = allocated(lambda: build(setting, 0))
        batch = batch_of(setting)
        first = allocated(lambda: step(made.result, batch))
        second = allocated(lambda: step(made.result, batch))
    kept = made.kept + first.kept
    return kept, max(made.kept + first.peak, kept + second.peak)


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_within_a_tenth_of_what_the_allocator_gave(case: str) -> None:
    world, changes = CASES[case]
    setting = setting_of(small_run(**changes), world)
    state, peak = measured(setting)
    estimate = memory_estimate(setting, draw(setting))
    assert estimate.peak == pytest.approx(peak, rel=0.1)
    # Tables of rotary positions and the like are not counted.
    assert sum(estimate.state.values()) == pytest.approx(state, rel=0.01)


@pytest.mark.parametrize("world", [1, 2])
def test_bf16_copies_are_counted(world: int) -> None:
    setting = setting_of(small_run(**DEEP), world, torch.bfloat16)
    state, peak = measured(setting)
    estimate = memory_estimate(setting, draw(setting))
    assert estimate.peak == pytest.approx(peak, rel=0.1)
    assert sum(estimate.state.values()) == pytest.approx(state, rel=0.01)


@pytest.mark.parametrize("world", [1, 2])
def test_copies_of_a_penalty_are_counted(world: int) -> None:
    ewc = {"penalty__kind": "ewc", "penalty__fisher": "some/run"}
    cases = (({"penalty__kind": "l2"}, 1), (ewc, 2), ({**ewc, "penalty__offload": True}, 0))
    for section, copies in cases:
        setting = setting_of(small_run(**DEEP, **section), world)
        with fake_world(0, setting.degrees.world):
            params = build(setting, 0).params
            found = allocated(lambda n=copies, p=params: [empty_copy(p, False) for _ in range(n)])
        assert memory_estimate(setting, draw(setting)).state.get("penalty", 0) == found.kept


def test_the_fullest_moment_moves_with_the_run() -> None:
    def fullest(changes: dict[str, Any], world: int = 1) -> str:
        setting = setting_of(small_run(**changes), world)
        moments = memory_estimate(setting, draw(setting)).moments
        return max(moments, key=lambda m: moments[m])

    assert fullest(DEEP | MICRO, world=2) == "at the start of backward"
    many = {"data__seq_len": 96, "loss__chunk_tokens": 256}
    assert fullest(WIDE | TIED | many) == "in the loss"
    assert fullest(DEEP | FULL, world=2) == "at the end of backward"
    assert fullest(DEEP | {"optim__name": "lion"}) == "in the optimizer's step"
