"""``--dry-run``: what a run would be, without starting it."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from llmtrain.config import check_world
from llmtrain.config.scaling import residual_kind
from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.config.sparsity import SparsityConfig
from llmtrain.data.plan import build_plan
from llmtrain.model import (
    Decoder,
    Trainable,
    check_formats_on,
    flops_per_token,
    format_lines,
    limit_training,
    param_counts,
    param_roles,
    rate_factors,
    resolve_model,
    scaling_table,
    switch_step,
)
from llmtrain.ops import native_loaded
from llmtrain.optim import build_groups, groups_table
from llmtrain.parallel.hardware import DTYPES, Precision, resolve_precision, tier_line
from llmtrain.parallel.mesh import resolve_degrees
from llmtrain.parallel.world import pick_device
from llmtrain.planner import Setting
from llmtrain.sparsity import (
    check_cuts,
    product_lines,
    sparse_layers,
    sparsity_lines,
    training_flops,
    why_dense,
)
from llmtrain.train.begin import look_ahead
from llmtrain.train.clockwork import Clockwork
from llmtrain.train.console import human, table
from llmtrain.train.layout_text import layout_lines


def dry_run(cfg: RunConfig, world: int | None = None) -> str:
    """Model size, parameter groups, length, mixture plan, memory and layout, as text.

    The data, the config and the files that it names are checked as in a real run, all but the
    values of stored weights; the model is built on the meta device only. world: plan for so many
    processes of a machine that is not this one; None: torchrun's number, or 1, here. Raises
    LlmtrainError where that run would.
    """
    size = world or int(os.environ.get("WORLD_SIZE", "1"))
    check_world(cfg, size)
    hardware, precision, on_cpu = _hardware(cfg, world)
    times = Clockwork.from_config(cfg)
    plan = build_plan(cfg, times.total * cfg.train.global_batch_size)
    model_cfg = resolve_model(cfg, plan.vocab_size)
    degrees = resolve_degrees(cfg.parallel, size)
    fused = on_cpu and native_loaded()
    setting = Setting(cfg, model_cfg, precision, degrees, fused=fused, on_cpu=on_cpu)
    warnings = look_ahead(_for_hooks(cfg, world is not None), model_cfg, plan)
    layout = layout_lines(setting)
    sections = [
        [hardware],
        _model_lines(cfg, model_cfg, precision, world is not None)
        + _sparse_lines(setting, world is not None),
        _length_lines(cfg, times, model_cfg),
        ["data:", *("  " + line for line in plan.tree().splitlines())],
        layout,
        [f"warning: {text}" for text in warnings],
    ]
    return "\n".join("\n".join(lines) for lines in sections if lines)


def _for_hooks(cfg: RunConfig, elsewhere: bool) -> RunConfig:
    """The config by which hooks look at files: whether this machine has sparse products says
    nothing about another one."""
    if not elsewhere or cfg.sparsity is None:
        return cfg
    return replace(cfg, sparsity=replace(cfg.sparsity, products="auto"))


def _hardware(cfg: RunConfig, world: int | None) -> tuple[str, Precision, bool]:
    """The line about it, the number formats, and whether it is a CPU.

    Elsewhere a run computes in bf16 unless told otherwise, as any GPU since Ampere can; what
    this machine can do says nothing about that one. With ``device: cpu`` it is like this one.
    """
    if world is None or (cfg.device == "cpu" and cfg.precision.compute == "auto"):
        device = pick_device("cpu" if world is not None else cfg.device, 0)
        precision = resolve_precision(cfg.precision, device)
        return tier_line(device, precision), precision, device.type == "cpu"
    compute = "fp32" if cfg.precision.compute == "fp32" else "bf16"
    precision = Precision(DTYPES[compute], DTYPES[cfg.precision.reduce])
    line = f"hardware: {world} processes elsewhere, {compute}; this machine is not asked"
    return line, precision, cfg.device == "cpu"


def _model_lines(
    cfg: RunConfig, model_cfg: ModelConfig, precision: Precision, elsewhere: bool
) -> list[str]:
    counts = param_counts(model_cfg)
    rows = [("kind", "parameters")] + [(kind, f"{n:,}") for kind, n in counts.items()]
    with torch.device("meta"):
        model = Decoder(model_cfg, precision.compute)
    limit_training(model, model_cfg, cfg)
    named, rates = dict(model.named_parameters()), rate_factors(model_cfg)
    groups = build_groups(named, param_roles(model), cfg.optim, rates)
    lines = [
        "model:",
        *table(rows),
        *_scaling_lines(cfg, model_cfg),
        f"parameter groups ({cfg.optim.name}):",
        *table(groups_table(groups, cfg.optim)),
    ]
    if cfg.trainable:
        lines += ["what trains when:", *table(Trainable(cfg, model_cfg).lines())]
    if cfg.quantization is not None:
        end = switch_step(cfg)
        until = "" if end is None else f", until step {end:,}; then all in the compute dtype"
        lines += [f"number formats of products{until}:"]
        lines += format_lines(model, model_cfg, cfg)
        if not elsewhere:
            check_formats_on(model, model_cfg, cfg.quantization, pick_device(cfg.device, 0))
    if cfg.sparsity is not None:
        sparse = sparse_layers(model_cfg, cfg.sparsity)
        check_cuts(sparse, model_cfg, cfg.parallel.tensor, cfg.sparsity.method == "slope")
        lines += table(sparsity_lines(model_cfg, cfg.sparsity))
    return lines


def _sparse_lines(setting: Setting, elsewhere: bool) -> list[str]:
    """How sparse layers are stored, and which products they get, timed where this machine has not
    done so before."""
    section, on_cpu = setting.cfg.sparsity, setting.on_cpu
    if section is None:
        return []
    dense = why_dense(setting.cfg, setting.degrees, on_cpu)
    how = f"with their zeros ({dense})" if dense else "kept weights alone, moments for them only"
    return [f"sparse layers are stored {how}", *_product_lines(setting, section, elsewhere)]


def _product_lines(setting: Setting, section: SparsityConfig, elsewhere: bool) -> list[str]:
    on_cpu = setting.on_cpu
    layers = sparse_layers(setting.model, section)
    gpu = None if on_cpu or elsewhere else pick_device(setting.cfg.device, 0)
    return product_lines(setting.cfg, layers, setting.precision.compute, on_cpu, gpu)


def _scaling_lines(cfg: RunConfig, model_cfg: ModelConfig) -> list[str]:
    scaling = model_cfg.scaling
    lines = []
    if scaling.parametrization != "standard":
        lines.append(f"scaling ({scaling.parametrization}, base width {scaling.base_width}):")
        lines += table(scaling_table(model_cfg, cfg.optim))
    residual = residual_kind(scaling)
    if residual != "sum":
        share = f", tau {scaling.tau:.4g}" if scaling.tau is not None else ""
        interpolated = " (our interpolation by depth)" if cfg.model.scaling.tau_by_depth else ""
        lines.append(f"residual stream: {residual}{share}{interpolated}")
    return lines


def _length_lines(cfg: RunConfig, times: Clockwork, model_cfg: ModelConfig) -> list[str]:
    tokens = times.total * times.tokens_per_step
    per_token = flops_per_token(model_cfg, cfg.data.seq_len)
    in_all, dense = training_flops(cfg, model_cfg), per_token * tokens
    of_dense = "" if cfg.sparsity is None else f" ({in_all / dense:.3g} of the dense run's)"
    schedule = cfg.schedule
    return [
        "length:",
        f"  {times.total:,} steps x {cfg.train.global_batch_size} sequences x "
        f"{cfg.data.seq_len} tokens = {tokens:,} tokens",
        f"  {human(in_all / tokens)} FLOPs per token, {human(in_all)} in all{of_dense}",
        f"  learning rate: {schedule.name}, warmup {schedule.warmup}, peak {cfg.optim.lr:g}",
        f"  evaluation every {_every(times.eval_every)}, checkpoint every "
        f"{_every(times.save_every)}",
    ]


def _every(steps: int | None) -> str:
    return "run (at its end)" if steps is None else f"{steps:,} steps"
