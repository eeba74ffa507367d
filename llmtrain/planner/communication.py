"""Closed forms of the bytes that one training step moves between ranks.

Symbols: b sequences and s tokens of a micro-batch, n = b s / c tokens of a rank, d = d_model,
e bytes of an activation, v the padded vocabulary, m micro-batches, t, c, p the degrees of
tensor, context and pipeline parallelism, S the ranks FSDP2 shards over. The tests count the
collectives of real steps and find exactly these.

A collective's *payload* is the whole tensor it is about: the result of an all-gather, the input
of a reduce-scatter, all-to-all or all-reduce, the message of a send. What a rank *sends* of it
follows from the ring algorithms: (r - 1) / r of the payload among r ranks, twice that for an
all-reduce.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmtrain.config.schema import ModelConfig
from llmtrain.model import block_layers, count_alike, cut_dim, layer_shape, query_inputs
from llmtrain.parallel.pipeline import Part as Stage
from llmtrain.planner.adapters import adapted_blocks
from llmtrain.planner.blueprint import TABLE, Blueprint, Part
from llmtrain.planner.setting import FLOAT, Setting

ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE = "all-gather", "reduce-scatter", "all-reduce"
ALL_TO_ALL, SEND = "all-to-all", "send"


@dataclass(frozen=True)
class Traffic:
    """Calls of one kind that a rank makes in a step.

    what: the purpose. over: the dimension of the layout whose ``ranks`` take part. payload:
    bytes of all ``calls`` together.
    """

    what: str
    collective: str
    over: str
    ranks: int
    calls: int
    payload: int

    @property
    def sent(self) -> int:
        """Bytes that a rank sends per step, by ring algorithms."""
        if self.collective == SEND:
            return self.payload
        share = self.payload * (self.ranks - 1) // self.ranks
        return 2 * share if self.collective == ALL_REDUCE else share


def step_traffic(setting: Setting, blueprint: Blueprint, stage: int = 0) -> list[Traffic]:
    """All collectives of a step of a rank of pipeline rank ``stage``.

    Left out: groups of one rank, evaluation and checkpoints.
    """
    stages = setting.stages(stage)
    blocks = [block for part in stages for block in part.blocks]
    if setting.model.adapters is None:
        found = tensor_layers(setting, blocks, _run_twice(setting, stages))
    else:
        found = adapted_layers(setting, stages)
    found += shared_heads(setting, blocks)
    found += tensor_ends(setting, stages[0].first, stages[-1].last)
    units = blueprint.units(stages)
    found += sharded_data(setting, units)
    found += kept_gradients(setting, [part for unit in units for part in unit])
    found += tensor_gradients(setting, [part for unit in units for part in unit])
    found += context_layers(setting, len(blocks))
    found += pipeline_stages(setting, stage, units)
    found += step_numbers(setting)
    return [t for t in found if t.ranks > 1 and t.calls > 0]


def _run_twice(setting: Setting, stages: Iterable[Stage]) -> list[int]:
    """Blocks whose backward runs in two passes: those of a zero-bubble pipeline, but not of its
    first stage, which has no input's gradient."""
    if setting.cfg.parallel.pipeline_schedule != "zero_bubble" or setting.degrees.pipeline == 1:
        return []
    return [block for part in stages if not part.first for block in part.blocks]


def tensor_layers(
    setting: Setting, blocks: Collection[int], twice: Collection[int] = ()
) -> list[Traffic]:
    """Tensor parallelism in the blocks (Shoeybi et al. 2019, section 3; Korthikanti et al. 2022).

    A block has two column-parallel products (q k v; up) and two row-parallel ones (out; down).
    Plain: a row-parallel product all-reduces its result in forward, a column-parallel one the
    gradient of its input in backward: 2 + 2 all-reduces of n d e a layer and micro-batch.

    With sequence parallelism n is padded to a multiple of t and every all-reduce becomes a
    reduce-scatter and an all-gather of the same payload: forward 2 all-gathers (column) and 2
    reduce-scatters (row); backward 2 all-gathers (row) and 2 reduce-scatters (column), and 2
    more all-gathers of the column inputs unless ``keep_gathered``. ``recompute: full`` repeats
    the forward's. twice: blocks whose backward runs in two passes, each of which gathers the
    gradients of the row-parallel products. Of a factorized layer the inner values travel, not d.
    """
    m, forwards = setting.micro_batches, 2 if setting.cfg.train.recompute == "full" else 1
    columns, rows = (_travelling(setting.model, blocks, dim) for dim in (0, 1))
    if not setting.sequence:
        sums = forwards * rows + columns
        return [_widths(setting, ALL_REDUCE, m * sums, setting.tokens)]
    again = 0 if setting.cfg.parallel.keep_gathered else 1
    gathers = (forwards + again) * columns + rows
    gathers += _travelling(setting.model, twice, 1)
    scatters = forwards * rows + columns
    return [
        _widths(setting, ALL_GATHER, m * gathers, setting.padded_tokens),
        _widths(setting, REDUCE_SCATTER, m * scatters, setting.padded_tokens),
    ]


def _travelling(model: ModelConfig, blocks: Collection[int], dim: int) -> np.ndarray[Any, Any]:
    """(layers, values a token) that tensor parallelism moves into layers whose outputs are split,
    or out of those whose inputs are."""
    found = [
        count * np.array([1, layer_shape(model, name)[1 - dim]])
        for block, count in count_alike(model, blocks).items()
        for name in block_layers(model, block)
        if cut_dim(name) == dim
    ]
    return np.sum(found, axis=0) if found else np.zeros(2, dtype=int)


def _widths(setting: Setting, collective: str, calls: np.ndarray[Any, Any], tokens: int) -> Traffic:
    """calls: their number, and the values a token of all of them together."""
    count, width = (int(n) for n in calls)
    ranks, payload = setting.degrees.tensor, width * tokens * setting.item
    return Traffic("blocks", collective, "tensor", ranks, count, payload)


def adapted_layers(setting: Setting, stages: Iterable[Stage]) -> list[Traffic]:
    """``tensor_layers`` of blocks with frozen weights and adapters."""
    m, t = setting.micro_batches, setting.degrees.tensor
    return [
        Traffic("blocks", kind, "tensor", t, m * calls, m * values * setting.item)
        for kind, (calls, values) in adapted_blocks(setting, stages).items()
    ]


def _tensor(setting: Setting, what: str, collective: str, calls: int, payload: int) -> Traffic:
    """``calls`` of ``payload`` bytes each among tensor-parallel ranks."""
    return Traffic(what, collective, "tensor", setting.degrees.tensor, calls, calls * payload)


def shared_heads(setting: Setting, blocks: Collection[int]) -> list[Traffic]:
    """What exceptional attention layers cost beside the products.

    Where t exceeds the g key/value heads, t / gcd(t, g) ranks share one: they gather their rows
    of the q k v weight (and bias) before the product and reduce-scatter the gradient, each a
    payload of (h / g + 2) d_head rows. Queries and keys normalised over the whole width
    (``qk_norm: full``) all-reduce one float32 sum of squares a token each, both ways.
    """
    model, degrees = setting.model, setting.degrees
    assert model.n_kv_heads is not None and model.d_head is not None
    m, calls = setting.micro_batches, len(blocks) * setting.micro_batches
    forwards = 2 if setting.cfg.train.recompute == "full" else 1
    found = []
    full = model.qk_norm == "full"
    if full:
        sums = 2 * calls * (forwards + 1)
        found.append(_tensor(setting, "qk norm", ALL_REDUCE, sums, 4 * setting.tokens))
    sharing = max(1, degrees.tensor // model.n_kv_heads)
    if sharing > 1:
        rows = (model.n_heads // model.n_kv_heads + 2) * model.d_head
        sizes = [rows] if model.attention_bias else []
        sizes += ([model.d_head] * (2 if model.norm_bias else 1)) if full else []
        columns = sum(n * query_inputs(model, b) for b, n in count_alike(model, blocks).items())
        payload = (rows * columns + len(blocks) * sum(sizes)) * setting.weight_item
        for kind, passes in ((ALL_GATHER, forwards), (REDUCE_SCATTER, 1)):
            many = passes * calls * (1 + len(sizes))
            found.append(
                Traffic("shared heads", kind, "tensor", sharing, many, passes * m * payload)
            )
    return found


def tensor_ends(setting: Setting, first: bool, last: bool) -> list[Traffic]:
    """Embedding and head over a split vocabulary, per micro-batch.

    The embedding sums its rows over ranks in forward (all-reduce of n d e; sequence parallel:
    reduce-scatter, and an all-gather in backward). The head takes all tokens: in backward its
    input's gradient is all-reduced (sequence parallel: all-gather in forward, reduce-scatter in
    backward). The loss makes two all-reduces for each chunk of tokens: the maximum, 4 bytes a
    token, and three sums, 12 bytes a token.
    """
    m, width = setting.micro_batches, setting.model.d_model * setting.item
    found = []
    for what, here in (("embedding", first), ("head", last)):
        if not here:
            continue
        if setting.sequence:
            payload = setting.padded_tokens * width
            # A frozen embedding has no backward.
            if what == "head" or setting.model.adapters is None:
                found.append(_tensor(setting, what, ALL_GATHER, m, payload))
            found.append(_tensor(setting, what, REDUCE_SCATTER, m, payload))
        else:
            found.append(_tensor(setting, what, ALL_REDUCE, m, setting.tokens * width))
    if last:
        chunks = m * -(-setting.tokens // setting.cfg.loss.chunk_tokens)
        ranks, payload = setting.degrees.tensor, m * setting.tokens * 16
        found.append(Traffic("loss", ALL_REDUCE, "tensor", ranks, 2 * chunks, payload))
    return found


def tensor_gradients(setting: Setting, parts: Iterable[Part]) -> list[Traffic]:
    """Gradients of parameters that every tensor-parallel rank holds but sees through other
    tokens or heads: norms, row-parallel biases, learned positions.

    Without data ranks one float32 all-reduce of all of them a step; else FSDP2 makes one for
    each when it reduces the gradients: in the compute dtype, or in ``precision.reduce`` where
    they were accumulated over micro-batches.
    """
    sizes = [part.elements for part in parts if part.partial and part.trained]
    if not sizes:
        return []
    if setting.data_ranks == 1:
        return [_tensor(setting, "norm gradients", ALL_REDUCE, 1, 4 * sum(sizes))]
    times = setting.reductions
    accumulated = setting.micro_batches > times
    item = setting.precision.reduce.itemsize if accumulated else setting.item
    calls, payload = len(sizes) * times, sum(sizes) * times * item
    ranks = setting.degrees.tensor
    return [Traffic("norm gradients", ALL_REDUCE, "tensor", ranks, calls, payload)]


def sharded_data(setting: Setting, units: Iterable[list[Part]]) -> list[Traffic]:
    """FSDP2 over the data and context ranks (Zhao et al. 2023, 2304.11277); HSDP with replicas.

    A unit is a block, or all that is outside the blocks. Its padded size is S times
    ceil(rows / S) rows of each parameter. A micro-batch gathers every unit in the compute dtype
    (packed weights as they are) before its forward, and a block again before its backward where
    ``reshard_after_forward`` freed it. In a pipeline units stay gathered between a backward and the
    next pass of the step: one gather of each a step, or with ``reshard_after_forward`` m + 1 of a
    block. Gradients are
    reduce-scattered in ``precision.reduce`` once a step (or after every micro-batch,
    ``reduce_every_micro_batch``), and the shards then all-reduced over replicas.
    """
    shards, replicas = setting.shards, setting.degrees.replicate
    reduce = setting.precision.reduce.itemsize
    gathers = gathered = reductions = reduced = 0
    for unit in ([part for part in unit if part.kept == 1] for unit in units):
        size = shards * sum(p.stored(shards) * (p.packed or setting.item) for p in unit)
        again = setting.cfg.parallel.reshard_after_forward and unit[0].block is not None
        if setting.degrees.pipeline > 1:
            times = setting.micro_batches + 1 if again else 1
        else:
            times = setting.micro_batches * (2 if again else 1)
        gathers, gathered = gathers + times, gathered + times * size
        trained = shards * sum(part.stored(shards) for part in unit if part.trained)
        reductions += setting.reductions if trained else 0
        reduced += setting.reductions * trained * reduce
    return [
        Traffic("parameters", ALL_GATHER, "shard", shards, gathers, gathered),
        Traffic("gradients", REDUCE_SCATTER, "shard", shards, reductions, reduced),
        Traffic("gradients", ALL_REDUCE, "replicate", replicas, reductions, reduced // shards),
    ]


def kept_gradients(setting: Setting, parts: Iterable[Part]) -> list[Traffic]:
    """Layers that hold kept weights alone: replicas add their float32 gradients up once a step, in
    one reduction."""
    sizes = [FLOAT * part.elements for part in parts if part.kept < 1 and part.trained]
    replicas = setting.degrees.replicate
    what = "gradients of kept weights"
    return [Traffic(what, ALL_REDUCE, "replicate", replicas, min(len(sizes), 1), sum(sizes))]


def context_layers(setting: Setting, layers: int) -> list[Traffic]:
    """Context parallelism: keys and values of the other ranks' tokens.

    g' = max(g / t, 1) key/value heads of a rank. allgather: 2 b s g' d_head e gathered in
    forward, as much of gradients exchanged in backward (an all-to-all, added up in float32), per
    layer and micro-batch. ring: c - 1 messages of 2 n g' d_head e forward (Liu et al. 2023,
    2310.01889); backward the same once more, and c - 1 of their gradients in float32.
    ``recompute: full`` repeats the forward's.
    """
    model, c = setting.model, setting.degrees.context
    assert model.n_kv_heads is not None and model.d_head is not None
    heads = max(model.n_kv_heads // setting.degrees.tensor, 1)
    calls = layers * setting.micro_batches
    forwards = 2 if setting.cfg.train.recompute == "full" else 1
    values = 2 * setting.tokens * heads * model.d_head
    if setting.cfg.parallel.context_method == "allgather":
        found, payload = [], c * values * setting.item
        for kind, passes in ((ALL_GATHER, forwards), (ALL_TO_ALL, 1)):
            many = passes * calls
            found.append(Traffic("keys, values", kind, "context", c, many, many * payload))
        return found
    steps = (c - 1) * calls
    payload = steps * values * ((forwards + 1) * setting.item + 4)
    return [Traffic("keys, values", SEND, "context", c, (forwards + 2) * steps, payload)]


def pipeline_stages(setting: Setting, rank: int, units: Iterable[list[Part]]) -> list[Traffic]:
    """Pipeline parallelism: the residual stream between stages, n d e a micro-batch (n d e / t
    with sequence parallelism), forward to the next stage and its gradient back.

    Of all stages the first sends no gradient and the last no activation. A tied embedding lies on
    both ends, whose stored shards of its gradient are all-reduced once a step.
    """
    p, stages = setting.degrees.pipeline, setting.stages(rank)
    calls = sum(2 - part.first - part.last for part in stages) * setting.micro_batches
    rows = setting.tokens
    if setting.sequence:
        rows = setting.padded_tokens // setting.degrees.tensor
    payload = calls * rows * setting.model.d_model * setting.item
    found = [Traffic("stages", SEND, "pipeline", p, calls, payload)]
    tables = [q for unit in units for q in unit if q.name == TABLE]
    if p > 1 and setting.model.tie_embeddings and tables:
        size = 4 * tables[0].stored(setting.shards)
        found.append(Traffic("tied embedding", ALL_REDUCE, "pipeline", 2, 1, size))
    return found


def step_numbers(setting: Setting) -> list[Traffic]:
    """Single numbers: the gradient norm over the ranks that hold different parts (8 bytes each),
    and weight, loss and norm of a step over all processes (32 bytes)."""
    degrees = setting.degrees
    groups = {"shard": setting.shards, "tensor": degrees.tensor, "pipeline": degrees.pipeline}
    norms = [Traffic("gradient norm", ALL_REDUCE, dim, n, 1, 8) for dim, n in groups.items()]
    return [*norms, Traffic("step sums", ALL_REDUCE, "world", degrees.world, 3, 32)]
