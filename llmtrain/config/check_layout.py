"""Rules of the layout: what degrees of parallelism the model, the batch and the world allow."""

from __future__ import annotations

from llmtrain.config.faults import Collector, raise_faults
from llmtrain.config.schema import RunConfig


def check_layout(cfg: RunConfig, faults: Collector) -> None:
    """Add the faults of ``parallel`` that need nothing but the config."""
    _check_tensor(cfg, faults)
    _check_context(cfg, faults)
    _check_pipeline(cfg, faults)


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


# Schedules of several stages a rank.
LOOPED = ("interleaved", "zero_bubble")


def _check_pipeline(cfg: RunConfig, faults: Collector) -> None:
    parallel = cfg.parallel
    schedule, looped = parallel.pipeline_schedule, parallel.pipeline_schedule in LOOPED
    per_rank = parallel.pipeline_stages or (2 if looped else 1)
    if parallel.pipeline == 1:
        if parallel.pipeline_stages is not None:
            faults.add("parallel.pipeline_stages", "is read with parallel.pipeline > 1; remove it")
        return
    keys = ("parallel.pipeline_schedule", "parallel.pipeline")
    if not looped and per_rank > 1:
        faults.add(
            "parallel.pipeline_stages",
            f"{per_rank} stages a rank do not go with pipeline_schedule {schedule}; use "
            "interleaved or zero_bubble, or leave it null",
            *keys,
        )
    if looped and per_rank == 1:
        faults.add(
            "parallel.pipeline_stages",
            f"{schedule} runs several stages a rank; set 2 or more, or pipeline_schedule 1f1b",
            *keys,
        )
    if schedule == "zero_bubble" and cfg.train.recompute == "full":
        faults.add(
            "train.recompute",
            "full would compute every block again for the inputs' gradients and once more for each "
            "group of weights of zero_bubble; use selective, or pipeline_schedule interleaved",
            *keys,
        )
    stages = parallel.pipeline * per_rank
    if stages > cfg.model.n_layers:
        faults.add(
            "parallel.pipeline",
            f"{parallel.pipeline} ranks x {per_rank} stages are more than the model's n_layers "
            f"{cfg.model.n_layers}; every stage needs a layer",
            "model.n_layers",
        )
    if parallel.reduce_every_micro_batch:
        faults.add(
            "parallel.reduce_every_micro_batch",
            "does not go together with parallel.pipeline > 1, which reduces once a step; remove it",
            "parallel.pipeline",
        )


def _check_micro_batches(cfg: RunConfig, share: int, faults: Collector) -> None:
    """share: sequences of a data rank per step."""
    p, micro = cfg.parallel.pipeline, cfg.train.micro_batch_size or share
    if p == 1 or share % micro:
        return
    schedule, count = cfg.parallel.pipeline_schedule, share // micro
    what = f"{schedule} over {p} pipeline ranks"
    given = f"a rank's {share} sequences in micro-batches of {micro} are {count}"
    if schedule != "gpipe" and count < p:
        faults.add(
            "train.micro_batch_size",
            f"{what} needs at least {p} micro-batches a step, and {given}; "
            + (f"lower it to {share // p}, or " if share >= p else "")
            + "raise train.global_batch_size",
        )
    elif schedule in LOOPED and count % p:
        faults.add(
            "train.micro_batch_size",
            f"{what} needs a multiple of {p} micro-batches a step, and {given}; change it or "
            "train.global_batch_size",
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
        misfits = [name for name in more if world_size % getattr(parallel, name)]
        key = f"parallel.{([*misfits, *more] or ['replicate'])[0]}"
        product = f"{named} = {fixed}" if more else str(fixed)
        faults.add(
            key,
            f"{product} does not divide the {world_size} process(es) of this run; start a multiple "
            f"of {fixed} with torchrun, or use a divisor of {world_size}",
        )
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
    else:
        _check_micro_batches(cfg, batch // ranks, faults)
