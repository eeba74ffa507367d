"""Machines that compute wrongly without a word: replayed steps, and copies that differ."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.steps import batch_of, build, setting_of, small_run, step
from helpers.tiny import make_corpus, records, tiny_config
from safetensors import safe_open

from llmtrain.config import load_config
from llmtrain.errors import GuardStop
from llmtrain.parallel import World, init_world
from llmtrain.train import Hook
from llmtrain.train.replicas import verify_replicas, words_hash
from llmtrain.train.run import train

FAULTS = ("none", "transient", "persistent", "genuine", "bit")


class Fault(Hook):
    """What goes wrong in the third step, on rank 1 or with sample 13."""

    def __init__(self, kind: str) -> None:
        self.kind, self.calls = kind, 0

    def on_run_start(self, trainer: Any) -> None:
        inner: Callable[..., Any] = trainer.module.forward_backward

        def forward_backward(batch: Any, *rest: Any) -> Any:
            sums = inner(batch, *rest)
            if trainer.step_done != 2:
                return sums
            self.calls += 1
            here = trainer.world.rank == 1
            bad = {
                "transient": here and self.calls == 1,
                "persistent": here,
                "genuine": 13 in batch.sample_ids.tolist(),
            }
            if bad.get(self.kind):
                sums = replace(sums, loss=sums.loss * float("nan"))
            return sums

        trainer.module.forward_backward = forward_backward

    def after_step(self, trainer: Any, result: Any) -> None:
        if self.kind == "bit" and result.step == 3 and trainer.world.rank == 1:
            flip(trainer.module.tensors()["optim.blocks.1.mlp.up.weight.exp_avg"])


def flip(tensor: Any) -> None:
    tensor.detach().to_local().view(-1).view(torch.int32)[5] ^= 1 << 3


def runs(rank: int, config: Path) -> dict[str, str]:
    """What each fault's run ends with."""
    world, said = init_world("cpu"), {}
    for kind in FAULTS:
        cfg = load_config(config, [f"name={kind}", f"hooks.0.args.kind={kind}"])
        try:
            train(cfg, world)
            said[kind] = "done"
        except GuardStop as stop:
            said[kind] = str(stop)
    return said


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """Every fault on three replicas, one after the other."""
    folder = tmp_path_factory.mktemp("faults")
    changes = {
        "train__duration": "6step",
        "train__global_batch_size": 6,
        "train__verify_replicas": "2step",
        "parallel__replicate": 3,
        "eval__every": None,
        "eval__samples": 3,
        "checkpoint__every": None,
        "guard": {"nonfinite": "skip"},
        "hooks": [{"use": "silent_faults:Fault", "args": {"kind": "none"}}],
    }
    config = tiny_config(folder, make_corpus(folder, documents=40), **changes)
    sys.modules["silent_faults"] = sys.modules[__name__]
    return folder / "runs", run_ranks(3, runs, config)


def events(run: Path) -> list[str]:
    return [event["text"] for event in records(run, "event") if "suspicious" in event["text"]]


@pytest.mark.dist
def test_a_transient_fault_costs_nothing(outcome: tuple[Path, list[dict[str, str]]]) -> None:
    folder, said = outcome
    assert said[0]["transient"] == said[0]["none"] == "done"
    (text,) = events(folder / "transient")
    assert "transient" in text and text.endswith("the machine of data rank 1")
    losses = [[r["loss"] for r in records(folder / kind)] for kind in ("none", "transient")]
    assert losses[0] == losses[1]
    assert events(folder / "none") == []


@pytest.mark.dist
def test_a_persistent_fault_names_the_rank(outcome: tuple[Path, list[dict[str, str]]]) -> None:
    _, said = outcome
    assert len({one["persistent"] for one in said}) == 1
    assert "step 3: persistent: data rank 1 computes a loss of nan" in said[0]["persistent"]


@pytest.mark.dist
def test_what_goes_with_the_samples_is_genuine(
    outcome: tuple[Path, list[dict[str, str]]],
) -> None:
    folder, said = outcome
    assert said[0]["genuine"] == "done"
    (text,) = events(folder / "genuine")
    assert "genuine" in text
    assert any("update skipped" in e["text"] for e in records(folder / "genuine", "event"))
    file = folder / "genuine" / "suspicious" / "step-00000003-0.safetensors"
    with safe_open(str(file), "pt") as kept:
        assert kept.get_tensor("sample_ids").tolist() == [12, 13]
        assert kept.get_tensor("tokens").shape == (2, 48)


@pytest.mark.dist
def test_a_flipped_bit_is_found_and_named(outcome: tuple[Path, list[dict[str, str]]]) -> None:
    _, said = outcome
    assert len({one["bit"] for one in said}) == 1
    assert said[0]["bit"].startswith("stopped after step 4: copies of the same weights differ")
    assert "optim.blocks.1.mlp.up.weight.exp_avg on rank 1, one of 3 copies" in said[0]["bit"]


def tensor_copies(rank: int) -> tuple[int, str]:
    setting = setting_of(small_run(parallel__tensor=2), 4)
    module = build(setting, rank)
    step(module, batch_of(setting, module.layout.data_rank))
    world = World(rank, 4, rank, torch.device("cpu"), torch.distributed.group.WORLD)
    compared = verify_replicas(module.tensors(), world, 1)
    if rank == 3:
        flip(module.params["blocks.2.mlp_norm.weight"])
    with pytest.raises(GuardStop) as stop:
        verify_replicas(module.tensors(), world, 2)
    return compared, str(stop.value)


@pytest.mark.dist
def test_copies_of_tensor_parallel_ranks_are_compared() -> None:
    """Norms: 2 a block and the last, each a weight and two moments. Two copies: none is right."""
    results = run_ranks(4, tensor_copies)
    assert {compared for compared, _ in results} == {3 * (2 * 3 + 1)}
    assert {text for _, text in results} == {results[0][1]}
    assert "blocks.2.mlp_norm.weight on ranks 2 or 3, one of 2 copies" in results[0][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hash_sees_every_single_bit(dtype: torch.dtype) -> None:
    x = torch.randn(7, 3).to(dtype)
    before, raw = int(words_hash(x)), x.view(-1).view(torch.uint8)
    for i in range(len(raw)):
        for bit in range(8):
            raw[i] ^= 1 << bit
            assert int(words_hash(x)) != before
            raw[i] ^= 1 << bit
    assert int(words_hash(x)) == before
    assert int(words_hash(x.flip(0))) != before  # the same words in other places
