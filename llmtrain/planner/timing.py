"""Closed forms of the time of a training step.

A step is m micro-batches through the slowest pipeline rank, the pipeline's bubble, what of the
communication does not hide behind computing, and the optimizer::

    step = m (forward + backward) + bubble + exposed communication + update

- **A product** of M x K with K x N takes 2 M K N / (peak x reached), and longer where its 128 x 256
  tiles do not fill the last wave over the multiprocessors or K is short (K / (K + 256)); at least
  what its operands take through memory.
- **Attention** is causal: 2 n s q FLOPs forward for n tokens in sequences of s, q the width of all
  query heads, 2.5 times that backward (Dao 2023, 2307.08691, section 3.1).
- **The rest of a block** is bound by memory: reads and writes counted as one fused kernel for each
  norm, residual sum, rotation and activation, and twice of them without ``train.compile``. Less
  than a dozen kernels' start-up time a block never takes.
- **A collective** moves what a ring sends over the slowest link of its group: NVLink inside a node,
  else as many network cards as the node has ranks of the group.
- **Hiding**: FSDP2's gathers and reductions behind the passes they belong to, but for the first
  and last unit; half of a tensor-parallel collective behind its product; half of a message between
  pipeline stages.
- **Bubble** (Narayanan et al. 2021, 2104.04473, section 2.2): (p - 1) / v micro-batches; a third of
  it with zero bubble, where only the passes for inputs wait for each other (Qi et al. 2023).

What the model leaves out: data loading, checkpoints, stragglers, several jobs on a network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmtrain.model.layers import block_layers, count_alike, cut_dim, layer_shape, widths
from llmtrain.model.resolve import padded_vocab
from llmtrain.parallel.pipeline import Part as Stage
from llmtrain.planner.blueprint import Blueprint
from llmtrain.planner.communication import ALL_GATHER, SEND, Traffic, step_traffic
from llmtrain.planner.machine import Machine
from llmtrain.planner.setting import Setting

TILE_ROWS, TILE_COLUMNS, SHORT_K = 128, 256, 256
# Kernels of a block in one forward pass, and seconds to start one.
KERNELS, START = 12, 4e-6
# Bytes through memory for each logit of the loss, and for each stored element in the update.
LOGIT_BYTES, UPDATE_BYTES = 20, 36


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what takes them; they add up to ``total``."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.parts.values())

    @property
    def computing(self) -> float:
        """Seconds in which a GPU works on the model itself."""
        return sum(self.parts[kind] for kind in COMPUTE if kind in self.parts)


COMPUTE = ("products", "attention", "norms and activations", "head and loss")


@dataclass(frozen=True)
class _Pass:
    """Seconds of one micro-batch in a rank's stages, forward and backward, by kind."""

    forward: dict[str, float]
    backward: dict[str, float]

    @property
    def both(self) -> float:
        return sum(self.forward.values()) + sum(self.backward.values())


def step_time(setting: Setting, blueprint: Blueprint, machine: Machine) -> StepTime:
    """Time of a step of ``setting`` on ``machine``, by the slowest pipeline rank.

    blueprint: the parameters of any rank at the same tensor-parallel degree.
    """
    p, m = setting.degrees.pipeline, setting.micro_batches
    ranks = sorted({0, p // 2, p - 1})
    passes = {rank: _passes(setting, setting.stages(rank), machine) for rank in ranks}
    slowest = max(ranks, key=lambda rank: passes[rank].both)
    one = passes[slowest]
    parts = {kind: m * (one.forward[kind] + one.backward[kind]) for kind in one.forward}
    traffic = step_traffic(setting, blueprint, slowest)
    tensor = sum(_tensor_seconds(t, machine) for t in traffic if t.over == "tensor")
    context = _context_seconds(setting, traffic, machine, parts["attention"])
    micro = one.both + (tensor + context) / m
    parts["tensor parallel"], parts["context parallel"] = tensor, context
    parts["pipeline bubble"] = _bubble(setting) * micro
    sends = [t for t in traffic if t.over == "pipeline"]
    hidden = machine.reached.stage_overlap
    parts["pipeline messages"] = (1 - hidden) * sum(_seconds(t, setting, machine) for t in sends)
    share = sum(one.backward.values()) / one.both
    units = blueprint.units(setting.stages(slowest))
    parts["sharded data parallel"] = _exposed(
        setting, traffic, machine, (micro * (1 - share), micro * share), len(units)
    )
    stored = sum(part.stored(setting.shards) for unit in units for part in unit if part.trained)
    parts["optimizer"] = _memory(stored * UPDATE_BYTES, machine)
    return StepTime({kind: seconds for kind, seconds in parts.items() if seconds > 0})


def product_seconds(m: int, k: int, n: int, machine: Machine, item: int = 2) -> float:
    """Time of one product of ``m x k`` with ``k x n``; item: bytes of an element."""
    peak = machine.peak * machine.reached.products / (1 if item == 2 else 2)
    tiles = math.ceil(m / TILE_ROWS) * math.ceil(n / TILE_COLUMNS)
    waves = math.ceil(tiles / machine.units)
    area = waves * machine.units * TILE_ROWS * TILE_COLUMNS
    # A product too small for all tiles is cut along k as well, at best into what fills them.
    area = max(min(area, 2 * m * n), m * n)
    computing = 2 * area * k / peak * (k + SHORT_K) / k
    moving = item * (m * k + k * n + m * n) / (machine.bandwidth * machine.reached.memory)
    return max(computing, moving) * machine.reached.factor


def _memory(n_bytes: float, machine: Machine) -> float:
    return n_bytes / (machine.bandwidth * machine.reached.memory) * machine.reached.factor


def _passes(setting: Setting, stages: Sequence[Stage], machine: Machine) -> _Pass:
    blocks = sum(len(stage.blocks) for stage in stages)
    model, t, n = setting.model, setting.degrees.tensor, setting.tokens
    q, kv, ff = widths(model)
    gate = 2 if model.activation == "swiglu" else 1
    d, item, reached = model.d_model, setting.item, machine.reached
    products = back = 0.0
    numbers = [number for stage in stages for number in stage.blocks]
    for number, count in count_alike(model, numbers).items():
        for n_rows, k, out in _products(setting, number):
            products += count * product_seconds(n_rows, k, out, machine, item)
            # Backward: the input's gradient n x out x k, the weight's k x n x out.
            back += count * product_seconds(n_rows, out, k, machine, item)
            back += count * product_seconds(k, n_rows, out, machine, item)
    products, back = products / blocks, back / blocks
    flops = 2.0 * n * setting.cfg.data.seq_len * q / t
    attention = flops / (machine.peak * machine.attention) * reached.factor
    stream = d / (t if setting.sequence else 1)
    inner, heads = gate * ff / t, (q + kv) / t
    forward = 10 * stream + 2 * heads + inner + ff / t
    backward = 12 * stream + 2 * heads + 2 * inner + ff / t
    kernels = 1 if setting.cfg.train.compile else 2
    rest = _memory(kernels * n * item * forward, machine)
    rest_back = _memory(kernels * n * item * backward, machine)
    floor = KERNELS * START
    rest = max(rest, floor - products - attention)
    rest_back = max(rest_back, 2 * floor - back - 2.5 * attention)
    again = {"none": (0, 0), "selective": (0, 1), "full": (1, 1)}[setting.cfg.train.recompute]
    head, head_back = _head(setting, stages[-1].last, machine)
    return _Pass(
        {
            "products": blocks * products,
            "attention": blocks * attention,
            "norms and activations": blocks * rest,
            "head and loss": head,
        },
        {
            "products": blocks * (back + again[0] * products),
            "attention": blocks * (2.5 + again[0]) * attention,
            "norms and activations": blocks * (rest_back + again[1] * rest),
            "head and loss": head_back,
        },
    )


def _products(setting: Setting, block: int) -> list[tuple[int, int, int]]:
    """(tokens, inputs, outputs) of a rank's products with the weights of a block."""
    t, found = setting.degrees.tensor, []
    for name in block_layers(setting.model, block):
        out, k = layer_shape(setting.model, name)
        dim, n = cut_dim(name), setting.tokens
        if dim is None:
            n = -(-n // (t if setting.sequence else 1))
        found.append((n, -(-k // t) if dim == 1 else k, -(-out // t) if dim == 0 else out))
    return found


def _head(setting: Setting, last: bool, machine: Machine) -> tuple[float, float]:
    """Seconds of head and loss on the last stage, forward and backward."""
    if not last:
        return 0.0, 0.0
    n, d, item = setting.tokens, setting.model.d_model, setting.item
    words = padded_vocab(setting.model) // setting.degrees.tensor
    forward = product_seconds(n, d, words, machine, item)
    back = product_seconds(n, words, d, machine, item) + product_seconds(d, n, words, machine, item)
    return forward + _memory(n * words * LOGIT_BYTES, machine), back


def _bubble(setting: Setting) -> float:
    """Micro-batches for which a pipeline rank waits in a step."""
    p, v = setting.degrees.pipeline, len(setting.stages(0))
    third = 3 if setting.cfg.parallel.pipeline_schedule == "zero_bubble" else 1
    return (p - 1) / (v * third)


def _seconds(traffic: Traffic, setting: Setting, machine: Machine) -> float:
    """Seconds of these calls one after the other, with nothing hidden."""
    degrees = setting.degrees
    inner = {
        "tensor": 1,
        "context": degrees.tensor,
        "shard": degrees.tensor,
        "replicate": degrees.tensor * degrees.context * degrees.shard,
        "pipeline": degrees.tensor * degrees.context * degrees.data,
        "world": 1,
    }
    return _wire(traffic, inner[traffic.over], machine)


def _wire(traffic: Traffic, stride: int, machine: Machine) -> float:
    ranks, reached = (2 if traffic.collective == SEND else traffic.ranks), machine.reached
    here = max(1, min(ranks, machine.node // stride))
    nodes = -(-ranks // here)
    speed, latency = machine.link * reached.links, machine.link_latency
    if nodes > 1:
        speed = min(speed, here * machine.network * reached.network)
        latency += machine.network_latency * math.log2(nodes)
    return traffic.calls * latency + traffic.sent / speed


def _tensor_seconds(traffic: Traffic, machine: Machine) -> float:
    hidden = machine.reached.tensor_overlap if traffic.what == "blocks" else 0.0
    return (1 - hidden) * _wire(traffic, 1, machine)


def _context_seconds(
    setting: Setting, traffic: Sequence[Traffic], machine: Machine, attention: float
) -> float:
    """A ring hides behind the attention it feeds; gathered keys and values are waited for."""
    whole = sum(_seconds(t, setting, machine) for t in traffic if t.over == "context")
    ring = setting.cfg.parallel.context_method == "ring"
    return max(0.0, whole - attention) if ring else whole


def _exposed(
    setting: Setting,
    traffic: Sequence[Traffic],
    machine: Machine,
    one: tuple[float, float],
    units: int,
) -> float:
    """Seconds of FSDP2's collectives that nothing hides. one: of a micro-batch's two passes."""
    forward, backward = one
    found, overlap = 0.0, machine.reached.shard_overlap
    gathers = reduces = 0.0
    passes = 1.0
    for t in traffic:
        if t.over not in ("shard", "replicate") or t.what not in ("parameters", "gradients"):
            continue
        if t.collective == ALL_GATHER:
            gathers, passes = gathers + _seconds(t, setting, machine), t.calls / units
        else:
            reduces += _seconds(t, setting, machine)
    again = passes > setting.micro_batches or (setting.degrees.pipeline > 1 and passes > 1)
    window = passes * ((forward + backward) / 2 if again else forward)
    if gathers:
        found += max(gathers - overlap * window, gathers / (passes * units))
    if reduces:
        times = setting.reductions
        found += max(reduces - overlap * times * backward, reduces / (times * units))
    return found
