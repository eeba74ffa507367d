"""Tensor-parallel collectives of blocks with frozen weights and adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

from llmtrain.config.schema import ModelConfig
from llmtrain.model import ADAPTER, PARTS, Decoder, adapted_parts, cut_dim, is_directed
from llmtrain.parallel.pipeline import Part as Stage
from llmtrain.planner.setting import Setting

GATHER, SCATTER, REDUCE = "all-gather", "reduce-scatter", "all-reduce"


def adapter_sizes(model: ModelConfig) -> tuple[int, int]:
    """(elements of all adapters, those of them of which sequence-parallel ranks form summands: A of
    column-parallel layers, B and magnitude of row-parallel ones)."""
    with torch.device("meta"):
        named = [(n, p.numel()) for n, p in Decoder(model).named_parameters() if ADAPTER in n]
    column = tuple(f"{kind}{ADAPTER}" for kind in PARTS if cut_dim(kind) == 0)
    summed = sum(n for name, n in named if any(c in name for c in column) == (".a.weight" in name))
    return sum(n for _, n in named), summed


def adapted_blocks(setting: Setting, stages: Iterable[Stage]) -> dict[str, tuple[int, int]]:
    """Collective -> (calls, values) of a micro-batch in this rank's blocks.

    A frozen product gathers no input again, and its backward runs only where an adapter comes
    before it. An adapter moves its r values a token (r for each of a fused layer's matrices): a
    column-parallel layer's B gathers them and reduces their gradient, a row-parallel layer's A
    the other way. values: elements of all payloads together. Where the weights train as well,
    inputs are gathered again and every backward runs.
    """
    model, parallel = setting.model, setting.cfg.parallel
    assert model.adapters is not None
    trains = not model.adapters.freeze
    split = parallel.pipeline_schedule == "zero_bubble" and setting.degrees.pipeline > 1
    forwards = 2 if setting.cfg.train.recompute == "full" else 1
    again = 0 if parallel.keep_gathered else 1
    calls: Counter[str] = Counter()
    values: Counter[str] = Counter()
    tokens = setting.padded_tokens if setting.sequence else setting.tokens

    def add(kind: str, count: int, width: int) -> None:
        if not setting.sequence:
            # Of a pair of conjugate collectives the reduction is left.
            if kind == GATHER:
                return
            kind = REDUCE
        calls[kind] += count
        values[kind] += count * tokens * width

    for stage in stages:
        # A later stage passes the gradient of its input on in any case.
        before = trains or not stage.first
        passes = 2 if split and not stage.first else 1
        for i in stage.blocks:
            for kind in PARTS:
                parts = adapted_parts(model, f"blocks.{i}.{kind}")
                adapted = len(parts)
                width = adapted * max((part.rank for part in parts), default=0)
                if cut_dim(kind) == 0:
                    add(GATHER, forwards + again * trains, model.d_model)
                    add(SCATTER, int(before), model.d_model)
                    add(GATHER, (forwards + again) * bool(adapted), width)
                    add(SCATTER, int(bool(adapted)), width)
                else:
                    add(SCATTER, forwards, model.d_model)
                    add(GATHER, passes if trains else int(before), model.d_model)
                    add(SCATTER, forwards * bool(adapted), width)
                    add(GATHER, passes * bool(adapted), width)
                    if adapted and is_directed(model.adapters):
                        # Squares of rows in float32, whatever the layout of the tokens.
                        calls[REDUCE] += forwards
                        values[REDUCE] += forwards * model.d_model * 4 // setting.item
                before = before or adapted > 0
    return {kind: (count, values[kind]) for kind, count in calls.items() if count}
