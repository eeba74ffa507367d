"""``--dry-run``: what a run would be, without starting it."""

from __future__ import annotations

import os

import torch

from llmtrain.config import check_world
from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.data.plan import build_plan
from llmtrain.model import (
    Decoder,
    activation_bytes,
    flops_per_token,
    padded_vocab,
    param_counts,
    param_roles,
    resolve_model,
)
from llmtrain.optim import build_groups, groups_table
from llmtrain.parallel.hardware import Precision, resolve_precision, tier_line
from llmtrain.parallel.mesh import Degrees, resolve_degrees
from llmtrain.parallel.world import pick_device
from llmtrain.parallel.zero import BUCKET
from llmtrain.train.clockwork import Clockwork
from llmtrain.train.console import gib, human, table


def dry_run(cfg: RunConfig) -> str:
    """Model size, parameter groups, length, mixture plan, memory and layout, as text.

    The data and the config are checked as in a real run; the model is built on the meta device
    only. The world size is torchrun's, or 1.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    check_world(cfg, world)
    device = pick_device(cfg.device, 0)
    precision = resolve_precision(cfg.precision, device)
    times = Clockwork.from_config(cfg)
    plan = build_plan(cfg, times.total * cfg.train.global_batch_size)
    model_cfg = resolve_model(cfg, plan.vocab_size)
    sections = [
        [tier_line(device, precision)],
        _model_lines(cfg, model_cfg, precision),
        _length_lines(cfg, times, model_cfg),
        ["data:", *("  " + line for line in plan.tree().splitlines())],
        _layout_lines(cfg, model_cfg, precision, world),
    ]
    return "\n".join("\n".join(lines) for lines in sections)


def _model_lines(cfg: RunConfig, model_cfg: ModelConfig, precision: Precision) -> list[str]:
    counts = param_counts(model_cfg)
    rows = [("kind", "parameters")] + [(kind, f"{n:,}") for kind, n in counts.items()]
    with torch.device("meta"):
        model = Decoder(model_cfg, precision.compute)
    groups = build_groups(dict(model.named_parameters()), param_roles(model), cfg.optim)
    return [
        "model:",
        *table(rows),
        f"parameter groups ({cfg.optim.name}):",
        *table(groups_table(groups, cfg.optim)),
    ]


def _length_lines(cfg: RunConfig, times: Clockwork, model_cfg: ModelConfig) -> list[str]:
    tokens = times.total * times.tokens_per_step
    per_token = flops_per_token(model_cfg, cfg.data.seq_len)
    schedule = cfg.schedule
    return [
        "length:",
        f"  {times.total:,} steps x {cfg.train.global_batch_size} sequences x "
        f"{cfg.data.seq_len} tokens = {tokens:,} tokens",
        f"  {human(per_token)} FLOPs per token, {human(per_token * tokens)} in all",
        f"  learning rate: {schedule.name}, warmup {schedule.warmup}, peak {cfg.optim.lr:g}",
        f"  evaluation every {_every(times.eval_every)}, checkpoint every "
        f"{_every(times.save_every)}",
    ]


def _every(steps: int | None) -> str:
    return "run (at its end)" if steps is None else f"{steps:,} steps"


def memory_estimate(
    cfg: RunConfig, model_cfg: ModelConfig, precision: Precision, degrees: Degrees
) -> dict[str, int]:
    """Bytes per rank: master weights, gradients, optimizer, gathered weights, activations.

    Weights, gradients and optimizer state are float32 and sharded over ``parallel.shard``;
    gathered weights are the compute-dtype copies that matmuls read (whole model when one rank
    holds all of it, else the two largest blocks); activations follow ``activation_bytes`` for
    this rank's part of each sequence, and gathered keys and values are those of the others.
    """
    shard = degrees.shard * degrees.context * degrees.tensor
    world = degrees.data
    counts = param_counts(model_cfg)
    n_params = counts["total"]
    per_element = 2 if precision.compute == torch.bfloat16 else 4
    moments = 1 if cfg.optim.name == "lion" else 2
    batch = cfg.train.micro_batch_size or cfg.train.global_batch_size // world
    if world * degrees.context == 1:
        gathered = n_params * per_element if per_element == 2 else 0
    elif cfg.parallel.reshard_after_forward:
        outside = n_params - counts["hidden"]
        gathered = per_element * (outside + 2 * counts["hidden"] // model_cfg.n_layers)
    else:
        gathered = per_element * n_params
    gradients = 4 * n_params // shard
    per_rank = cfg.train.global_batch_size // world
    if shard > 1 and batch < per_rank and not cfg.parallel.reduce_every_micro_batch:
        gradients += 4 * n_params  # accumulated unsharded until the last micro-batch
    dtype = precision.compute
    tokens = batch * cfg.data.seq_len // degrees.context
    state = {
        "weights (fp32)": 4 * n_params // shard,
        "gradients (fp32)": gradients,
        "optimizer state": 4 * moments * n_params // shard,
        "compute copies": gathered,
    }
    if cfg.parallel.engine == "deepspeed":
        state = _zero_bytes(cfg, model_cfg, dtype.itemsize, degrees)
    return {
        **state,
        "activations": activation_bytes(model_cfg, 1, tokens, cfg.train.recompute, dtype),
        "gathered keys/values": _gathered_bytes(
            cfg, model_cfg, tokens * (degrees.context - 1), dtype
        ),
        "logits chunk": 3 * 4 * padded_vocab(model_cfg) * min(cfg.loss.chunk_tokens, tokens),
    }


def _zero_bytes(
    cfg: RunConfig, model_cfg: ModelConfig, itemsize: int, degrees: Degrees
) -> dict[str, int]:
    """State under DeepSpeed (Rajbhandari et al. 2020, section 5); itemsize: of compute copies.

    ZeRO 1 shards masters and optimizer, 2 the gradients too, 3 the compute copies too, which it
    gathers two blocks at a time. Gradients are summed in float32 whatever they are computed in,
    and reduced through a bucket. ``(host)``: offloaded.
    """
    stage = cfg.parallel.zero_stage or 3
    counts, ranks = param_counts(model_cfg), degrees.data
    n_params, hidden = counts["total"] // degrees.tensor, counts["hidden"] // degrees.tensor
    moments = 1 if cfg.optim.name == "lion" else 2
    copies, gradients = itemsize * n_params, 4 * n_params
    if stage == 1 and itemsize == 2:
        gradients += 2 * n_params
    if stage > 1:
        gradients = gradients // ranks + 4 * min(BUCKET, n_params)
    if stage == 3:
        blocks = n_params - hidden + 2 * hidden // model_cfg.n_layers
        copies = copies // ranks + itemsize * blocks
    place = " (host)" if cfg.parallel.offload_optimizer else ""
    return {
        f"weights (fp32){place}": 4 * n_params // ranks,
        "gradients (fp32)": gradients,
        f"optimizer state{place}": 4 * moments * n_params // ranks,
        "compute copies": copies,
    }


def _gathered_bytes(cfg: RunConfig, model_cfg: ModelConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of ``tokens`` tokens of other ranks, of all layers that keep them."""
    assert model_cfg.n_kv_heads is not None and model_cfg.d_head is not None
    layers = model_cfg.n_layers if cfg.train.recompute == "none" else 1
    if cfg.parallel.context_method == "ring":
        # What is held and what is coming, of one rank each.
        tokens, layers = 2 * tokens // max(cfg.parallel.context - 1, 1), 1
    return layers * tokens * 2 * model_cfg.n_kv_heads * model_cfg.d_head * dtype.itemsize


def _layout_lines(
    cfg: RunConfig, model_cfg: ModelConfig, precision: Precision, world: int
) -> list[str]:
    degrees = resolve_degrees(cfg.parallel, world)
    per_rank = cfg.train.global_batch_size // degrees.data
    micro = cfg.train.micro_batch_size or per_rank
    parts = memory_estimate(cfg, model_cfg, precision, degrees)
    rows = [("memory per rank", "estimate")] + [(k, gib(v)) for k, v in parts.items()]
    device = {name: bytes_ for name, bytes_ in parts.items() if not name.endswith("(host)")}
    total = "total" if device == parts else "total on the device"
    rows.append((total, gib(sum(device.values()))))
    return [
        "layout:",
        f"  {world} process(es) = {degrees}; "
        f"{per_rank} sequences per rank and step in micro-batches of {micro}",
        *table(rows),
    ]
