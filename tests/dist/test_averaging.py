"""Averaging in place on sharded parameters: the same as on one process, in any layout."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.layout_runs import add_whole, whole
from helpers.ranks import run_ranks
from helpers.tiny import in_parts, llmtrain, records, tiny_config
from safetensors.torch import load_file
from torch import Tensor, nn

from llmtrain.config.duration import Duration
from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from llmtrain.config.weight_methods import AverageConfig
from llmtrain.data.batch import Batch
from llmtrain.merge.copies import part
from llmtrain.merge.training import averaging
from llmtrain.model import complete
from llmtrain.parallel import World, build_layout
from llmtrain.parallel.hardware import Precision
from llmtrain.parallel.zero import import_deepspeed
from llmtrain.train.engine import build_module
from llmtrain.train.module import TrainModule

pytestmark = pytest.mark.dist
SHAPE = {"vocab_size": 61, "d_model": 16, "n_layers": 2, "n_heads": 4, "d_ff": 24}
# Weights so large that every one of them matters to the loss.
MODEL = complete(ModelConfig(**SHAPE, init_std=0.3), None, 8)
EVERY = Duration.parse("1step")
SFA = AverageConfig(every=EVERY, beta=0.3)
STOCK = AverageConfig(method="stock", every=EVERY, keep=3)
LATEST = AverageConfig(method="latest", every=EVERY, keep=3)
ZERO = ParallelConfig(engine="deepspeed", zero_stage=3)
LAYOUTS = {
    "fsdp 2": (2, ParallelConfig()),
    "fsdp 4, gathered blocks": (4, ParallelConfig(reshard_after_forward=False)),
    "replicas 2 x shards 2": (4, ParallelConfig(replicate=2)),
    "tensor 2": (2, ParallelConfig(tensor=2)),
    "tensor 2 x shards 2": (4, ParallelConfig(tensor=2)),
    "pipeline 2": (2, ParallelConfig(pipeline=2)),
    "pipeline 2 x shards 2": (4, ParallelConfig(pipeline=2)),
    "context 2": (2, ParallelConfig(context=2)),
    "context 2 x shards 2": (4, ParallelConfig(context=2)),
    "ZeRO 1": (2, dataclasses.replace(ZERO, zero_stage=1)),
    "ZeRO 2": (2, dataclasses.replace(ZERO, zero_stage=2)),
    "ZeRO 3": (2, ZERO),
    "ZeRO 3, offloaded": (2, dataclasses.replace(ZERO, offload_optimizer=True)),
    "ZeRO 1 x tensor 2": (4, dataclasses.replace(ZERO, zero_stage=1, tensor=2)),
    "ZeRO 3 x tensor 2": (4, dataclasses.replace(ZERO, tensor=2)),
}


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Ranks are forked: what is imported here they need not import."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import_deepspeed(torch.device("cpu"))


def nudge(module: TrainModule, step: int) -> None:
    """Move every parameter as an update would: by values that do not depend on the layout."""
    with torch.no_grad():
        for name, param in module.weights().items():
            random = torch.Generator().manual_seed(1000 * step + zlib.crc32(name.encode()) % 1000)
            add_whole(param, 0.02 * torch.randn(param.shape, generator=random))
    module.weights_changed()


def merge(
    rank: int,
    world: int,
    parallel: ParallelConfig,
    average: AverageConfig,
    compute: torch.dtype,
) -> tuple[list[dict[str, Tensor]], float]:
    """Whole weights before and after each of three actions, and a loss after the last.

    Under pipeline parallelism the weights of the rank's stages.
    """
    cfg = RunConfig(
        parallel=parallel,
        average=average,
        data=DataConfig(seq_len=8),
        train=TrainConfig(global_batch_size=4),
    )
    place = World(rank, world, rank, torch.device("cpu"), dist.group.WORLD if world > 1 else None)
    layout = build_layout(parallel, place, MODEL.n_kv_heads or 1)
    precision = Precision(compute, torch.float32)
    module = build_module(cfg, MODEL, precision, layout)
    trainer: Any = SimpleNamespace(
        cfg=SimpleNamespace(out=tempfile.gettempdir(), name="averaging-of-tests"),
        module=module,
        world=place,
        step_done=0,
        clockwork=SimpleNamespace(tokens_per_step=1, total=3),
        recorder=SimpleNamespace(event=lambda *a, **k: None),
    )
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 61, (4, 9), generator=random)
    ones, zeros = torch.ones(4, 8), torch.zeros(4, dtype=torch.long)
    places = torch.arange(8).expand(4, 8)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], ones, places * 0, places, zeros, zeros)

    def loss() -> float:
        # Every rank reads the same rows; weights gathered here must not outlive a merge.
        with torch.no_grad():
            return float(module.loss(module.receive(batch), 1.0).nll.sum(dtype=torch.float64))

    def weights() -> dict[str, Tensor]:
        return {k: whole(p) for k, p in module.weights().items()}

    hook: Any = averaging(average)
    hook.on_run_start(trainer)
    states = [weights()]
    for step in (1, 2, 3):
        loss()
        nudge(module, step)
        states.append(weights())
        trainer.step_done = step
        hook.after_step(trainer, SimpleNamespace(step=step))
        states.append(weights())
    names = {key.partition(".")[0] for key in hook.tensors(trainer)}
    for copy in names:
        for key, value in module.weights().items():
            stored = hook.tensors(trainer)[f"{copy}.{key}"]
            assert type(stored) is (Tensor if type(value) is nn.Parameter else type(value))
            assert part(stored).shape == part(value).shape
    return states, loss()


def sfa_reference(states: list[dict[str, Tensor]]) -> None:
    start = states[0]
    for before, after in zip(states[1::2], states[2::2], strict=True):
        for name, value in after.items():
            wanted = 0.7 * before[name].double() + 0.3 * start[name].double()
            torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-7)


def latest_reference(states: list[dict[str, Tensor]]) -> None:
    for name, value in states[-1].items():
        wanted = sum(states[i][name].double() for i in (1, 3, 5)) / 3
        torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-8)


def stock_reference(states: list[dict[str, Tensor]]) -> None:
    """2403.19522, written out: three fine-tuned models and an anchor, layer by layer."""
    start = states[0]
    for name, value in states[-1].items():
        base = start[name].double()
        offsets = [states[i][name].double() - base for i in (1, 3, 5)]
        pairs = [(0, 1), (0, 2), (1, 2)]
        cosines = [
            float((offsets[i] * offsets[j]).sum() / offsets[i].norm() / offsets[j].norm())
            for i, j in pairs
        ]
        cosine = sum(cosines) / 3
        t = 3 * cosine / (1 + 2 * cosine)
        mean = sum(states[i][name].double() for i in (1, 3, 5)) / 3
        torch.testing.assert_close(value.double(), t * mean + (1 - t) * base, rtol=2e-6, atol=1e-7)
        assert torch.equal(states[2][name], start[name])  # the next excursion begins there


CASES = {"sfa": (SFA, sfa_reference), "stock": (STOCK, stock_reference)}
CASES["sfa on disk"] = (dataclasses.replace(SFA, storage="disk"), sfa_reference)
CASES["latest"] = (LATEST, latest_reference)


@pytest.mark.parametrize("case", CASES)
def test_one_process_equals_float64(case: str) -> None:
    average, reference = CASES[case]
    reference(merge(0, 1, ParallelConfig(), average, torch.float32)[0])


# Both sorts of arithmetic everywhere; the others where something is special about them.
PAIRS = [(case, layout) for case in ("sfa", "stock") for layout in LAYOUTS]
PAIRS += [("latest", "fsdp 2"), ("latest", "ZeRO 1")]
PAIRS += [("sfa on disk", "tensor 2 x shards 2"), ("sfa on disk", "ZeRO 3")]


@pytest.mark.parametrize(("case", "layout"), PAIRS)
def test_any_layout_equals_float64_and_computes_with_the_merged_weights(
    case: str, layout: str
) -> None:
    average, reference = CASES[case]
    world, parallel = LAYOUTS[layout]
    # In bfloat16 a rank that gathers nothing keeps casts of its weights.
    compute, close = torch.float32, 1e-5
    if layout in ("tensor 2", "ZeRO 2"):
        compute, close = torch.bfloat16, 1e-2
    alone, loss = merge(0, 1, ParallelConfig(), average, compute)
    seen: set[str] = set()
    losses = []
    for states, theirs in run_ranks(world, merge, world, parallel, average, compute):
        reference(states)
        for one, other in zip(states, alone, strict=True):
            seen |= one.keys()
            for name, value in one.items():
                torch.testing.assert_close(value, other[name], rtol=1e-6, atol=1e-8)
        losses.append(theirs)
    assert seen == alone[0].keys()
    # The ranks of a pipeline or of a sequence have a loss together.
    assert sum(losses) * parallel.pipeline * parallel.context == pytest.approx(
        loss * world, rel=close
    )


def test_copies_come_back_under_another_layout(tmp_path: Path, corpus: Path) -> None:
    section = "average={method: sfa, every: 6step, beta: 0.4}"
    parts = [
        (2, "5step", ["parallel.engine=deepspeed", "parallel.zero_stage=3"]),
        (2, "11step", ["parallel.pipeline=2", "train.micro_batch_size=4"]),
        (2, "14step", ["parallel.tensor=2"]),
        (1, "20step", []),
    ]
    moved = in_parts(tmp_path / "moved", corpus, parts, section)
    alone = in_parts(tmp_path / "alone", corpus, [(1, "20step", [])], section)
    for ours, theirs in zip(moved, alone, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-4)


def test_a_zero_run_resumed_across_a_merge_is_bit_identical(tmp_path: Path, corpus: Path) -> None:
    """With the anchor on disk; nothing but checkpoints and records is left behind."""
    section = "average={method: sfa, every: 4step, beta: 0.4, storage: disk}"
    engine = ["parallel.engine=deepspeed", "parallel.zero_stage=2"]
    found = []
    for name, stops in (("straight", [12]), ("halves", [6, 12])):
        folder = tmp_path / name
        folder.mkdir()
        config = str(tiny_config(folder, corpus, train__duration="12step"))
        for stop in stops:
            words = ["train", config, section, f"train.stop_after={stop}step", *engine]
            done = llmtrain(*words, ranks=2)
            assert done.returncode == 0, done.stderr
        run = folder / "runs" / "tiny"
        assert not list(run.glob(".*"))
        merges = [r["step"] for r in records(run, "event") if "merged" in r["text"]]
        assert merges == [4, 8, 12]
        end = run / "checkpoints" / "step-00000012"
        tensors = {k: v for file in end.glob("*.safetensors") for k, v in load_file(file).items()}
        found.append(([(r["loss"], r["grad_norm"]) for r in records(run)], tensors))
    (losses, tensors), (other_losses, others) = found
    assert losses == other_losses
    assert tensors.keys() == others.keys()
    assert all(torch.equal(v, others[k]) for k, v in tensors.items())
