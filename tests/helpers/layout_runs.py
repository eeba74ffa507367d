"""The same few steps of training on any layout: what every layout test compares.

``train_steps`` drives a real ``TrainModule`` (of either engine) without files or launcher, so that
``run_ranks`` can fork it. Packed documents, uneven float weights, an odd number of tokens,
accumulation.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmtrain.config.number_formats import QuantizationConfig
from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.config.trainable import TrainableConfig
from llmtrain.data.batch import Batch
from llmtrain.model import complete
from llmtrain.parallel import Fragment, World, build_layout, local_boxes
from llmtrain.parallel.hardware import Precision
from llmtrain.train.engine import build_module
from llmtrain.train.module import TrainModule

# full_tensor() of a tensor over two mesh dimensions says that it gathers twice.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

VOCAB, BATCH, SEQ, STEPS = 101, 12, 20, 4


@dataclass(frozen=True)
class Case:
    """What is trained: changes to the tiny model, to other sections, and the length."""

    model: tuple[tuple[str, Any], ...] = ()
    train: tuple[tuple[str, Any], ...] = (("micro_batch_size", 3),)
    optim: tuple[tuple[str, Any], ...] = ()
    compute: torch.dtype = torch.float32
    steps: int = STEPS
    seq_len: int = SEQ
    quantization: QuantizationConfig | None = None
    trainable: tuple[TrainableConfig, ...] = ()


@dataclass
class Outcome:
    """Per step: global loss and gradient norm. weights: whole parameters after the last step."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def case(steps: int = STEPS, seq_len: int = SEQ, micro: int = 3, **model: Any) -> Case:
    """A case by the model's keys."""
    train = (("micro_batch_size", micro),)
    return Case(tuple(model.items()), train, steps=steps, seq_len=seq_len)


def configs(what: Case, parallel: dict[str, Any]) -> tuple[RunConfig, ModelConfig]:
    """The run's config and its resolved model."""
    shape: dict[str, Any] = {"d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2}
    shape |= {"d_ff": 48, "vocab_multiple": 8, "vocab_size": VOCAB, **dict(what.model)}
    cfg = RunConfig()
    replace = dataclasses.replace
    cfg = replace(
        cfg,
        seed=5,
        model=ModelConfig(**shape),
        data=replace(
            cfg.data, seq_len=what.seq_len, document_mask=True, reset_positions=True, eos_id=0
        ),
        loss=replace(cfg.loss, z_loss=1e-3, label_smoothing=0.1, chunk_tokens=7),
        optim=replace(cfg.optim, **{"lr": 3e-3, "clip_norm": 0.7, **dict(what.optim)}),
        parallel=replace(cfg.parallel, **parallel),
        train=replace(cfg.train, global_batch_size=BATCH, **dict(what.train)),
        quantization=what.quantization,
        trainable=list(what.trainable),
    )
    return cfg, complete(cfg.model, VOCAB, what.seq_len)


def make_batch(step: int, seq_len: int = SEQ) -> Batch:
    """Global batch ``step``: packed documents, weights from 0 to 1 that differ between rows."""
    draw = torch.Generator().manual_seed(1000 + step)
    shape = (BATCH, seq_len)
    tokens = torch.randint(0, VOCAB, shape, generator=draw)
    ends = torch.rand(shape, generator=draw) < 0.2
    docs = ends.long().cumsum(1)
    position = torch.arange(seq_len).expand(shape)
    begins = torch.zeros(shape, dtype=torch.bool)
    begins[:, 1:] = docs[:, 1:] != docs[:, :-1]
    starts = torch.where(begins, position, 0).cummax(1).values
    rows = torch.linspace(0.1, 1.0, BATCH)[torch.randperm(BATCH, generator=draw), None]
    weights = torch.rand(shape, generator=draw) * rows
    weights[torch.rand(shape, generator=draw) < 0.3] = 0.0
    return Batch(
        tokens=tokens,
        targets=torch.randint(0, VOCAB, shape, generator=draw),
        weights=weights,
        doc_ids=docs.int(),
        positions=position - starts,
        source_ids=torch.arange(BATCH) % 2,
        sample_ids=torch.arange(BATCH) + step * BATCH,
    )


def build(rank: int, world: int, what: Case, parallel: dict[str, Any]) -> TrainModule:
    """The train module of one rank, with vectors (norms, biases) that are not all alike."""
    cfg, model_cfg = configs(what, parallel)
    group = dist.group.WORLD if world > 1 else None
    place = World(rank, world, rank, torch.device("cpu"), group)
    assert model_cfg.n_kv_heads is not None
    layout = build_layout(cfg.parallel, place, model_cfg.n_kv_heads)
    module = build_module(cfg, model_cfg, Precision(what.compute, torch.float32), layout)
    module.restore(_vary_vectors)
    if frozen := module.frozen():
        _vary_vectors({f"model.{name}": value for name, value in frozen.items()})
        module.weights_changed()
    return module


@torch.no_grad()
def _vary_vectors(tensors: dict[str, Tensor]) -> None:
    for key, value in tensors.items():
        if key.startswith("model.") and value.dim() == 1:
            draw = torch.Generator().manual_seed(len(key.removeprefix("model.")))
            add_whole(value, 0.1 * torch.randn(value.shape, generator=draw))


def add_whole(param: Tensor, value: Tensor) -> None:
    """Add a whole tensor to a parameter of any layout, without communication."""
    for values, offset in local_boxes(param):
        values.add_(_cut(value, offset, values.shape))


def _cut(value: Tensor, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
    for dim, (size, start) in enumerate(zip(shape, offset, strict=True)):
        value = value.narrow(dim, start, size)
    return value


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of any layout, a copy. Collective."""
    if isinstance(tensor, Fragment):
        full = torch.full(tensor.shape, -torch.inf)
        for piece in tensor.pieces:
            _cut(full, piece.offset, piece.values.shape).copy_(piece.values)
        dist.all_reduce(full, op=dist.ReduceOp.MAX)
        return full
    value = tensor.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


def rank_batch(module: TrainModule, step: int) -> Batch:
    """What this rank computes on of global batch ``step``."""
    layout = module.layout
    share = BATCH // layout.degrees.data
    batch = make_batch(step, module.cfg.data.seq_len)
    return module.receive(batch[layout.data_rank * share : (layout.data_rank + 1) * share])


def one_step(module: TrainModule, step: int) -> tuple[float, float]:
    """Global loss and gradient norm of an update, as the trainer makes it."""
    world = module.layout.world
    batch = rank_batch(module, step)
    (weight,) = world.sum([module.token_weight(batch)])
    sums = module.forward_backward(batch, weight, 2)
    norm = module.gradient_norm()
    (loss,) = world.sum([float(sums.loss)])
    module.update(norm, module.cfg.optim.lr)
    return loss, float(norm)


def train_steps(rank: int, world: int, what: Case, parallel: dict[str, Any]) -> Outcome:
    """Train ``what.steps`` updates. Every rank returns the same losses and norms."""
    module = build(rank, world, what, parallel)
    steps = [one_step(module, step) for step in range(what.steps)]
    return outcome(module, steps)


def alone(what: Case) -> Outcome:
    """The run of one process: what others are held against. Computed once."""
    key = repr(what)
    if key not in _ALONE:
        _ALONE[key] = train_steps(0, 1, what, {})
    return _ALONE[key]


_ALONE: dict[str, Outcome] = {}


def outcome(module: TrainModule, steps: list[tuple[float, float]]) -> Outcome:
    """The losses and norms of ``steps``, and the parameters as they are now."""
    state = {k: v for k, v in module.tensors().items() if k.startswith("model.")}
    weights = {key.removeprefix("model."): whole(value) for key, value in state.items()}
    return Outcome([loss for loss, _ in steps], [norm for _, norm in steps], weights)


def assert_same(ours: Outcome, alone: Outcome, rel: float = 2e-6, atol: float = 2e-5) -> None:
    """Losses and gradient norms to ``rel``; weights to ``atol``.

    Adam divides by the root of the second moment, so an element whose gradient is round-off may
    move by a part of the learning rate in either direction; ``atol`` is far below lr x steps.
    """
    for name, a, b in (
        ("loss", ours.losses, alone.losses),
        ("gradient norm", ours.norms, alone.norms),
    ):
        assert len(a) == len(b)
        for step, (x, y) in enumerate(zip(a, b, strict=True)):
            assert abs(x - y) <= rel * abs(y), f"{name} of step {step}: {x} against {y}"
    for name, value in ours.weights.items():
        torch.testing.assert_close(value, alone.weights[name], atol=atol, rtol=0, msg=name)
