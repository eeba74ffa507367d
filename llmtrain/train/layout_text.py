"""What ``--dry-run`` says about a run's ranks: parameters, memory and communication of each."""

from __future__ import annotations

from llmtrain.planner import (
    Blueprint,
    Memory,
    Part,
    Setting,
    Traffic,
    draw,
    memory_estimate,
    step_traffic,
    zero_state,
    zero_traffic,
)
from llmtrain.train.console import size, table

# Below, a collective carries single numbers.
_SMALL = 1024


def layout_lines(setting: Setting) -> list[str]:
    """Degrees, and per rank: parameters, memory, communication.

    Ranks differ by their place in the pipeline and by uneven shards alone. The first rank of
    FSDP2's dimension has the largest shards, and shown is the fullest pipeline rank.
    """
    degrees = setting.degrees
    blueprint = draw(setting)
    memories = [memory_estimate(setting, blueprint, i) for i in range(degrees.pipeline)]
    stage = max(range(degrees.pipeline), key=lambda i: memories[i].peak)
    lines = [
        "layout:",
        f"  {degrees.world} process(es) = {degrees}; {setting.rank_sequences} sequences per rank "
        f"and step in micro-batches of {setting.sequences}",
    ]
    if degrees.pipeline > 1:
        peaks = ", ".join(size(memory.peak) for memory in memories)
        lines.append(f"  peaks of pipeline ranks: {peaks}; below is pipeline rank {stage}")
    if setting.cfg.parallel.engine == "deepspeed":
        return lines + _zero_lines(setting, memories[stage])
    if degrees.world > 1:
        lines += _parameter_lines(setting, blueprint, stage)
    lines += _memory_lines(memories[stage])
    return lines + (_traffic_lines(setting, blueprint, stage) if degrees.world > 1 else [])


def _parameter_lines(setting: Setting, blueprint: Blueprint, stage: int) -> list[str]:
    """Shapes of all parameters of a stage, of its first block for every block."""
    shards, tensor = setting.shards, setting.degrees.tensor
    units = blueprint.units(setting.stages(stage))
    outside = [part for unit in units for part in unit if part.block is None]
    shown = [*outside, *next(unit for unit in units if unit[0].block is not None)]
    others: dict[str, Part] = {}
    if any(part.split[0] % shards for part in shown):
        last = draw(setting, (shards - 1) * tensor)
        others = {part.name: part for part in last.parts}
    header = ["parameter", "whole"] + (["tensor part"] if tensor > 1 else [])
    header += ["first shard", "last shard"] if others else ["each rank"]
    rows = [tuple(header)]
    for part in shown:
        name = part.name
        if part.block is not None:
            name = name.replace(f"blocks.{part.block}.", "blocks.*.", 1)
        row = [name, _shape(part.shape)] + ([_shape(part.split)] if tensor > 1 else [])
        row += [_shape(part.local)] + ([_shape(others[part.name].local)] if others else [])
        rows.append(tuple(row))
    parts = [part for unit in units for part in unit]
    count = sum(part.stored(shards) for part in parts)
    uneven = "; uneven shards are padded to the first" if others else ""
    return [*table(rows), f"  {count:,} elements in {len(parts)} tensors on a rank{uneven}"]


def _shape(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))


def _zero_lines(setting: Setting, memory: Memory) -> list[str]:
    """Memory and communication under DeepSpeed; activations are the same as natively."""
    state = zero_state(setting)
    own = ("activations", "logits chunk", "running block")
    kinds = {**state, **{kind: memory.step[kind] for kind in own}}
    there = sum(n for kind, n in kinds.items() if not kind.endswith("(host)"))
    rows = [("memory per rank", "estimate"), *((kind, size(n)) for kind, n in kinds.items())]
    rows.append(("all, without what is offloaded", size(there)))
    if setting.degrees.world == 1:
        return table(rows)
    traffic = zero_traffic(setting)
    sent = size(_sent(traffic))
    rest = f"  and a few single numbers; a rank sends {sent} a step by ring algorithms"
    return [*table(rows), *_traffic_table(traffic), rest]


def _memory_lines(memory: Memory) -> list[str]:
    rows = [("memory per rank", "estimate")]
    rows += [(kind, size(n)) for kind, n in (memory.state | memory.step).items() if n]
    rows += [(f"all, {moment}", size(n)) for moment, n in memory.moments.items()]
    rows.append(("peak", size(memory.peak)))
    return table(rows)


def _traffic_lines(setting: Setting, blueprint: Blueprint, stage: int) -> list[str]:
    stages = range(setting.degrees.pipeline)
    traffic = {i: step_traffic(setting, blueprint, i) for i in stages}
    here = [t for t in traffic[stage] if t.payload > _SMALL]
    ranks = setting.degrees.world // setting.degrees.pipeline
    everybody = sum(_sent(traffic[i]) for i in stages) * ranks
    small = sum(t.calls for t in traffic[stage] if t.payload <= _SMALL)
    return [
        *_traffic_table(here),
        f"  and {small} all-reduces of single numbers; a rank sends {size(_sent(traffic[stage]))} "
        f"a step by ring algorithms, all ranks together {size(everybody)}",
    ]


def _traffic_table(traffic: list[Traffic]) -> list[str]:
    rows = [("communication per step", "collective", "over", "ranks", "calls", "a call", "sent")]
    for t in traffic:
        row = (t.what, t.collective, t.over, f"{t.ranks}", f"{t.calls:,}")
        rows.append((*row, size(t.payload / t.calls), size(t.sent)))
    return table(rows)


def _sent(traffic: list[Traffic]) -> int:
    return sum(t.sent for t in traffic)
