"""The layouts of a run on so many GPUs, the fastest that fits, and why not a simpler one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llmtrain.config import check_world
from llmtrain.config.check_layout import check_layout
from llmtrain.config.faults import Collector
from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.schema import RunConfig
from llmtrain.errors import LlmtrainError
from llmtrain.planner.forecast import USABLE, Forecast, Forecaster
from llmtrain.planner.timing import COMPUTE

MICRO_BATCHES = (1, 2, 4, 8, 16)
RECOMPUTE = ("none", "selective", "full")
# A sequence is worth sharing when each rank's part still fills a GPU.
LEAST_CONTEXT = 4096


@dataclass(frozen=True)
class Found:
    """What the search looked at. best: fastest first, a few; tried, fitting: layouts."""

    best: list[Forecast]
    tried: int
    fitting: int
    leanest: Forecast | None = None


def search(forecaster: Forecaster, cfg: RunConfig, world: int, keep: int = 5) -> Found:
    """The fastest layouts of ``cfg`` on ``world`` GPUs that fit, and the leanest if none does.

    Tried are degrees of tensor (inside a node), pipeline, context and shard, micro-batches and
    recomputation; everything else, the global batch before all, stays what ``cfg`` says.
    """
    best: list[Forecast] = []
    leanest: tuple[int, RunConfig] | None = None
    tried = fitting = 0
    room = USABLE * forecaster.machine.memory
    for candidate in candidates(cfg, world, forecaster):
        try:
            setting = forecaster.setting(candidate, world)
            peak = forecaster.memory(setting)[0].peak
        except LlmtrainError:
            continue
        tried += 1
        if leanest is None or peak < leanest[0]:
            leanest = (peak, candidate)
        if peak > room:
            continue
        fitting += 1
        best.append(forecaster.forecast(candidate, world))
        best = sorted(best, key=lambda f: (f.time.total, _plainness(f)))[:keep]
    least = forecaster.forecast(leanest[1], world) if leanest and not best else None
    return Found(best, tried, fitting, least)


def _plainness(forecast: Forecast) -> tuple[int, ...]:
    """Among equals: fewer kinds of parallelism, then less recomputation."""
    d = forecast.setting.degrees
    recompute = RECOMPUTE.index(forecast.setting.cfg.train.recompute)
    return (d.pipeline, d.context, d.tensor, recompute)


def candidates(cfg: RunConfig, world: int, forecaster: Forecaster) -> Iterator[RunConfig]:
    """Configs with every layout worth a look that the rules allow."""
    for parallel in _layouts(cfg, world, forecaster):
        data = world // (parallel.tensor * parallel.pipeline * parallel.context)
        share = cfg.train.global_batch_size // data
        for micro in MICRO_BATCHES:
            if share % micro:
                continue
            for recompute in RECOMPUTE:
                train = replace(cfg.train, micro_batch_size=micro, recompute=recompute)
                candidate = replace(cfg, parallel=parallel, train=train)
                if _allowed(candidate, world):
                    yield candidate


def _allowed(cfg: RunConfig, world: int) -> bool:
    faults = Collector()
    check_layout(cfg, faults)
    if faults.found:
        return False
    try:
        check_world(cfg, world)
    except LlmtrainError:
        return False
    return True


def _layouts(cfg: RunConfig, world: int, forecaster: Forecaster) -> Iterator[ParallelConfig]:
    node, layers = forecaster.machine.node, forecaster.model.n_layers
    length, batch = cfg.data.seq_len, cfg.train.global_batch_size
    for tensor in _doublings(min(node, world)):
        for context in _doublings(max(1, length // LEAST_CONTEXT)):
            for pipeline in _divisors(world // (tensor * context)):
                data, rest = divmod(world, tensor * context * pipeline)
                if rest or data > batch or batch % data or pipeline > layers:
                    continue
                for replicate in sorted({1, max(1, data * tensor * context // node)}):
                    if data % replicate:
                        continue
                    for schedule, stages in _schedules(cfg, pipeline, layers):
                        yield replace(
                            cfg.parallel,
                            tensor=tensor,
                            context=context,
                            pipeline=pipeline,
                            pipeline_schedule=schedule,
                            pipeline_stages=stages,
                            shard=None,
                            replicate=replicate,
                            reshard_after_forward=pipeline == 1,
                            reduce_every_micro_batch=False,
                        )


def _schedules(cfg: RunConfig, pipeline: int, layers: int) -> Iterator[tuple[str, int | None]]:
    """Schedules and stages a rank: 1F1B, and interleaved with 2, 4 and as many as there are."""
    yield "1f1b", None
    if pipeline > 1:
        most = layers // pipeline
        for stages in sorted({2, 4, most}):
            if 2 <= stages <= most:
                yield "interleaved", stages


def _doublings(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, min(n, 64) + 1) if n % i == 0]


def binding(forecast: Forecast) -> str:
    """What holds this layout back, in one sentence."""
    machine, time = forecast.machine, forecast.time
    if not forecast.fits:
        moment = max(forecast.memory.moments, key=lambda m: forecast.memory.moments[m])
        kinds = forecast.memory.state | forecast.memory.step
        kind = max(kinds, key=lambda k: kinds[k])
        return (
            f"memory: {forecast.memory.peak / 2**30:.1f} GiB {moment}, of which {kind} are the "
            f"most, but {machine.name} has {USABLE * machine.memory / 2**30:.1f} GiB to give"
        )
    waiting = {kind: s for kind, s in time.parts.items() if kind not in (*COMPUTE, "optimizer")}
    share = 1 - time.computing / time.total
    if not waiting or share < 0.1:
        kind = max(COMPUTE, key=lambda k: time.parts.get(k, 0.0))
        part = time.parts[kind] / time.total
        return f"arithmetic: {part:.0%} of the step are {kind}, {share:.0%} is waiting"
    kind = max(waiting, key=lambda k: waiting[k])
    return f"{kind}: {waiting[kind] / time.total:.0%} of the step, {share:.0%} is waiting in all"


def simpler(forecaster: Forecaster, best: Forecast, world: int) -> list[str]:
    """For each choice that costs something, what the plainer one would do instead."""
    found = []
    parallel, train = best.setting.cfg.parallel, best.setting.cfg.train
    for key in ("tensor", "pipeline", "context"):
        degree = getattr(parallel, key)
        if degree > 1:
            plain = replace(parallel, **{key: degree // 2}, shard=None)
            if key == "pipeline" and degree // 2 == 1:
                plain = replace(plain, pipeline_schedule="1f1b", pipeline_stages=None)
            cfg = replace(best.setting.cfg, parallel=plain)
            found.append(f"{key} {degree // 2}: " + _verdict(forecaster, cfg, best, world))
    if train.recompute != "none":
        less = RECOMPUTE[RECOMPUTE.index(train.recompute) - 1]
        cfg = replace(best.setting.cfg, train=replace(train, recompute=less))
        found.append(f"recompute {less}: " + _verdict(forecaster, cfg, best, world))
    micro = best.setting.sequences
    if best.setting.rank_sequences % (2 * micro) == 0:
        cfg = replace(best.setting.cfg, train=replace(train, micro_batch_size=2 * micro))
        found.append(f"micro_batch_size {2 * micro}: " + _verdict(forecaster, cfg, best, world))
    return found


def _verdict(forecaster: Forecaster, cfg: RunConfig, best: Forecast, world: int) -> str:
    if not _allowed(cfg, world):
        return "the batch or the shape does not allow it"
    try:
        other = forecaster.forecast(cfg, world)
    except LlmtrainError as error:
        return str(error)
    if not other.fits:
        room = USABLE * other.machine.memory / 2**30
        return f"needs {other.memory.peak / 2**30:.1f} GiB of {room:.1f} GiB"
    change = other.time.total / best.time.total - 1
    return f"{abs(change):.1%} {'slower' if change > 0 else 'faster'}"
