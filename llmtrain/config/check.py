"""Rules between keys: combinations that no single value can be blamed for.

Nothing here looks at the machine, the data or the network. Rules of the ``data`` and ``prepare``
sections are in ``config.check_data``, those of the layout over processes in
``config.check_layout``.
"""

from __future__ import annotations

import re
from pathlib import PurePath

from llmtrain.config.check_adapters import check_adapters
from llmtrain.config.check_continual import check_continual, check_restarts
from llmtrain.config.check_data import check_data, check_prepare
from llmtrain.config.check_engine import check_engine
from llmtrain.config.check_formats import check_formats
from llmtrain.config.check_layout import check_layout
from llmtrain.config.check_online import check_online
from llmtrain.config.check_scaling import check_scaling
from llmtrain.config.check_selection import check_selection
from llmtrain.config.check_sparsity import check_sparsity
from llmtrain.config.check_trainable import check_trainable
from llmtrain.config.faults import Collector, Fault, nearest, raise_faults
from llmtrain.config.length import part_of_run
from llmtrain.config.schema import RunConfig

_HOOK = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def check_config(cfg: RunConfig, *, for_training: bool = True) -> None:
    """Raise one ConfigError with every combination of keys that cannot work.

    for_training: also require what only training needs, such as a data mixture.
    """
    raise_faults(find_faults(cfg, for_training=for_training))


def find_faults(cfg: RunConfig, *, for_training: bool = False) -> list[Fault]:
    """The faults that ``check_config`` raises, each with the keys that take part."""
    faults = Collector()
    _check_run(cfg, faults)
    _check_model(cfg, faults)
    check_data(cfg, faults, for_training)
    check_prepare(cfg, faults)
    check_selection(cfg, faults)
    _check_train(cfg, faults)
    _check_schedule(cfg, faults)
    _check_average(cfg, faults)
    _check_hooks(cfg, faults)
    _check_reweight(cfg, faults)
    check_online(cfg, faults)
    check_continual(cfg, faults, for_training)
    check_layout(cfg, faults)
    check_engine(cfg, faults)
    check_adapters(cfg, faults)
    check_formats(cfg, faults)
    _check_until(cfg, faults)
    check_scaling(cfg, faults)
    check_sparsity(cfg, faults)
    check_trainable(cfg, faults)
    return faults.found


def _check_run(cfg: RunConfig, faults: Collector) -> None:
    name = PurePath(cfg.name)
    if not cfg.name.strip() or name.is_absolute() or ".." in name.parts or name == PurePath("."):
        faults.add("name", f"{cfg.name!r} cannot name a folder under `out`; use a plain name")
    if not cfg.out.strip():
        faults.add("out", "is empty; name the folder that holds the runs, such as runs")
    for key, value, what in (
        ("log.wandb", cfg.log.wandb, "project"),
        ("log.mlflow", cfg.log.mlflow, "experiment"),
    ):
        if value is not None and not value.strip():
            faults.add(key, f"is empty; name the {what}, or write null to do without")
    resume = cfg.checkpoint.resume
    near = nearest(resume, ("auto", "never"))
    if not resume.strip():
        faults.add("checkpoint.resume", "is empty; write auto, never or the path of a checkpoint")
    elif near and near != resume and "/" not in resume:
        faults.add(
            "checkpoint.resume",
            f"{resume!r} is neither auto nor never; did you mean {near!r}? (a path needs a '/')",
        )


def _check_model(cfg: RunConfig, faults: Collector) -> None:
    model, seq_len = cfg.model, cfg.data.seq_len
    d_head = model.d_head
    if d_head is None:
        if model.d_model % model.n_heads:
            faults.add(
                "model.d_model",
                f"{model.d_model} is not divisible by n_heads {model.n_heads}; "
                "change one of them or set d_head",
                "model.n_heads",
                "model.d_head",
            )
        else:
            d_head = model.d_model // model.n_heads
    if model.n_kv_heads is not None and model.n_heads % model.n_kv_heads:
        faults.add(
            "model.n_kv_heads",
            f"{model.n_kv_heads} does not divide n_heads {model.n_heads}; each key/value head "
            "serves the same number of query heads",
            "model.n_heads",
        )
    if model.position == "rope" and d_head is not None and d_head % 2:
        faults.add(
            "model.d_head",
            f"rotary positions need an even head width, not {d_head} (d_model / n_heads); "
            "change d_model, n_heads or d_head, or use position: learned",
            "model.d_model",
            "model.n_heads",
            "model.position",
        )
    if model.max_seq_len is not None and model.max_seq_len < seq_len:
        faults.add(
            "model.max_seq_len",
            f"{model.max_seq_len} is shorter than data.seq_len {seq_len}; raise it or leave it "
            "null",
            "data.seq_len",
        )
    eos = cfg.data.eos_id
    if model.vocab_size is not None and eos is not None and eos >= model.vocab_size:
        faults.add(
            "data.eos_id",
            f"{eos} is outside the vocabulary of {model.vocab_size} tokens; ids start at 0",
            "model.vocab_size",
        )


def _check_train(cfg: RunConfig, faults: Collector) -> None:
    train = cfg.train
    batch, micro = train.global_batch_size, train.micro_batch_size
    if micro is not None and batch % micro:
        remedy = "use a divisor" if micro < batch else f"use at most {batch}"
        faults.add(
            "train.micro_batch_size",
            f"{micro} does not divide global_batch_size {batch}; {remedy}",
            "train.global_batch_size",
        )
    if train.stop_after is not None and part_of_run(cfg, train.stop_after) > 1:
        faults.add(
            "train.stop_after",
            f"{train.stop_after} is after the end of the run (train.duration "
            f"{train.duration}); shorten it or leave it null",
            "train.duration",
            "train.global_batch_size",
            "data.seq_len",
        )


def _check_schedule(cfg: RunConfig, faults: Collector) -> None:
    schedule = cfg.schedule
    depends = ("train.duration", "train.global_batch_size", "data.seq_len", "schedule.name")
    warmup = part_of_run(cfg, schedule.warmup)
    if warmup > 1:
        faults.add(
            "schedule.warmup",
            f"{schedule.warmup} is longer than the run ({cfg.train.duration}); shorten it",
            *depends,
        )
    elif schedule.name == "wsd" and warmup + part_of_run(cfg, schedule.decay) > 1:
        faults.add(
            "schedule.decay",
            f"warmup {schedule.warmup} and decay {schedule.decay} together are longer than the "
            f"run ({cfg.train.duration}); shorten one",
            "schedule.warmup",
            *depends,
        )
    check_restarts(cfg, faults)


def _check_average(cfg: RunConfig, faults: Collector) -> None:
    average = cfg.average
    if average is None:
        return
    depends = ("train.duration", "train.global_batch_size", "data.seq_len", "average.method")
    if average.every is None and average.method != "sfa":
        faults.add("average.every", f"{average.method} needs it; write 10step, say", *depends)
    if part_of_run(cfg, average.start) > 1:
        faults.add(
            "average.start",
            f"{average.start} is after the end of the run ({cfg.train.duration}); make it earlier",
            *depends,
        )
    if average.every is not None and part_of_run(cfg, average.every) > 1:
        faults.add(
            "average.every",
            f"{average.every} is longer than the run ({cfg.train.duration}); shorten it",
            *depends,
        )
    if average.method == "stock" and average.keep < 2:
        faults.add("average.keep", "stock needs at least 2 excursions; raise it", *depends)
    if not average.anchor.strip():
        faults.add("average.anchor", "is empty; write start, rolling or the path of a checkpoint")


def _check_hooks(cfg: RunConfig, faults: Collector) -> None:
    for i, hook in enumerate(cfg.hooks):
        if not _HOOK.fullmatch(hook.use):
            what = f"{hook.use!r} is not an import path" if hook.use else "is missing"
            faults.add(f"hooks.{i}.use", f"{what}; write package.module:Class")
        for name in hook.args:
            if not name.isidentifier():
                message = "cannot name an argument; use letters, digits and _"
                faults.add(("hooks", str(i), "args", name), message, f"hooks.{i}.use")


def _check_reweight(cfg: RunConfig, faults: Collector) -> None:
    section = cfg.reweight
    if section is None:
        return
    if section.samples == "none" and section.tokens == "none":
        faults.add("reweight", "changes nothing; set reweight.samples or reweight.tokens")
    reads = section.tokens in ("prior", "rho")
    if reads and section.reference is None and section.losses is None:
        faults.add(
            "reweight.reference",
            f"is missing: tokens: {section.tokens} compares with a reference model; name a "
            "checkpoint or the folder of a run, or give its losses in reweight.losses",
            "reweight.tokens",
            "reweight.losses",
        )
    elif reads and section.reference is not None and section.losses is not None:
        faults.add(
            "reweight.losses",
            "stands beside reweight.reference; keep one",
            "reweight.reference",
        )
    for name in ("reference", "losses"):
        if not reads and getattr(section, name) is not None:
            faults.add(
                f"reweight.{name}",
                f"is not read with tokens: {section.tokens}; take it away, or use tokens: prior "
                "or rho",
                "reweight.tokens",
            )
    if part_of_run(cfg, section.warmup) > 1:
        faults.add(
            "reweight.warmup",
            f"{section.warmup} is longer than the run ({cfg.train.duration}); shorten it",
            "train.duration",
            "train.global_batch_size",
            "data.seq_len",
        )


def _check_until(cfg: RunConfig, faults: Collector) -> None:
    until = None if cfg.quantization is None else cfg.quantization.until
    if until is not None and part_of_run(cfg, until) > 1:
        faults.add(
            "quantization.until",
            f"{until} is after the end of the run ({cfg.train.duration}); make it earlier, or "
            "leave it null",
            "train.duration",
            "train.global_batch_size",
            "data.seq_len",
        )
