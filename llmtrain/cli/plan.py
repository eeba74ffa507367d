"""``llmtrain plan CONFIG --gpus N --gpu NAME``: memory, time and cost of a run elsewhere."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.cli.process import load_run
from llmtrain.cli.train import MOST_PROCESSES
from llmtrain.errors import EXIT_OK, ConfigError

if TYPE_CHECKING:
    from llmtrain.config.schema import ModelConfig, RunConfig
    from llmtrain.planner.forecast import Forecast, Forecaster
    from llmtrain.planner.machine import Machine

HELP = "memory, time and cost of a run on a cluster, and the fastest layout that fits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("config", help="YAML file that describes the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. parallel.tensor=2"
    )
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs in all")
    parser.add_argument(
        "--gpu", required=True, metavar="NAME", help="a100, h100, h200, b200, gb200, l40s, mi300x"
    )
    parser.add_argument(
        "--search", action="store_true", help="look for the fastest layout that fits"
    )
    parser.add_argument("--price", type=float, metavar="P", help="of one GPU for one hour")
    parser.add_argument(
        "--calibrate", metavar="FILE", help="metrics.jsonl of a run that was measured on this GPU"
    )
    parser.add_argument(
        "--calibrate-gpus", type=int, metavar="N", help="GPUs of that run (its checkpoints know)"
    )
    parser.add_argument("--node-gpus", type=int, metavar="N", help="GPUs that NVLink joins")
    parser.add_argument(
        "--network", type=float, metavar="GBIT", help="network of each GPU in Gbit/s"
    )
    parser.add_argument("--memory", type=float, metavar="GIB", help="memory of a GPU")
    parser.add_argument("--peak", type=float, metavar="TFLOPS", help="dense bf16 peak of a GPU")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    from llmtrain.config import check_world
    from llmtrain.planner.forecast import Forecaster
    from llmtrain.planner.machine import machine_named
    from llmtrain.planner.search import search

    if not 1 <= args.gpus <= MOST_PROCESSES:
        raise ConfigError(f"--gpus {args.gpus}: plans are for 1 to {MOST_PROCESSES:,} GPUs")
    if args.price is not None and not 0 <= args.price < math.inf:
        raise ConfigError(f"--price {args.price:g}: must be a number, 0 or more")
    cfg = load_run(args)
    machine = machine_named(
        args.gpu,
        node=args.node_gpus,
        network_gbit=args.network,
        memory_gib=args.memory,
        peak_tflops=args.peak,
    )
    if args.calibrate is not None:
        machine = _calibrated(Path(args.calibrate), args.calibrate_gpus, machine)
    forecaster = Forecaster(cfg, _model(cfg), machine)
    if not args.search:
        check_world(cfg, args.gpus)
        forecasts, lines = [forecaster.forecast(cfg, args.gpus)], []
    else:
        found = search(forecaster, cfg, args.gpus)
        forecasts = found.best or ([found.leanest] if found.leanest else [])
        lines = [f"search: {found.tried:,} layouts, {found.fitting:,} of them fit"]
        if not forecasts:
            raise ConfigError(
                f"--search: no layout of {args.gpus} GPUs shares train.global_batch_size "
                f"{cfg.train.global_batch_size} and the model's shape; use another number of GPUs"
            )
    if args.json:
        print(json.dumps([_facts(one, args.price) for one in forecasts]))
        return EXIT_OK
    lines += _lines(forecaster, forecasts, args)
    print("\n".join(lines))
    return EXIT_OK


def _model(cfg: RunConfig) -> ModelConfig:
    """The resolved model; the vocabulary is the tokenizer's where the config does not say it."""
    from llmtrain.data.plan import build_plan
    from llmtrain.model import resolve_model

    if cfg.model.vocab_size is not None:
        return resolve_model(cfg, None)
    return resolve_model(cfg, build_plan(cfg, cfg.train.global_batch_size).vocab_size)


def _calibrated(file: Path, gpus: int | None, machine: Machine) -> Machine:
    from llmtrain.checkpoint import scan
    from llmtrain.config import load_config
    from llmtrain.planner.calibrate import calibrated, measured_rate
    from llmtrain.planner.forecast import Forecaster

    rate = measured_rate(file)
    if gpus is None:
        metas = [c.path / "meta.json" for c in scan(file.parent / "checkpoints")]
        known = [meta for meta in metas if meta.exists()]
        if not known:
            raise ConfigError(
                f"--calibrate {file}: no checkpoint beside it says how many GPUs the run had; "
                "add --calibrate-gpus N"
            )
        gpus = int(json.loads(known[-1].read_text(encoding="utf-8"))["world_size"])
    cfg = load_config(file.parent / "config.yaml")
    return calibrated(Forecaster(cfg, _model(cfg), machine), gpus, rate)


def _lines(
    forecaster: Forecaster, forecasts: list[Forecast], args: argparse.Namespace
) -> list[str]:
    from llmtrain.planner.search import binding, simpler
    from llmtrain.train.console import human, size, table

    best = forecasts[0]
    reached = best.machine.reached
    calibrated = "" if reached.factor == 1 else f", calibrated by factor {reached.factor:.3f}"
    lines = [
        f"plan: {args.gpus} x {best.machine.name}, {best.machine.node} a node, "
        f"{8 * best.machine.network / 1e9:.0f} Gbit/s each{calibrated}"
    ]
    if len(forecasts) > 1:
        rows = [("layout", "memory", "step", "tokens/s", "MFU")]
        rows += [
            (
                _layout(one),
                size(one.memory.peak),
                f"{one.time.total:.3f} s",
                human(one.tokens_per_second),
                f"{one.mfu:.1%}",
            )
            for one in forecasts
        ]
        lines += [*table(rows), "the first one:"]
    lines.append(f"layout: {_layout(best)}")
    state = best.memory.state | best.memory.step
    parts = [("memory of the fullest rank", "")]
    parts += [(kind, size(n)) for kind, n in state.items() if n]
    parts.append(("peak", f"{size(best.memory.peak)} of {size(best.machine.memory)}"))
    parts.append(("time of a step", f"{best.time.total:.4g} s"))
    parts += [(kind, f"{s / best.time.total:.1%}") for kind, s in best.time.parts.items()]
    parts.append(("a rank sends in a step", size(best.sent)))
    lines += table(parts)
    lines.append(
        f"expected: {human(best.tokens_per_second)} tokens/s, MFU {best.mfu:.1%}, "
        f"{best.days:.3g} days for {human(best.tokens)} tokens"
    )
    if args.price is not None:
        hours = best.days * 24 * args.gpus
        lines.append(f"cost: {best.cost(args.price):,.0f} for {hours:,.0f} GPU hours")
    lines.append(f"binding: {binding(best)}")
    if args.search and best.fits:
        lines += [f"instead, {line}" for line in simpler(forecaster, best, args.gpus)]
    if best.setting.cfg.quantization is not None:
        lines.append("quantization: products are timed in bf16, so FP8 runs should be faster")
    lines.append(f"overrides: {' '.join(_overrides(best))}")
    return lines


def _layout(one: Forecast) -> str:
    cfg = one.setting.cfg
    pipeline = ""
    if one.setting.degrees.pipeline > 1:
        pipeline = f", {cfg.parallel.pipeline_schedule} x {len(one.setting.stages(0))}"
    return (
        f"{one.setting.degrees}{pipeline}, micro-batch {one.setting.sequences}, "
        f"recompute {cfg.train.recompute}"
    )


def _overrides(one: Forecast) -> list[str]:
    """What to add to ``llmtrain train`` for this layout."""
    cfg, parallel = one.setting.cfg, one.setting.cfg.parallel
    words = [
        f"parallel.{key}={getattr(parallel, key)}"
        for key in ("tensor", "context", "pipeline", "replicate")
    ]
    words.append(f"parallel.reshard_after_forward={str(parallel.reshard_after_forward).lower()}")
    if parallel.pipeline > 1:
        words.append(f"parallel.pipeline_schedule={parallel.pipeline_schedule}")
        if parallel.pipeline_stages is not None:
            words.append(f"parallel.pipeline_stages={parallel.pipeline_stages}")
    words.append(f"train.micro_batch_size={one.setting.sequences}")
    return [*words, f"train.recompute={cfg.train.recompute}"]


def _facts(one: Forecast, price: float | None) -> dict[str, object]:
    """A forecast as JSON values; bytes, seconds."""
    return {
        "gpu": one.machine.name,
        "factor": one.machine.reached.factor,
        "layout": _overrides(one),
        "fits": one.fits,
        "memory": {**one.memory.state, **one.memory.step, "peak": one.memory.peak},
        "seconds": one.time.parts,
        "step_seconds": one.time.total,
        "sent_bytes": one.sent,
        "tokens_per_second": one.tokens_per_second,
        "mfu": one.mfu,
        "days": one.days,
        "cost": None if price is None else one.cost(price),
    }
