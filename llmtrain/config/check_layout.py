"""Rules of the layout: what degrees of parallelism the model, the batch and the world allow."""

from __future__ import annotations

from llmtrain.config.faults import Collector, raise_faults
from llmtrain.config.schema import RunConfig


def check_layout(cfg: RunConfig, faults: Collector) -> None:
    """Add the faults of ``parallel`` that need nothing but the config."""
    _check_tensor(cfg, faults)
    _check_context(cfg, faults)


def _check_tensor(cfg: RunConfig, faults: Collector) -> None:
    model, degree = cfg.model, cfg.parallel.tensor
    if degree == 1:
        return
    if model.n_heads % degree:
        faults.add(
            "parallel.tensor",
            f"{degree} ranks cannot share n_heads {model.n_heads} equally; use a divisor",
            "model.n_heads",
        )
    kv = model.n_kv_heads or model.n_heads
    if kv % degree and degree % kv:
        faults.add(
            "parallel.tensor",
            f"{degree} ranks cannot share n_kv_heads {kv}; one must divide the other",
            "model.n_kv_heads",
        )
    if model.d_ff is not None and model.d_ff % degree:
        faults.add(
            "parallel.tensor",
            f"{degree} ranks cannot share d_ff {model.d_ff} equally; use a divisor",
            "model.d_ff",
        )


def _check_context(cfg: RunConfig, faults: Collector) -> None:
    length, chunks = cfg.data.seq_len, 2 * cfg.parallel.context
    if cfg.parallel.context > 1 and length % chunks:
        lower, upper = length // chunks * chunks, -(-length // chunks) * chunks
        near = " or ".join(str(n) for n in (lower, upper) if n)
        faults.add(
            "data.seq_len",
            f"{length} cannot be cut into 2 x parallel.context = {chunks} equal chunks; use {near}",
            "parallel.context",
        )


def check_world(cfg: RunConfig, world_size: int) -> None:
    """Raise one ConfigError where the run does not fit ``world_size`` processes.

    The degrees of parallelism must multiply to the world size, every data rank takes the same
    number of samples of a global batch, and cuts them in whole micro-batches.
    """
    faults = Collector()
    parallel = cfg.parallel
    per_sample = parallel.tensor * parallel.context * parallel.pipeline
    fixed = per_sample * parallel.replicate
    more = [n for n in ("tensor", "context", "pipeline") if getattr(parallel, n) > 1]
    named = " x ".join(f"{n} {getattr(parallel, n)}" for n in ("replicate", *more))
    world = f"the run has {world_size} processes"
    if parallel.shard is None and world_size % fixed:
        key = f"parallel.{more[0] if more else 'replicate'}"
        product = f"{named} = {fixed}" if more else str(fixed)
        faults.add(key, f"{product} does not divide it: {world}; use a divisor of {world_size}")
    if parallel.shard is not None and parallel.shard * fixed != world_size:
        faults.add(
            "parallel.shard",
            f"shard {parallel.shard} x {named} = {parallel.shard * fixed}, but {world}; "
            "set it to null to fill the world",
        )
    if world_size % per_sample == 0:
        _check_batch(cfg, world_size // per_sample, faults)
    raise_faults(faults.found)


def _check_batch(cfg: RunConfig, ranks: int, faults: Collector) -> None:
    """ranks: those that read different samples."""
    batch, micro = cfg.train.global_batch_size, cfg.train.micro_batch_size
    readers = f"{ranks} ranks read different samples"
    if batch % ranks:
        lower, upper = batch // ranks * ranks, -(-batch // ranks) * ranks
        near = " or ".join(str(n) for n in (lower, upper) if n)
        faults.add(
            "train.global_batch_size", f"{batch} cannot be shared equally: {readers}; use {near}"
        )
    elif micro is not None and (batch // ranks) % micro:
        share = batch // ranks
        faults.add(
            "train.micro_batch_size",
            f"{micro} does not divide a rank's share of the batch ({batch} / {ranks} = "
            f"{share}); use a divisor of {share}",
        )
