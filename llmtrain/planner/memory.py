"""Closed forms of the memory that a rank's tensors take in a training step.

A step is fullest at one of four moments: in the loss, when all activations and a chunk of logits
are there; at the start of backward, when the last block runs with all activations behind it; at
the end of backward, when all gradients are there; in the optimizer's step. ``memory_estimate``
adds up each of them. The tests compare with what the allocator gives out in real steps and find
it within 10%. The interpreter, libraries, communication buffers and fragmentation come on top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from llmtrain.config.schema import ModelConfig
from llmtrain.linear import FP32_NATIVE, matmul_for
from llmtrain.model import (
    ActivationSplit,
    activation_bytes,
    adapter_activation_bytes,
    block_activation_bytes,
    count_alike,
    factor_activation_bytes,
    padded_vocab,
    query_inputs,
)
from llmtrain.model.layers import widths
from llmtrain.ops import attention_usable
from llmtrain.planner.blueprint import TABLE, Blueprint, Part
from llmtrain.planner.setting import FLOAT, Setting
from llmtrain.planner.sparse import mask_memory, spread_memory


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank.

    state: what stands all the time, by kind. step: the largest that each other kind gets.
    moments: everything together, at each moment that may be the fullest.
    """

    state: dict[str, int]
    step: dict[str, int]
    moments: dict[str, int]

    @property
    def peak(self) -> int:
        """The most at any moment."""
        return max(self.moments.values())


def memory_estimate(setting: Setting, blueprint: Blueprint, stage: int = 0) -> Memory:
    """Memory of a rank of pipeline rank ``stage`` with the parameters of ``blueprint``."""
    stages = setting.stages(stage)
    blocks = sum(len(part.blocks) for part in stages)
    units = blueprint.units(stages)
    parts = [part for unit in units for part in unit]
    state = _state(setting, parts)
    standing = sum(state.values())
    gathered = _Gathered.of(setting, units)
    grads = _Gradients.of(setting, units)
    split = activation_split(setting)
    tokens = setting.padded_tokens if setting.sequence else setting.tokens
    recompute, compute = setting.cfg.train.recompute, setting.precision.compute
    held = blocks * _in_flight(setting, stage)
    kept = activation_bytes(setting.model, tokens, compute, recompute, split, math.ceil(held))
    change = _changed_activations(setting.model)
    if change is not None and blocks:
        numbers = [number for part in stages for number in part.blocks]
        values = (tokens, compute, recompute, split)
        changed = sum(change(setting.model, number, *values) for number in numbers)
        kept += math.ceil(changed * held / blocks)
    kept += math.ceil(_masks(setting, held) + _shared_rows(setting, held))
    running = _running_block(setting, tokens, split) + spread_memory(setting, parts)
    head = _Head.of(setting, stages[-1].last)
    loss = kept + head.hidden + head.gradient + head.chunk
    one = _block_bytes(setting, tokens, recompute, split)
    # A block's gradients come as what it kept goes: half of it when most of them are there. Other
    # products than the compiled ones turn their operands in that room.
    freed = min(one // 2, grads.block) if _compiled(setting) and recompute == "none" else 0
    start = kept + head.gradient + running + gathered.backward + grads.block - freed
    end = max(running + one + grads.block + gathered.end, grads.outside + gathered.outside)
    moments = {
        "in the loss": standing + grads.accumulated + gathered.forward + loss,
        "at the start of backward": standing + grads.accumulated + start,
        "at the end of backward": standing + grads.complete + end,
        "in the optimizer's step": standing + grads.stored + _update(setting, parts),
    }
    step = {
        "gradients": max(grads.stored, grads.accumulated),
        "gathered weights": max(gathered.forward, gathered.backward),
        "activations": kept,
        "logits chunk": head.chunk,
        "running block": running,
    }
    return Memory(state, step, moments)


def _changed_activations(model: ModelConfig) -> Callable[..., int] | None:
    """What counts how a block of this model differs from ``block_activation_bytes``."""
    if model.adapters is not None:
        return adapter_activation_bytes
    return None if model.factorized is None else factor_activation_bytes


def _block_bytes(setting: Setting, tokens: int, recompute: str, split: ActivationSplit) -> int:
    """The most that a block keeps; what adapters change is left out."""
    model, compute = setting.model, setting.precision.compute
    one = block_activation_bytes(model, tokens, compute, recompute, split)
    if model.factorized is None:
        return one
    numbers = range(model.n_layers)
    values = (tokens, compute, recompute, split)
    return one + max(factor_activation_bytes(model, number, *values) for number in numbers)


def activation_split(setting: Setting) -> ActivationSplit:
    """How the ranks of a run share its activations."""
    parallel, degrees = setting.cfg.parallel, setting.degrees
    return ActivationSplit(
        degrees.tensor,
        setting.sequence,
        parallel.keep_gathered,
        degrees.context,
        parallel.context_method == "ring",
        _attends_by_tokens(setting),
    )


def _compiled(setting: Setting) -> bool:
    """Whether products are the compiled ones of float32."""
    return setting.fused and matmul_for(setting.precision.compute) is FP32_NATIVE


def _attends_by_tokens(setting: Setting) -> bool:
    if not setting.fused or setting.model.scaling.attention != "softmax":
        return False
    query = torch.empty(0, setting.model.d_head or 0, dtype=setting.precision.compute, device="cpu")
    return attention_usable(query)


def _in_flight(setting: Setting, rank: int) -> float:
    """Micro-batches whose activations pipeline rank ``rank`` holds at once, in all its stages.

    gpipe: all; 1f1b: as many as ranks from here on (Narayanan et al. 2019); with v stages on a
    rank 2 (p - 1 - r) + (v - 1) p + 1 forwards of one stage come before the first backward ends
    (Narayanan et al. 2021). zero_bubble begins backward p - 1 - r forwards earlier, and the
    weights' gradients, which free what was kept, lag r of them behind: v p on every rank.
    """
    p, m, v = setting.degrees.pipeline, setting.micro_batches, len(setting.stages(rank))
    schedule = setting.cfg.parallel.pipeline_schedule
    if p == 1:
        return 1
    if schedule == "gpipe":
        return m
    if schedule == "1f1b":
        return min(m, p - rank)
    if schedule == "zero_bubble":
        return min(m, p)
    return min(m * v, 2 * (p - 1 - rank) + (v - 1) * p + 1) / v


def _stored(setting: Setting, parts: Iterable[Part]) -> int:
    """Elements of the shards that a rank stores."""
    return sum(part.stored(setting.shards) for part in parts)


def _bytes(setting: Setting, parts: Iterable[Part]) -> int:
    """Of the parts as FSDP2 gathers them."""
    return sum((part.packed or setting.item) * part.elements for part in parts)


def _elements(parts: Iterable[Part]) -> int:
    return sum(part.elements for part in parts)


def _state(setting: Setting, parts: list[Part]) -> dict[str, int]:
    """float32 weights and moments of the stored shards (AdamW: and a step count for each), a
    penalty's anchor and Fisher information, and without FSDP2 the copies of the matrices in the
    compute dtype."""
    packed = [part for part in parts if part.packed]
    plain = [part for part in parts if not part.packed]
    weights = FLOAT * _stored(setting, plain)
    lion = setting.cfg.optim.name == "lion"
    trained = [part for part in parts if part.trained]
    moment = FLOAT * _stored(setting, trained)
    found = {
        "weights (fp32)": weights,
        "optimizer state": moment if lion else 2 * moment + FLOAT * len(trained),
    }
    if packed:
        size = sum(part.packed * part.stored(setting.shards) for part in packed)
        adapters = setting.model.adapters
        found[f"frozen weights ({adapters.base if adapters else ''})"] = size
    penalty = setting.cfg.penalty
    if penalty is not None and not penalty.offload:
        found["penalty"] = weights * (2 if penalty.kind == "ewc" else 1)
    if setting.item != FLOAT and setting.data_ranks == 1:
        tied = setting.model.tie_embeddings
        cast = [
            p
            for p in plain
            if p.kept == 1 and (p.role in ("hidden", "head") or (tied and _is_table(p)))
        ]
        found["compute copies"] = setting.item * _elements(cast)
    if setting.cfg.sparsity is not None:
        found |= mask_memory(setting, parts)
    return found


def _is_table(part: Part) -> bool:
    return part.name == TABLE


@dataclass(frozen=True)
class _Gathered:
    """Bytes of the weights that FSDP2 has gathered: in the loss, at the start and at the end of
    backward, and of them outside the blocks."""

    forward: int = 0
    backward: int = 0
    end: int = 0
    outside: int = 0

    @classmethod
    def of(cls, setting: Setting, units: list[list[Part]]) -> _Gathered:
        """Outside the blocks: from forward to the end of backward. Of blocks: all of them until
        their backward with ``reshard_after_forward: false``, all in a pipeline's backward, else
        the running one and those that ``prefetch`` has on their way. A single shard in the
        compute dtype is not copied."""
        if setting.data_ranks == 1 or (setting.shards == 1 and setting.item == FLOAT):
            return cls()
        units = [[part for part in unit if part.kept == 1] for unit in units]
        blocks = [_bytes(setting, unit) for unit in units if unit[0].block is not None]
        outside = sum(_bytes(setting, unit) for unit in units if unit[0].block is None)
        running = min(1 + setting.cfg.parallel.prefetch, len(blocks))
        end = outside + running * max(blocks, default=0)
        if setting.degrees.pipeline > 1:
            end = outside + sum(blocks)
        if not setting.cfg.parallel.reshard_after_forward:
            return cls(outside + sum(blocks), outside + sum(blocks), end, outside)
        return cls(outside, end, end, outside)


@dataclass(frozen=True)
class _Gradients:
    """Bytes of gradients: stored when complete; accumulated while a micro-batch that is not the
    first runs; complete towards the end of the last backward; of the running block and of what is
    outside the blocks beside these, while they are computed and reduced."""

    stored: int
    accumulated: int
    complete: int
    block: int
    outside: int

    @classmethod
    def of(cls, setting: Setting, units: list[list[Part]]) -> _Gradients:
        """Gradients come out whole, in the compute dtype where FSDP2 gathers in it. FSDP2 frees a
        unit's weights, copies its gradients into a buffer in ``precision.reduce``, reduces that
        and keeps the shard. Micro-batches before the last add up whole gradients; where each is
        reduced, what it adds stays beside the sum until the end of its backward."""
        units = [[part for part in unit if part.trained] for unit in units]
        units = [unit for unit in units if unit]
        parts = [part for unit in units for part in unit]
        whole, stored = FLOAT * _elements(parts), FLOAT * _stored(setting, parts)
        outside = [part for part in parts if part.block is None]
        blocks = [u for u in units if u[0].block is not None]
        block = max(map(_elements, blocks), default=0)
        several = setting.micro_batches > 1
        if setting.data_ranks == 1:
            table = max((p.elements for p in outside), default=0)
            # A table's gradient is made apart and added; the first goes into its place at once.
            extra = 2 if setting.model.tie_embeddings else 1
            added = FLOAT * table * (extra if several else extra - 1)
            new = FLOAT * block if several else 0
            return cls(stored, whole if several else 0, whole, new, added)
        reduce = setting.precision.reduce.itemsize
        accumulates = several and setting.reductions == 1
        held = whole if accumulates else (stored if several else 0)
        complete = whole if accumulates else (2 * stored if several else stored)
        unit = max(setting.item, reduce)
        return cls(stored, held, complete, unit * block, unit * _elements(outside))


def _running_block(setting: Setting, tokens: int, split: ActivationSplit) -> int:
    """Temporaries of a block in backward: the gradients of the residual stream and of the
    activation's input, what sequence parallelism gathers, what recomputation brings back. (The
    gradient of the activation's result takes the place of the result itself.)"""
    model, item = setting.model, setting.item
    _, _, ff = widths(model)
    mode = setting.cfg.train.recompute
    inner = (2 if model.activation == "swiglu" else 1) * ff // split.tensor
    stream = tokens * model.d_model * item
    running = stream // split.residual + tokens * inner * item
    if split.sequence:
        running += stream
    if mode == "selective" and model.activation != "relu":
        running += tokens * ff // split.tensor * item
    if model.adapters is not None and model.adapters.base not in (None, "bf16"):
        # The largest weight of a block, unpacked for a product.
        running += inner * model.d_model * item
    if mode == "full":
        running += _block_bytes(setting, tokens, "none", split)
        running += int(_masks(setting, 1, "none")) - stream // split.residual
    return running


def _masks(setting: Setting, blocks: float, recompute: str | None = None) -> float:
    """Masks that torch's attention on the CPU keeps in each block: of documents s numbers a token;
    of a rank's two chunks of a split sequence the keys they may see, 2 c + 1 chunks."""
    if not (setting.fused and setting.item == FLOAT):
        return 0
    if (recompute or setting.cfg.train.recompute) == "full":
        return 0
    parallel, length = setting.cfg.parallel, setting.cfg.data.seq_len
    if setting.degrees.context > 1:
        chunk = length // (2 * setting.degrees.context)
        copies = setting.sequences if setting.cfg.data.document_mask else 1
        gathers = parallel.context_method == "allgather"
        return blocks * copies * chunk * (chunk + length) * FLOAT if gathers else 0
    masked = setting.cfg.data.document_mask and not _attends_by_tokens(setting)
    return blocks * setting.tokens * length * FLOAT if masked else 0


def _shared_rows(setting: Setting, blocks: float) -> float:
    """Rows of the q k v weight that ranks which share a key/value head gather and keep."""
    model = setting.model
    assert model.n_kv_heads is not None and model.d_head is not None
    sharing = setting.degrees.tensor // model.n_kv_heads
    if sharing <= 1:
        return 0
    # Each keeps its own query heads, the key and the value.
    rows = (model.n_heads // setting.degrees.tensor + 2) * model.d_head
    alike = count_alike(model, range(model.n_layers))
    columns = sum(n * query_inputs(model, block) for block, n in alike.items()) / model.n_layers
    return blocks * rows * columns * setting.item


@dataclass(frozen=True)
class _Head:
    """Bytes in the loss: the hidden states, the head's gradient, and a chunk of logits with what
    is computed from it."""

    hidden: int = 0
    gradient: int = 0
    chunk: int = 0

    @classmethod
    def of(cls, setting: Setting, last: bool) -> _Head:
        """The head's gradient is float32 from the first chunk on; further chunks' products are
        added to it (compiled products: at once). Float32: the logits twice, for the products'
        transposed operand (compiled ones: once); bf16: the logits
        and two float32 copies (compiled kernels: none)."""
        if not last:
            return cls()
        model, item = setting.model, setting.item
        words = padded_vocab(model) // setting.degrees.tensor
        rows = min(setting.cfg.loss.chunk_tokens, setting.tokens)
        gradient = FLOAT * words * model.d_model
        compiled = _compiled(setting)
        per_logit = 2 * item if item == FLOAT else item + (0 if setting.fused else 2 * FLOAT)
        per_logit = item if compiled else per_logit
        adds = setting.tokens > rows and not compiled
        product = item * words * model.d_model if adds else 0
        hidden = setting.tokens * model.d_model * item
        return cls(hidden, gradient, rows * words * per_logit + product)


def _update(setting: Setting, parts: list[Part]) -> int:
    """Temporaries of the gradient norm, which squares in float64, and of Lion, which forms the
    update of a group of parameters at once."""
    largest = max((part.stored(setting.shards) for part in parts), default=0)
    norm = torch.float64.itemsize * largest
    if setting.cfg.optim.name != "lion":
        return norm
    roles = {part.role for part in parts}
    group = max(_stored(setting, (p for p in parts if p.role == role)) for role in roles)
    return max(norm, FLOAT * group)
