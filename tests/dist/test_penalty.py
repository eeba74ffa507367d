"""Penalties on sharded parameters: gradients, value and Fisher information as on one process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.tiny import in_parts, llmtrain, records, tiny_config
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmtrain.config import load_config
from llmtrain.config.continual import PenaltyConfig
from llmtrain.data.loader import Loader
from llmtrain.data.plan import build_plan
from llmtrain.finetune.penalty import ANCHOR, FISHER, Penalty
from llmtrain.merge.copies import part
from llmtrain.model import resolve_model
from llmtrain.parallel import World, build_layout
from llmtrain.parallel.hardware import Precision
from llmtrain.train.engine import build_module

pytestmark = pytest.mark.dist
STRENGTH = 0.7
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "fsdp 2, accumulation": (2, ["train.micro_batch_size=2"]),
    "replicas 2 x shards 2": (4, ["parallel.replicate=2"]),
    "tensor 2": (2, ["parallel.tensor=2"]),
    "tensor 2 x shards 2": (4, ["parallel.tensor=2"]),
    "context 2": (2, ["parallel.context=2", "data.seq_len=48"]),
    "pipeline 2": (2, ["parallel.pipeline=2", "train.micro_batch_size=2"]),
    "pipeline 2 x shards 2": (4, ["parallel.pipeline=2", "train.micro_batch_size=2"]),
}
Whole = dict[str, Tensor]


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Results(NamedTuple):
    """Whole tensors by parameter. before, after: gradients without and with the penalty."""

    before: Whole
    after: Whole
    fisher: Whole
    anchor: Whole
    value: float
    norm: float


def penalised(rank: int, world: int, config: str, changes: list[str]) -> Results:
    """A step's gradients under a penalty, the weights having moved away from the anchor."""
    cfg = load_config(config, ["model.init_std=0.2", "model.tie_embeddings=true", *changes])
    place = World(rank, world, rank, torch.device("cpu"), None)
    plan = build_plan(cfg, 160)
    model_cfg = resolve_model(cfg, plan.vocab_size)
    layout = build_layout(cfg.parallel, place, model_cfg.n_kv_heads or 1)
    module = build_module(cfg, model_cfg, Precision(torch.float32, torch.float32), layout)
    trainer: Any = SimpleNamespace(
        module=module,
        cfg=cfg,
        world=place,
        step_done=0,
        recorder=SimpleNamespace(event=lambda *a, **k: None),
    )
    hook = Penalty(PenaltyConfig("ewc", STRENGTH, data={"letters": 1.0}, samples=3))
    hook.on_run_start(trainer)
    with torch.no_grad():
        for param in module.params.values():
            part(param).mul_(1.25)
    batch = module.receive(
        Loader.from_config(plan, cfg, layout.data_rank, layout.degrees.data).batch(0)
    )
    module.forward_backward(batch, 8.0 * cfg.data.seq_len, len(plan.names))
    before = {k: whole(_grad(p)) for k, p in module.params.items()}
    value = hook.add(module, measure=True)
    after = {k: whole(_grad(p)) for k, p in module.params.items()}
    copies = {
        name: {k: whole(v) for k, v in hook.copies[name].items()} for name in (FISHER, ANCHOR)
    }
    norm = float(module.gradient_norm())
    return Results(before, after, copies[FISHER], copies[ANCHOR], value, norm)


def _grad(param: torch.nn.Parameter) -> Tensor:
    assert param.grad is not None
    return param.grad


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Results:
    """One process, held against the formula in float64."""
    config = str(tiny_config(tmp_path_factory.mktemp("alone"), corpus))
    found = penalised(0, 1, config, [])
    value = 0.0
    for name, grad in found.after.items():
        away = 0.25 * found.anchor[name].double()  # the weights are 1.25 times the anchor
        pull = STRENGTH * found.fisher[name].double() * away
        torch.testing.assert_close(
            grad.double(), found.before[name].double() + pull, rtol=1e-5, atol=1e-7
        )
        value += 0.5 * float((pull * away).sum())
    assert found.value == pytest.approx(value, rel=1e-5) and value > 0
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_has_the_penalty_of_one_process(
    tmp_path: Path, corpus: Path, alone: Results, layout: str
) -> None:
    config = str(tiny_config(tmp_path, corpus))
    world, changes = LAYOUTS[layout]
    seen = set()
    for ours in run_ranks(world, penalised, world, config, changes):
        for key in ("before", "after", "fisher", "anchor"):
            theirs = getattr(alone, key)
            for name, tensor in getattr(ours, key).items():
                scale = float(theirs[name].abs().max())
                torch.testing.assert_close(tensor, theirs[name], rtol=2e-4, atol=1e-5 * scale)
                seen.add(name)
        assert ours.value == pytest.approx(alone.value, rel=1e-4)
        assert ours.norm == pytest.approx(alone.norm, rel=1e-4)
    assert seen == set(alone.after)


def test_a_run_resumes_under_another_layout(tmp_path: Path, corpus: Path) -> None:
    section = "penalty={kind: ewc, strength: 0.05, data: {letters: 1}, samples: 4}"
    parts = [(2, "6step", []), (2, "20step", ["parallel.tensor=2"])]
    moved = in_parts(tmp_path / "moved", corpus, parts, section)
    alone = in_parts(tmp_path / "alone", corpus, [(1, "20step", [])], section)
    for ours, theirs in zip(moved, alone, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-4)
        own, other = ours["method"]["penalty"], theirs["method"]["penalty"]
        assert own == pytest.approx(other, rel=1e-3, abs=1e-9)


def test_weights_of_another_run_under_any_engine(tmp_path: Path, corpus: Path) -> None:
    """``init`` from a run on one process: FSDP2 with tensor parallelism, and DeepSpeed."""
    pytest.importorskip("deepspeed")
    config = str(tiny_config(tmp_path, corpus))
    first = ["train", config, "eval.every=null"]
    done = llmtrain(*first, "train.duration=6step", "name=first")
    assert done.returncode == 0, done.stderr
    runs = []
    cases = ((1, []), (2, ["parallel.tensor=2"]), (2, ["parallel.engine=deepspeed"]))
    for i, (ranks, changes) in enumerate(cases):
        begin = [f"init.path={tmp_path}/runs/first", "train.duration=3step", f"name=run{i}"]
        done = llmtrain(*first, *begin, *changes, ranks=ranks)
        assert done.returncode == 0, done.stderr
        runs.append(records(tmp_path / "runs" / f"run{i}"))
    for others in runs[1:]:
        for ours, theirs in zip(runs[0], others, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-4)
